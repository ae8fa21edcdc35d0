"""Moves constants that a narrow format cannot hold into its range, by powers of two across layers.

The scale of every class of tied labels that is not pinned is free: multiplying it by 2^k divides the rows that write
those channels by 2^k and multiplies the columns that read them, exactly. A row or column is in trouble if its largest
element overflows, or is subnormal so that all of it is; single small elements beside large ones are not, because what
they lose is below the rounding of the large ones. k is the smallest that cures, and stops where an activation would
overflow.

Source: cross-layer equalisation (Nagel et al., ICCV 2019, eq. 9 to 11), here for range and not for quantisation error,
in powers of two, along everything that ties channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import Array, channel_magnitudes, fold_affine, unfold_input
from lowprec.export.folding.gauges.constraints import Constraints
from lowprec.export.folding.gauges.scales import PINNED
from lowprec.export.folding.graph import Affine, Graph, Labels, Linear, Node
from lowprec.formats import FloatFormat

# Where k is chosen, constants keep three bits from either end of the range, so that neighbours have room too, and
# activations four bits from the largest value, because the inputs looked at are few.
_ROOM = 8.0
_ACTIVATION_ROOM = 16.0
_SWEEPS = 20


Show = Callable[[Callable[[str, Array], None]], None]
"""Runs the network in float64 on a few inputs and hands over every float tensor with the name of its node."""


def balance(graph: Graph, show: Show, fmt: FloatFormat) -> list[Node]:
    """Rescales constants of a graph in place; the operations whose constants changed.

    Args:
        graph: with nothing left to fold.
        show: for the range of the activations.
        fmt: the narrow format.
    """
    search = _Search(graph, fmt)
    show(search.see)
    for _ in range(_SWEEPS):
        moved = [search.settle(node, side) for node in search.classes for side in (1, 0)]
        if not any(moved):
            break
    return [node for node in search.classes if search.write(graph, node)]


def leaves_range(graph: Graph, fmt: FloatFormat) -> bool:
    """Whether any operation of a graph has constants out of the format's range."""
    return any(in_trouble(node, fmt) for node in graph.nodes)


def in_trouble(node: Node, fmt: FloatFormat) -> bool:
    """Whether a row, a column or a bias of an operation is out of the format's range."""
    op = node.op
    if not isinstance(op, Linear | Affine):
        return False
    columns, rows, bias = _magnitudes(op)
    both = np.concatenate([columns.reshape(-1), rows.reshape(-1)])
    outside = (both > fmt.max) | ((both > 0) & (both < fmt.min_normal))
    return bool((outside & np.isfinite(both)).any() or ((bias > fmt.max) & np.isfinite(bias)).any())


def _magnitudes(op: Linear | Affine) -> tuple[Array, Array, Array]:
    """Largest absolute weight of each column and row, and the absolute bias of each row."""
    if isinstance(op, Affine):
        return abs(op.scale), abs(op.scale), abs(op.shift)
    rows, columns = channel_magnitudes(op.kind, op.stored, op.groups)
    return columns, rows, np.zeros(1) if op.bias is None else abs(op.bias)


class _Search:
    """Coordinate descent over the exponents of classes of tied labels."""

    def __init__(self, graph: Graph, fmt: FloatFormat) -> None:
        constraints = Constraints(graph)
        self._fmt = fmt
        self._root = np.array([constraints.scales.find(label)[0] for label in range(constraints.scales.count)])
        self._exponent = np.zeros(len(self._root))
        self._activation = np.zeros(len(self._root))
        self._labels = {
            node.name: labels for node, labels in constraints.labels.items() if not isinstance(labels, tuple)
        }
        self.classes = {
            node: self._classes(constraints, node)
            for node in graph.nodes
            if isinstance(node.op, Linear | Affine) and node in constraints.labels and node not in constraints.barred
        }
        self._touching: dict[int, list[Node]] = defaultdict(list)
        for node, sides in self.classes.items():
            for root in np.unique(np.concatenate([side.reshape(-1) for side in sides if side is not None])).tolist():
                self._touching[root].append(node)

    def see(self, name: str, value: Array) -> None:
        """Takes note of how large a tensor gets, per class."""
        labels = self._labels.get(name)
        if labels is not None and value.size:
            axes = tuple(axis for axis, length in enumerate(labels.shape) if length == 1)
            np.maximum.at(self._activation, self._root[labels], abs(value).max(axes, keepdims=True))

    def settle(self, node: Node, side: int) -> bool:
        """Moves the classes of an operation's columns (side 0) or rows (side 1) that are in trouble; whether any."""
        roots = self.classes[node][side]
        if roots is None:
            return False
        chosen = np.unique(roots)
        chosen = chosen[chosen != PINNED]
        low, high = (np.full((2, len(self._root)), bound) for bound in (np.inf, 0.0))
        for other in dict.fromkeys(other for root in chosen.tolist() for other in self._touching[root]):
            self._gather(other, low, high)
        activation = np.log2(np.maximum(self._activation[chosen], np.finfo(np.float64).tiny))
        steps = self._steps(low[:, chosen], high[:, chosen], activation - self._exponent[chosen])
        self._exponent[chosen] += steps
        return bool(steps.any())

    def write(self, graph: Graph, node: Node) -> bool:
        """Gives an operation its rescaled constants; whether that changes any."""
        if not any(self._exponent[side].any() for side in self.classes[node] if side is not None):
            return False
        graph.replace(node, self._rescaled(node))
        return True

    def _gather(self, node: Node, low: Array, high: Array) -> None:
        """Adds an operation's columns and rows to the smallest and largest magnitude of each class."""
        op = self._rescaled(node)
        columns, rows, bias = _magnitudes(op)
        for side, (roots, values) in enumerate(zip(self.classes[node], (columns, rows), strict=True)):
            if roots is not None:
                spread = np.broadcast_to(values, roots.shape)
                np.maximum.at(high[side], roots, spread)
                np.minimum.at(low[side], roots, np.where(spread > 0, spread, np.inf))
        after = self.classes[node][1]
        np.maximum.at(high[1], after, np.broadcast_to(bias, after.shape))

    def _steps(self, low: Array, high: Array, activation: Array) -> Array:
        """For every class the k of smallest magnitude that brings it into range, 0 where it is or cannot be.

        Args:
            low: smallest magnitude of its columns and rows.
            high: largest.
            activation: log2 of the largest stored value.
        """
        fmt = self._fmt
        trouble = (high.max(0) > fmt.max) | (low.min(0) < fmt.min_normal)
        top, bottom = np.log2(fmt.max / _ROOM), np.log2(fmt.min_normal * _ROOM)
        with np.errstate(divide="ignore"):
            (low_column, low_row), (high_column, high_row) = np.log2(low), np.log2(high)
        at_least = np.maximum(high_row - top, activation - np.log2(fmt.max / _ACTIVATION_ROOM))
        at_most = top - high_column
        # Columns that are too small want k to rise, rows that are too small want it to fall, not at the other's cost.
        limit = np.log2(fmt.min_normal)
        rise = np.minimum(bottom - low_column, np.maximum(low_row - limit, 0.0))
        fall = np.maximum(low_row - bottom, np.minimum(limit - low_column, 0.0))
        wanted = np.where(low_column < limit, rise, np.where(low_row < limit, fall, 0.0))
        possible = trouble & (np.ceil(at_least) <= np.floor(at_most))
        return np.where(possible, np.clip(np.round(wanted), np.ceil(at_least), np.floor(at_most)), 0.0)

    def _classes(self, constraints: Constraints, node: Node) -> tuple[Labels | None, Labels]:
        """The class of every column and row of an operation, in the shape of `_magnitudes`."""
        if isinstance(node.op, Linear):
            before, after = constraints.channel_labels(node)
            return None if before is None else self._root[before], self._root[after]
        own = constraints.labels[node]
        assert isinstance(node.op, Affine)
        assert not isinstance(own, tuple)
        labels = constraints.input_labels(node)
        shape = np.broadcast_shapes(node.op.shape, labels.shape, own.shape)
        return self._root[np.broadcast_to(labels, shape)], self._root[np.broadcast_to(own, shape)]

    def _rescaled(self, node: Node) -> Linear | Affine:
        before, after = self.classes[node]
        out = 2.0 ** -self._exponent[after]
        into = None if before is None else 2.0 ** self._exponent[before]
        op = node.op
        if isinstance(op, Affine):
            assert into is not None
            return Affine(op.scale * into * out, op.shift * out)
        assert isinstance(op, Linear)
        weight, bias = op.stored, op.bias
        if into is not None:
            weight, _ = unfold_input(op.kind, weight, None, ChannelAffine(into, 0 * into), op.groups)
        weight, bias = fold_affine(op.kind, weight, bias, ChannelAffine(out, 0 * out), op.groups)
        return op.with_constants(weight, None if op.bias is None else bias)
