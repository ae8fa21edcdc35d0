"""The shifts of all labels: a system of sparse linear equations, solved as they come in.

Shifts are kept in true units, so that they do not depend on the scales. Each equation has a handful of terms and
defines one label by others; an equation between labels that are all known must hold already, else it is refused. No
matrix is formed: the labels of a network are many thousands, nearly all of them zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowprec.export.folding.gauges.scales import PINNED

# Roundings of a few float64 operations; a shift that is really asked for is far above it.
_NOTHING = 1e-12

Terms = Iterable[tuple[int, float]]


class Shifts:
    """T of each label, as far as the equations say; what they leave open is zero.

    Attributes:
        free_ends: labels that nothing before them ties: results of linear operations. They are defined by the others
            rather than the reverse, which keeps equations short along a residual stream.
    """

    def __init__(self) -> None:
        self.free_ends: set[int] = set()
        self._solved: dict[int, tuple[float, dict[int, float]]] = {PINNED: (0.0, {})}
        self._by: dict[int, str] = {}
        self._log: list[int] = []

    def demand(self, terms: Terms, constant: float, by: str) -> str | None:
        """Demands sum(k * T[label]) + constant = 0; says why that is impossible, else None.

        Args:
            terms: (label, k).
            constant: in true units.
            by: the operation that demands it, for messages.
        """
        left, rest, magnitude, met = self._reduced(terms, constant)
        if not left:
            if abs(rest) <= _NOTHING * magnitude:
                return None
            names = list(dict.fromkeys(name for name in met if name))[:2]
            return f"its shift would have to pass {' or '.join(names) or 'an input or output of the network'}"
        pivot = max(left, key=lambda label: (label in self.free_ends, label))
        scale = -1.0 / left.pop(pivot)
        self._solved[pivot] = (rest * scale, {label: k * scale for label, k in left.items()})
        self._by[pivot] = by
        self._log.append(pivot)
        return None

    def value(self, label: int) -> float:
        """T of a label, with every open one at zero."""
        return self._reduced([(label, 1.0)], 0.0)[1]

    def mark(self) -> int:
        """A point to which `undo` can return."""
        return len(self._log)

    def undo(self, mark: int) -> None:
        """Takes back every demand since `mark`."""
        while len(self._log) > mark:
            pivot = self._log.pop()
            del self._solved[pivot], self._by[pivot]

    def _reduced(self, terms: Terms, constant: float) -> tuple[dict[int, float], float, float, list[str]]:
        """The same equation in open labels: coefficients, constant, the largest part of it, and who defined what."""
        left: dict[int, float] = {}
        largest: dict[int, float] = {}
        magnitude, met = abs(constant), []
        pending = list(terms)
        solved = self._solved
        while pending:
            label, k = pending.pop()
            known = solved.get(label)
            if known is None:
                left[label] = left.get(label, 0.0) + k
                largest[label] = max(largest.get(label, 0.0), abs(k))
                continue
            part = k * known[0]
            constant += part
            magnitude = max(magnitude, abs(part))
            met.append(self._by.get(label, ""))
            pending += [(inner, k * factor) for inner, factor in known[1].items()]
        left = {label: k for label, k in left.items() if abs(k) > _NOTHING * largest[label]}
        return left, constant, magnitude, met
