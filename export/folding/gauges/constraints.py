"""What every operation of a graph demands of the gauges around it.

One small function per kind of operation gives its result's labels and states its demands. Everything demanded here can
be met by S = 1, T = 0 while each affine is kept, so nothing fails; `Affine` nodes only leave a `Wish`, and `solve`
grants as many as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.export.folding.algebra import Array, input_channels
from lowprec.export.folding.gauges.scales import PINNED, Scales
from lowprec.export.folding.gauges.shifts import Shifts
from lowprec.export.folding.graph import (
    Affine,
    Attention,
    Graph,
    Labels,
    Linear,
    LiveNorm,
    MatrixProduct,
    Movement,
    Node,
    Opaque,
    Product,
    Sum,
    Through,
    ZeroPad,
)


@dataclass(frozen=True, eq=False)
class Wish:
    """The condition under which an affine disappears: S_out = scale * S_in, T_out = scale * T_in + shift.

    Args:
        node: the affine.
        before: label of each different element of its input.
        after: label of the same element of its output.
        scale: float64, one per element.
        shift: likewise.
    """

    node: Node
    before: Labels
    after: Labels
    scale: Array
    shift: Array


class Constraints:
    """Labels of every tensor of a graph, and the demands on them.

    Args:
        graph: read only.

    Attributes:
        labels: by node; absent where the result is no float tensor.
        wishes: one per affine that may disappear, in order of evaluation.
        barred: affines that cannot, and why.
    """

    def __init__(self, graph: Graph) -> None:
        self.scales, self.shifts = Scales(), Shifts()
        self.labels: dict[Node, Labels | tuple[Labels, ...]] = {}
        self.wishes: list[Wish] = []
        self.barred: dict[Node, str] = {}
        for node in graph.nodes:
            labels = self._visit(node)
            if labels is not None:
                self.labels[node] = labels

    def input_labels(self, node: Node) -> Labels:
        """Labels of the one input of an operation."""
        labels = self.labels[node.inputs[0]]
        assert not isinstance(labels, tuple)
        return labels

    def channel_labels(self, node: Node) -> tuple[Labels | None, Labels]:
        """For a linear operation: the label of each input channel (None where it reads no floats), of each output."""
        op, own = node.op, self.labels[node]
        assert isinstance(op, Linear)
        assert not isinstance(own, tuple)
        if op.kind == "embedding":
            return None, own.reshape(-1)
        before = self._along(node.inputs[0], _input_axis(node))
        return np.broadcast_to(before, input_channels(op.kind, op.stored, op.groups)), own.reshape(-1)

    def _visit(self, node: Node) -> Labels | tuple[Labels, ...] | None:
        if not all(value in self.labels for value in node.inputs if value.is_float):
            return self._opaque(node)
        match node.op:
            case Linear():
                return self._linear(node, node.op)
            case Affine():
                return self._affine(node, node.op)
            case Through():
                return self._through(node, node.op)
            case Movement() if node.inputs and all(value.is_float for value in node.inputs):
                moved = node.op.move([self.labels[value] for value in node.inputs])
                return self._opaque(node) if moved is None else moved
            case ZeroPad():
                return self._zero_pad(node, node.op)
            case Sum():
                return self._sum(node, node.op)
            case Product():
                return self._product(node, node.op)
            case MatrixProduct():
                return self._matrix_product(node, node.op)
            case Attention():
                return self._attention(node)
            case _:
                return self._opaque(node)

    # One function per kind of operation.

    def _opaque(self, node: Node) -> Labels | None:
        """Nothing is known about it: its inputs and its result are stored as they are."""
        for value in dict.fromkeys(node.inputs):
            for labels in _each(self.labels.get(value)):
                self._pin(labels, node)
        return np.full((1,) * len(node.shape), PINNED) if node.is_float and node.shape else None

    def _linear(self, node: Node, op: Linear) -> Labels:
        if op.kind != "embedding":
            labels = self._along(node.inputs[0], _input_axis(node), node)
            if not op.spreads_shift_evenly:
                self._no_shift(labels, node)
        after = self._fresh(op.channels)
        self.shifts.free_ends.update(after.tolist())
        shape = [1] * len(node.shape)
        shape[op.axis] = op.channels
        return after.reshape(shape)

    def _affine(self, node: Node, op: Affine) -> Labels:
        before = self.input_labels(node)
        shape = np.broadcast_shapes(before.shape, op.shape)
        if not op.is_finite:
            self.barred[node] = str(node.why_not_finite)
            self._pin(before, node)
            return np.full((1,) * len(node.shape), PINNED)
        if not op.is_per_channel and shape != before.shape:
            return self._wide_affine(node, op, before)
        columns = [np.broadcast_to(part, shape).reshape(-1) for part in (before, op.scale, op.shift)]
        (labels, scale, shift), which = _unique_rows(columns)
        after = self._fresh(len(labels))
        self.shifts.free_ends.update(after.tolist())
        self.wishes.append(Wish(node, labels.astype(np.int64), after, scale, shift))
        return after[which].reshape(shape)

    def _wide_affine(self, node: Node, op: Affine, before: Labels) -> Labels:
        """Constants that vary along several axes (a position embedding) stay, and take up gauges as weights do."""
        unique, which = np.unique(before, return_inverse=True)
        after = self._fresh(len(unique))
        self.shifts.free_ends.update(after.tolist())
        if (op.scale == 1).all():
            self._tie(after, unique, node)
        else:
            self._no_shift(before, node)
        return after[which].reshape(before.shape)

    def _through(self, node: Node, op: Through) -> Labels:
        labels = self.input_labels(node)
        for axis in op.mixes:
            labels = self._uniform(labels, axis, node)
        for label in np.unique(labels).tolist() if op.positive else ():
            refusal = self.scales.demand_positive(label, _called(node))
            assert refusal is None, refusal
        if not op.shift:
            self._no_shift(labels, node)
        return np.squeeze(labels, op.mixes) if op.drops else labels

    def _zero_pad(self, node: Node, op: ZeroPad) -> Labels:
        """A stored zero is a true zero where T = 0; channels made of zeros alone may have any scale.

        Zeros beside the channels (axes on which the labels vary) demand nothing of these, zeros among their elements
        do.
        """
        labels = self.input_labels(node)
        widths = [width if length > 1 else (0, 0) for width, length in zip(op.widths, labels.shape, strict=True)]
        if tuple(widths) != op.widths:
            self._no_shift(labels, node)
        padded = np.pad(labels, widths, constant_values=-1)
        fresh = self._fresh(int((padded == -1).sum()))
        self._no_shift(fresh, node)
        padded[padded == -1] = fresh
        return padded

    def _sum(self, node: Node, op: Sum) -> Labels:
        operands = [labels for labels in map(self.labels.get, node.inputs) if not isinstance(labels, tuple | None)]
        assert len(operands) == len(node.inputs)
        shape = np.broadcast_shapes(*(labels.shape for labels in operands))
        columns, which = _unique_rows([np.broadcast_to(labels, shape).reshape(-1) for labels in operands])
        after = self._fresh(len(columns[0]))
        for labels in columns:
            self._tie(after, labels, node)
        by = _called(node)
        for label, *parts in zip(after.tolist(), *(column.tolist() for column in columns), strict=True):
            terms = [(label, -1.0), *zip(parts, op.coefficients, strict=True)]
            refusal = self.shifts.demand(terms, 0.0, by)
            assert refusal is None, refusal
        return after[which].reshape(shape)

    def _product(self, node: Node, op: Product) -> Labels:
        """One factor stays as it is; the scale of the other passes. The one that varies less is the gate."""
        first, second = (self.labels[value] for value in node.inputs)
        assert not isinstance(first, tuple)
        assert not isinstance(second, tuple)
        swap = not op.divides and (first == PINNED).all() and not (second == PINNED).all()
        passing, gate = (second, first) if swap else (first, second)
        self._pin(gate, node)
        self._no_shift(passing, node)
        return _of_rank(passing, len(node.shape))

    def _matrix_product(self, node: Node, op: MatrixProduct) -> Labels:
        """One factor stays as it is; a scale of the other passes if it does not vary along the axis that is summed."""
        first, second = (self.labels[value] for value in node.inputs)
        assert not isinstance(first, tuple)
        assert not isinstance(second, tuple)
        swap = (first == PINNED).all() and not (second == PINNED).all()
        passing, gate, summed = (second, first, second.ndim - 2) if swap else (first, second, first.ndim - 1)
        self._pin(gate, node)
        if not (swap and op.means):
            self._no_shift(passing, node)
        passing = self._uniform(passing, summed, node)
        return _of_rank(passing, len(node.shape))

    def _attention(self, node: Node) -> Labels:
        """The weights are made of values as they are; scale and shift of what they weigh pass."""
        values = self.labels[node.inputs[2]]
        assert not isinstance(values, tuple)
        for other in (*node.inputs[:2], *node.inputs[3:]):
            for labels in _each(self.labels.get(other)):
                self._pin(labels, node)
        return self._uniform(values, values.ndim - 2, node)

    # What they demand.

    def _fresh(self, count: int) -> Labels:
        first = self.scales.count
        self.scales.add(count)
        return np.arange(first, first + count)

    def _pin(self, labels: Labels, node: Node) -> None:
        unique = np.unique(labels)
        self._tie(unique, np.full_like(unique, PINNED), node)
        self._no_shift(unique, node)

    def _tie(self, labels: Labels, others: Labels, node: Node) -> None:
        by = _called(node)
        for label, other in zip(labels.tolist(), others.tolist(), strict=True):
            refusal = self.scales.tie(label, other, 1.0, by)
            assert refusal is None, refusal

    def _no_shift(self, labels: Labels, node: Node) -> None:
        by = _called(node)
        for label in np.unique(labels).tolist():
            refusal = self.shifts.demand([(label, 1.0)], 0.0, by)
            assert refusal is None, refusal

    def _uniform(self, labels: Labels, axis: int, node: Node) -> Labels:
        """The same gauge all along an axis; returns the labels with length 1 there."""
        first = labels.take([0], axis)
        if labels.shape[axis] == 1:
            return first
        by = _called(node)
        pairs = np.stack([labels.reshape(-1), np.broadcast_to(first, labels.shape).reshape(-1)])
        for label, other in np.unique(pairs, axis=1).T.tolist():
            if label != other:
                refusal = self.scales.tie(label, other, 1.0, by)
                refusal = refusal or self.shifts.demand([(label, 1.0), (other, -1.0)], 0.0, by)
                assert refusal is None, refusal
        return first

    def _along(self, source: Node, axis: int, node: Node | None = None) -> Labels:
        """The label of each channel on `axis`, one for all or one each.

        With `node` it is demanded that the gauge does not vary along the other axes.
        """
        labels = self.labels[source]
        assert not isinstance(labels, tuple)
        for other in range(labels.ndim):
            if other != axis:
                labels = self._uniform(labels, other, node) if node else labels.take([0], other)
        return labels.reshape(-1)


def _input_axis(node: Node) -> int:
    """Where a linear operation reads its channels: on the axis on which it writes them."""
    assert isinstance(node.op, Linear)
    return node.op.axis


def _called(node: Node) -> str:
    """How a sentence names an operation that stands in the way."""
    if node.is_output:
        return "an output of the network"
    if not node.inputs and isinstance(node.op, Opaque):
        return f"the input '{node.name}'"
    if isinstance(node.op, LiveNorm):
        return f"'{node.label}', which takes its statistics from what it is given"
    return f"'{node.label}' ({node.kind})"


def _of_rank(labels: Labels, rank: int) -> Labels:
    """Labels with axes of length 1 put first, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def _each(labels: Labels | tuple[Labels, ...] | None) -> tuple[Labels, ...]:
    if labels is None:
        return ()
    return labels if isinstance(labels, tuple) else (labels,)


def _unique_rows(columns: Sequence[NDArray[Any]]) -> tuple[list[NDArray[Any]], Labels]:
    """The different combinations of equally long columns, and which of them each row is."""
    keys = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, codes = np.unique(column, return_inverse=True)
        keys = np.unique(keys * len(values) + codes, return_inverse=True)[1]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # in order of appearance, so that labels follow the channels
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return [column[first[order]] for column in columns], rank[which]
