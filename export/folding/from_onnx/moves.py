"""ONNX operators that move elements of a tensor and change none, followed by running them on labels.

What a reshape, a permutation or a channel shuffle does to channels is found by doing it to numbers, one per channel,
through onnx's own reference evaluation, instead of by a rule per operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from lowprec.export.folding.from_onnx.edits import attributes_of
from lowprec.export.folding.from_onnx.program import OnnxProgram, Shape
from lowprec.export.folding.graph import Labels, Movement, Op, Opaque

# Operators whose first input is moved, as the others say.
_MOVES_FIRST = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Gather", "Expand", "Tile"}
    | {"DepthToSpace", "SpaceToDepth"}
)
MOVES = _MOVES_FIRST | {"Concat"}

Given = Sequence[Labels | tuple[Labels, ...]]


def read_move(program: OnnxProgram, node: onnx.NodeProto, sources: Sequence[str]) -> Op:
    """The movement that a node is; opaque where what is moved, or where to, is computed.

    Args:
        program: the model.
        node: of one of the `MOVES`.
        sources: names of the values that it reads and that the network computes.
    """
    if node.op_type == "Concat":
        return _read_concatenation(program, node, sources)
    arguments = [program.fixed(name) if name else None for name in node.input[1:]]
    if (
        list(sources) != [node.input[0]]
        or not all(node.output)
        or any(value is None and name for value, name in zip(arguments, node.input[1:], strict=True))
    ):
        return Opaque()
    if node.op_type == "Gather" and not program.is_constant(node.input[1]):  # what shapes decide differs with them
        return Opaque()
    run = functools.cache(lambda: _evaluator(program, node, arguments))
    outputs = [(program.lengths[name], program.shape(name)) for name in node.output]
    lengths = program.lengths[node.input[0]]

    def move(given: Given) -> Labels | tuple[Labels, ...] | None:
        labels = _alone(given)
        if labels is None:
            return None
        results = run()(np.broadcast_to(labels, lengths))
        moved = [
            _compressed(result, shape) if result.shape == size else None
            for result, (size, shape) in zip(results, outputs, strict=True)
        ]
        found = tuple(part for part in moved if part is not None)
        if len(found) < len(moved):
            return None
        return found if len(node.output) > 1 else found[0]

    return Movement(move)


def handed_over() -> Movement:
    """A value handed on as it is."""
    return Movement(lambda given: _alone(given))


def part_of(position: int) -> Movement:
    """One of the results of a node that has several."""
    return Movement(lambda given: given[0][position] if isinstance(given[0], tuple) else None)


def _alone(given: Given) -> Labels | None:
    return None if isinstance(given[0], tuple) else given[0]


def _read_concatenation(program: OnnxProgram, node: onnx.NodeProto, sources: Sequence[str]) -> Op:
    """The same without laying out whole tensors: only the axes that vary are laid out, since networks do it often."""
    if list(sources) != list(node.input):
        return Opaque()
    rank, shape = program.rank(node.output[0]), program.shape(node.output[0])
    axis = attributes_of(node).get("axis", 1) % rank
    lengths = [program.lengths[name][axis] for name in sources]

    def move(given: Given) -> Labels | None:
        parts = [labels for labels in given if not isinstance(labels, tuple)]
        if len(parts) < len(given) or any(labels.ndim != rank for labels in parts):
            return None
        common = list(np.broadcast_shapes(*([*p.shape[:axis], 1, *p.shape[axis + 1 :]] for p in parts)))
        whole = []
        for labels, length in zip(parts, lengths, strict=True):
            common[axis] = length
            whole.append(np.broadcast_to(labels, common))
        return _compressed(np.concatenate(whole, axis), shape)

    return Movement(move)


def _evaluator(
    program: OnnxProgram, node: onnx.NodeProto, arguments: Sequence[NDArray[Any] | None]
) -> Callable[[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The node alone, on int64."""
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=TensorProto.INT64, shape=None)
    named = {name: array for name, array in zip(node.input[1:], arguments, strict=True) if array is not None}
    inputs = [value(name) for name in (node.input[0], *named)]
    graph = onnx.helper.make_graph([node], "move", inputs, [value(name) for name in node.output])
    model = onnx.helper.make_model(graph, opset_imports=list(program.model.opset_import))
    evaluator = ReferenceEvaluator(model)
    return lambda labels: list(evaluator.run(list(node.output), {node.input[0]: labels, **named}))


def _compressed(labels: Labels, shape: Shape) -> Labels | None:
    """Labels with length 1 along axes on which they do not vary; None if they vary along a free axis."""
    for axis, length in enumerate(shape):
        if labels.shape[axis] == 1:
            continue
        first = labels.take([0], axis) if labels.shape[axis] else labels
        if (labels == first).all():
            labels = first
        elif length is None:
            return None
    return labels
