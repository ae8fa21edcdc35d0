"""Adapter between traced programs and the neutral graph: recognises operations, and writes edits back.

All knowledge of aten's spelling is here. A tensor operation counts as a per-channel affine by what it computes: an
addition, subtraction, multiplication or division by a constant that varies along one axis at most, or a batch or
instance norm on running statistics. So a norm layer of the library needs no entry, nor does anybody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import Array, LinearKind
from lowprec.export.folding.graph import Affine, Graph, Linear, LiveNorm, Node, Op, Opaque
from lowprec.export.folding.program import CALL, PATH, Program, arguments_by_name, is_float, operator_name, path_of

_LINEAR: dict[str, LinearKind] = {
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "conv_transpose1d": "conv_transpose",
    "conv_transpose2d": "conv_transpose",
    "conv_transpose3d": "conv_transpose",
    "linear": "linear",
}
# Coefficients of (self, other) as torch defines these with their factor alpha.
_SUMS: dict[str, Callable[[float], tuple[float, float]]] = {
    "add": lambda alpha: (1.0, alpha),
    "sub": lambda alpha: (1.0, -alpha),
    "rsub": lambda alpha: (-alpha, 1.0),
}
_RUNNING_NORMS = ("batch_norm", "instance_norm")
_SAMPLE_NORMS = (
    "layer_norm",
    "group_norm",
    "rms_norm",
    "native_layer_norm",
    "native_group_norm",
    "local_response_norm",
)
# They read the shape of a tensor and none of its values.
_SHAPE_READERS = ("sym_size", "sym_numel", "sym_stride", "size", "numel")


@dataclass(frozen=True)
class FxGraph:
    """A neutral graph and the fx node behind each of its nodes."""

    graph: Graph
    origin: dict[Node, fx.Node]


def read_graph(program: Program) -> FxGraph:
    """The neutral view of a functional float64 program.

    Constants do not appear as nodes: what reads them holds them. Nor do reads of a shape.
    """
    made: dict[fx.Node, Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" or operator_name(node) in _SHAPE_READERS:
            continue
        made[node] = Node(
            name=node.name,
            kind={"placeholder": "input"}.get(node.op, operator_name(node)),
            path=path_of(node),
            op=_operation(program, node) if node.op == "call_function" else Opaque(),
            shape=_shape(node),
            norm=_norm_call(program, node),
            is_output=node.op == "output",
        )
        for value in node.all_input_nodes:
            if value in made:
                made[node].inputs.append(made[value])
                made[value].users.append(made[node])
    return FxGraph(Graph(list(made.values())), {view: node for node, view in made.items()})


def write_graph(program: Program, view: FxGraph) -> None:
    """Writes the edits of the neutral graph into the program it was read from."""
    for node, source in view.graph.bypassed.items():
        view.origin[node].replace_all_uses_with(view.origin[source])
    for node in view.graph.nodes:
        changed = node in view.graph.changed
        if isinstance(node.op, Linear) and changed:
            _write_linear(program, view.origin[node], node.op)
        elif isinstance(node.op, Affine) and (changed or _is_running_norm(node)):
            view.origin[node] = _write_affine(program, view, node, node.op)
    program.erase_dead()


def _norm_call(program: Program, node: fx.Node) -> str | None:
    """Which call of which norm an operation belongs to."""
    if path_of(node) in program.norms:
        return str(node.meta[CALL])
    if operator_name(node) in (*_RUNNING_NORMS, *_SAMPLE_NORMS):
        return node.name
    return None


def _operation(program: Program, node: fx.Node) -> Op:
    name = operator_name(node)
    if name in _LINEAR:
        return _read_linear(program, node, _LINEAR[name])
    if name in _RUNNING_NORMS:
        return _read_running_norm(program, node)
    if name in _SAMPLE_NORMS:
        return LiveNorm("takes its statistics from each sample, so no constants stand for it")
    if name in ("mul", "div", *_SUMS) and is_float(node):
        return _read_arithmetic(program, node, name)
    if name == "neg" and is_float(node):
        return Affine(ChannelAffine.of(-1.0, 0.0), None)
    return Opaque()


def _read_linear(program: Program, node: fx.Node, kind: LinearKind) -> Op:
    given = arguments_by_name(node)
    weight, bias = program.constant(given["weight"]), program.constant(given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return Opaque()
    axis = _rank(node) - (1 if kind == "linear" else weight.ndim - 1)
    return Linear(kind, _numpy(weight), None if bias is None else _numpy(bias), int(given.get("groups", 1)), axis)


def _read_running_norm(program: Program, node: fx.Node) -> Op:
    given = arguments_by_name(node)
    if given.get("training", given.get("use_input_stats")):
        return LiveNorm(_live_reason(program, node))
    mean, variance = program.constant(given["running_mean"]), program.constant(given["running_var"])
    gamma, beta = program.constant(given["weight"]), program.constant(given["bias"])
    computed = any(given[key] is not None and program.constant(given[key]) is None for key in ("weight", "bias"))
    if mean is None or variance is None or computed:
        return LiveNorm("has statistics or parameters that the network computes, so no constants stand for it")
    with np.errstate(invalid="ignore", divide="ignore"):
        affine = ChannelAffine.from_statistics(
            _numpy(mean),
            np.sqrt(_numpy(variance) + given["eps"]),
            1.0 if gamma is None else _numpy(gamma),
            0.0 if beta is None else _numpy(beta),
        )
    return Affine(affine, 1)


def _live_reason(program: Program, node: fx.Node) -> str:
    layer = program.norms.get(path_of(node))
    if layer is not None and layer.training:
        return "is in training mode, so its statistics still change; call model.eval() before fold(model)"
    if operator_name(node) == "instance_norm":
        return "takes its statistics from each sample, so no constants stand for it"
    return "keeps no running statistics and uses those of each batch, so no constants stand for it"


def _read_arithmetic(program: Program, node: fx.Node, name: str) -> Op:
    """`x * k`, `k - x` and so on for a constant k that varies along one axis at most."""
    given = arguments_by_name(node)
    operands = [given["self"], given["other"]]
    constants = [_constant_operand(program, value) for value in operands]
    alpha = given.get("alpha", 1)
    if (constants[0] is None) == (constants[1] is None) or isinstance(alpha, fx.Node):
        return Opaque()
    position = 0 if constants[0] is None else 1
    source, constant = operands[position], constants[1 - position]
    assert constant is not None
    if not is_float(source) or not _is_per_channel(node, source, constant):
        return Opaque()
    k = constant.reshape(-1)
    axes = [axis for axis, length in enumerate(constant.shape, _rank(node) - constant.ndim) if length != 1]
    axis = axes[0] if axes else None
    if name == "mul":
        return Affine(ChannelAffine.of(k, 0.0), axis)
    if name == "div":
        if position == 1 or given.get("rounding_mode") is not None:
            return Opaque()
        with np.errstate(divide="ignore"):
            return Affine(ChannelAffine.of(1.0 / k, 0.0), axis)
    coefficients = _SUMS[name](float(alpha))
    return Affine(ChannelAffine.of(coefficients[position], coefficients[1 - position] * k), axis)


def _is_per_channel(node: fx.Node, source: fx.Node, constant: Array) -> bool:
    """Whether the constant varies along one axis at most and does not enlarge the tensor it meets."""
    same_shape = str(tuple(source.meta["val"].shape)) == str(tuple(node.meta["val"].shape))
    return same_shape and constant.ndim <= _rank(node) and sum(length != 1 for length in constant.shape) <= 1


def _constant_operand(program: Program, value: Any) -> Array | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return np.asarray(value, np.float64)
    tensor = program.constant(value)
    return None if tensor is None or tensor.is_complex() else _numpy(tensor)


def _write_linear(program: Program, node: fx.Node, op: Linear) -> None:
    """Gives a call its own constants; another call that shares the old ones keeps them."""
    given = arguments_by_name(node)
    old = [given["weight"], given.get("bias")]
    prefix = path_of(node) or node.name
    fresh = [
        program.add_constant(_constant_name(value, f"{prefix}.{leaf}"), torch.from_numpy(np.array(array)), before=node)
        for value, leaf, array in zip(old, ("weight", "bias"), (op.weight, op.bias), strict=True)
        if array is not None
    ]
    node.args = (node.args[0], *fresh, *node.args[1 + len(fresh) :])
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("weight", "bias")}


def _constant_name(value: Any, otherwise: str) -> str:
    return str(value.target) if isinstance(value, fx.Node) else otherwise


def _is_running_norm(node: Node) -> bool:
    """A norm that stays is written anew too: scale and shift lose less in half precision than its statistics do."""
    return node.kind in _RUNNING_NORMS and isinstance(node.op, Affine) and node.op.is_finite


def _write_affine(program: Program, view: FxGraph, node: Node, op: Affine) -> fx.Node:
    """An affine as one batch norm with mean 0 and variance 1: the operation that runtimes do in one pass."""
    old, source = view.origin[node], view.origin[node.inputs[0]]
    scale, shift = op.affine.scale, op.affine.shift
    arrays = {"weight": scale, "bias": shift, "running_mean": np.zeros_like(scale), "running_var": np.ones_like(scale)}
    constants = [
        program.add_constant(f"{node.label}.{leaf}", torch.from_numpy(np.array(array)), before=old)
        for leaf, array in arrays.items()
    ]
    with program.graph.inserting_before(old):
        fresh = program.graph.create_node(
            "call_function",
            torch.ops.aten.batch_norm.default,
            (source, *constants, False, 0.0, 0.0, False),
            name="batch_norm",
        )
    fresh.meta = {**old.meta, PATH: node.path}
    old.replace_all_uses_with(fresh)
    return fresh


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy(), np.float64)


def _shape(node: fx.Node) -> tuple[int | None, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(length if isinstance(length, int) else None for length in value.shape)


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)
