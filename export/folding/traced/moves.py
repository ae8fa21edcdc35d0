"""Operations that move elements of a tensor and change none, followed by running them on labels.

What a reshape, a permutation or a channel shuffle does to channels is found by doing it to numbers, one per channel,
instead of by a rule per operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from lowprec.export.folding.graph import Labels, Movement, Op, Opaque
from lowprec.export.folding.traced.program import Program, operator_name

MOVES = frozenset(
    {"getitem", "cat", "concat", "concatenate"}
    | {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"}
    | {"permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint"}
    | {"expand", "repeat", "tile", "repeat_interleave", "view_as", "reshape_as", "expand_as", "clone"}
    | {"slice", "select", "narrow", "index_select", "chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
    | {"unsafe_chunk", "unsafe_split", "stack", "roll", "flip", "unfold"}
    | {"channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}
)

_T = TypeVar("_T")


def read_move(program: Program, node: fx.Node, sources: list[fx.Node]) -> Op:
    """The movement that an operation is; opaque where what is moved, or where to, is computed."""
    if node.target is operator.getitem:
        position: Any = node.args[1]
        return Movement(lambda given: given[0][position] if isinstance(given[0], tuple) else given[0])
    if operator_name(node).startswith("concat") or operator_name(node) == "cat":
        return _read_concatenation(node, sources)
    try:
        fixed = _mapped(
            (node.args, node.kwargs),
            fx.Node,
            lambda value: _Source(value) if value in sources else _fixed(program, value),
        )
    except _NotFixedError:
        return Opaque()

    def move(given: Sequence[Labels | tuple[Labels, ...]]) -> Labels | tuple[Labels, ...] | None:
        if any(isinstance(labels, tuple) for labels in given):
            return None
        whole = dict(zip(sources, map(_expanded, given, sources), strict=True))
        args, kwargs = _mapped(fixed, _Source, lambda source: whole[source.node])
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        several = isinstance(result, (list, tuple))
        values = node.meta["val"] if several else [node.meta["val"]]
        moved = [_compressed(part, value) for part, value in zip(result if several else [result], values, strict=True)]
        found = tuple(labels for labels in moved if labels is not None)
        if len(found) < len(moved):
            return None
        return found if several else found[0]

    return Movement(move)


def _read_concatenation(node: fx.Node, sources: list[fx.Node]) -> Op:
    """The same without laying out whole tensors: only the axes that vary are laid out, since networks do it often."""
    parts = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != len(sources) or not isinstance(axis, int):
        return Opaque()
    axis %= len(node.meta["val"].shape)

    def move(given: Sequence[Labels | tuple[Labels, ...]]) -> Labels | None:
        labels = [part for part in given if not isinstance(part, tuple)]
        if len({part.ndim for part in labels}) != 1 or len(labels) < len(given):
            return None
        shape = list(np.broadcast_shapes(*([*part.shape[:axis], 1, *part.shape[axis + 1 :]] for part in labels)))
        whole = []
        for part, source in zip(labels, sources, strict=True):
            shape[axis] = _lengths(source.meta["val"])[axis]
            whole.append(np.broadcast_to(part, shape))
        return _compressed(torch.from_numpy(np.concatenate(whole, axis)), node.meta["val"])

    return Movement(move)


class _NotFixedError(Exception):
    """An argument of a movement is computed by the network."""


class _Source:
    """Stands for a tensor whose labels are put in its place."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def _mapped(arguments: Any, kind: type[_T], change: Callable[[_T], Any]) -> Any:
    """Nested arguments with everything of one kind replaced."""
    if isinstance(arguments, kind):
        return change(arguments)
    if isinstance(arguments, dict):
        return {key: _mapped(value, kind, change) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return tuple(_mapped(value, kind, change) for value in arguments)
    return arguments


def _fixed(program: Program, node: fx.Node) -> Any:
    """An argument that is not moved: a constant tensor, or a length, as it is for the example."""
    constant = program.constant(node)
    if constant is not None:
        return constant
    value = node.meta.get("val")
    if isinstance(value, Tensor):  # read for its shape alone (view_as)
        return torch.empty(_lengths(value), device="meta")
    return _length(value)


def _length(value: Any) -> int:
    """A length of the example's, also where the axis is free."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    if not isinstance(value, int):
        raise _NotFixedError
    return value


def _lengths(value: Tensor) -> list[int]:
    return [_length(length) for length in value.shape]


def _expanded(labels: Labels | tuple[Labels, ...], source: fx.Node) -> Tensor:
    assert not isinstance(labels, tuple)
    return torch.from_numpy(np.ascontiguousarray(labels)).expand(_lengths(source.meta["val"]))


def _compressed(moved: Tensor, value: Tensor) -> Labels | None:
    """Labels with length 1 along axes on which they do not vary; None if they vary along a free axis."""
    labels: Labels = moved.numpy()
    lengths: Sequence[Any] = value.shape
    for axis, length in enumerate(lengths):
        first = labels.take([0], axis) if labels.shape[axis] else labels
        if labels.shape[axis] != 1 and (labels == first).all():
            labels = first
        elif labels.shape[axis] != 1 and not isinstance(length, int):
            return None
    return labels
