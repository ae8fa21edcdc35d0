"""Which affines disappear, and the gauges that make them.

Each wish is granted whole, with its scale and its shift, if that fits all that was demanded before, else not at all.
Granting in order of evaluation is not always best, because one norm over a concatenation can bar several others, so
other orders are tried too. What cannot go whole is then made as cheap as it can be: an addition or a multiplication
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from lowprec.export.folding.algebra import Array
from lowprec.export.folding.gauges.constraints import Constraints, Wish
from lowprec.export.folding.graph import Graph, Labels, Node

Refuse = Callable[[Wish], str | None]


@dataclass
class Solution:
    """Gauges of a graph.

    Args:
        constraints: labels and demands, the granted wishes included.
        granted: affines that disappear.
        kept: affines that stay, and why.
    """

    constraints: Constraints
    granted: list[Node] = field(default_factory=list)
    kept: dict[Node, str] = field(default_factory=dict)

    def scale(self, labels: Labels) -> Array:
        """S of each label."""
        return self._values(labels, self.constraints.scales.value)

    def shift(self, labels: Labels) -> Array:
        """T of each label."""
        return self._values(labels, self.constraints.shifts.value)

    @staticmethod
    def _values(labels: Labels, value: Callable[[int], float]) -> Array:
        unique, which = np.unique(labels, return_inverse=True)
        return np.array([value(label) for label in unique.tolist()], np.float64)[which].reshape(labels.shape)


def solve(graph: Graph, refuse: Refuse) -> Solution:
    """The gauges that let most affines disappear, of the orders of granting that are tried.

    Args:
        graph: read only.
        refuse: says why an affine is not to be moved at all, or None.
    """
    constraints = Constraints(graph)
    start = _mark(constraints)
    barred = {wish.node: reason for wish in constraints.wishes if (reason := refuse(wish)) is not None}
    wishes = [wish for wish in constraints.wishes if wish.node not in barred]
    orders = _orders(wishes)
    best = min(orders, key=lambda order: (_count_kept(constraints, start, order), orders.index(order)))
    kept = _grant(constraints, best)
    granted = [wish.node for wish in wishes if wish.node not in kept]
    solution = Solution(constraints, granted, {**constraints.barred, **barred, **kept})
    for wish in constraints.wishes:
        if wish.node in solution.kept:
            _cheapen(constraints, wish, movable=wish.node not in barred or not wish.scale.all())
    return solution


def _orders(wishes: list[Wish]) -> list[list[Wish]]:
    """Orders of granting that are worth a try: of evaluation, the reverse, and those that bind fewest labels first."""
    return [wishes, wishes[::-1], sorted(wishes, key=lambda wish: len(wish.before))]


def _count_kept(constraints: Constraints, start: tuple[int, int], order: list[Wish]) -> int:
    count = len(_grant(constraints, order))
    _undo(constraints, start)
    return count


def _grant(constraints: Constraints, order: Iterable[Wish]) -> dict[Node, str]:
    """Grants each wish in turn that still can be; why the others cannot."""
    kept = {}
    for wish in order:
        mark = _mark(constraints)
        reason = _tie(constraints, wish) or _shift(constraints, wish)
        if reason is not None:
            _undo(constraints, mark)
            kept[wish.node] = reason
    return kept


def _tie(constraints: Constraints, wish: Wish) -> str | None:
    """S_out = scale * S_in."""
    for after, before, scale in zip(wish.after.tolist(), wish.before.tolist(), wish.scale.tolist(), strict=True):
        if scale == 0:
            return "a scale of zero makes the channel a constant, which cannot be undone behind it"
        reason = constraints.scales.tie(after, before, scale, f"'{wish.node.label}'")
        if reason is not None:
            return reason
    return None


def _shift(constraints: Constraints, wish: Wish) -> str | None:
    """T_out = scale * T_in + shift."""
    columns = (wish.after.tolist(), wish.before.tolist(), wish.scale.tolist(), wish.shift.tolist())
    for after, before, scale, shift in zip(*columns, strict=True):
        reason = constraints.shifts.demand([(after, -1.0), (before, scale)], shift, f"'{wish.node.label}'")
        if reason is not None:
            return reason
    return None


def _cheapen(constraints: Constraints, wish: Wish, movable: bool) -> None:
    """Makes what is left of an affine an addition, if its scale can go, else a multiplication, if its shift can.

    Args:
        constraints: take up the demand.
        wish: the affine.
        movable: whether its shift may move.
    """
    mark = _mark(constraints)
    if _tie(constraints, wish) is not None:
        _undo(constraints, mark)
        if movable and _shift(constraints, wish) is not None:
            _undo(constraints, mark)


def _mark(constraints: Constraints) -> tuple[int, int]:
    return constraints.scales.mark(), constraints.shifts.mark()


def _undo(constraints: Constraints, mark: tuple[int, int]) -> None:
    constraints.scales.undo(mark[0])
    constraints.shifts.undo(mark[1])
