"""The scales of all labels: which are tied to one another by a factor, which must be positive, which are one.

A union-find whose edges carry factors, with an undo log instead of path compression, so that a demand that turns out
impossible can be taken back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Two ways to one factor differ by a rounding per multiplication; a real conflict differs by far more.
_SAME = 1e-13

PINNED = 0
"""The label whose scale is 1 and whose shift is 0."""


@dataclass(frozen=True)
class _Undo:
    child: int
    root: int
    sign: int
    sign_by: str


class Scales:
    """S of each label, up to one free factor per class of tied labels."""

    def __init__(self) -> None:
        self._parent = [PINNED]
        self._factor = [1.0]
        self._tied_by = [""]
        self._size = [1]
        self._sign = [1]
        self._sign_by = [""]
        self._log: list[_Undo] = []

    @property
    def count(self) -> int:
        """How many labels there are."""
        return len(self._parent)

    def add(self, count: int) -> None:
        """`count` further labels, each in a class of its own."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        self._factor += [1.0] * count
        self._tied_by += [""] * count
        self._size += [1] * count
        self._sign += [0] * count
        self._sign_by += [""] * count

    def find(self, label: int) -> tuple[int, float]:
        """The class of a label, and the factor f in S[label] = f * S[class]."""
        factor, parent = 1.0, self._parent
        while parent[label] != label:
            factor *= self._factor[label]
            label = parent[label]
        return label, factor

    def tie(self, label: int, other: int, factor: float, by: str) -> str | None:
        """Demands S[label] = factor * S[other]; says why that is impossible, else None.

        Args:
            label: the one.
            other: the other.
            factor: finite, not zero.
            by: the operation that demands it, for messages.
        """
        root, own = self.find(label)
        onto, others = self.find(other)
        if root == onto:
            if math.isclose(own, factor * others, rel_tol=_SAME):
                return None
            return self._reason_of_factors(label, other, root)
        ratio = factor * others / own  # S[root] = ratio * S[onto]
        if root == PINNED or (onto != PINNED and self._size[root] > self._size[onto]):
            root, onto, ratio = onto, root, 1 / ratio
        if ratio == 0 or not math.isfinite(ratio):
            return "its scale leaves the range of float64"
        sign = self._sign[root] if ratio > 0 else -self._sign[root]
        if sign and self._sign[onto] not in (0, sign):
            return self._reason_of_signs(self._sign_by[root], self._sign_by[onto])
        self._log.append(_Undo(root, onto, self._sign[onto], self._sign_by[onto]))
        self._parent[root], self._factor[root], self._tied_by[root] = onto, ratio, by
        self._size[onto] += self._size[root]
        if sign and not self._sign[onto]:
            self._sign[onto], self._sign_by[onto] = sign, self._sign_by[root]
        return None

    def demand_positive(self, label: int, by: str) -> str | None:
        """Demands S[label] > 0; says why that is impossible, else None."""
        root, factor = self.find(label)
        sign = 1 if factor > 0 else -1
        if self._sign[root] not in (0, sign):
            return self._reason_of_signs(by, self._sign_by[root])
        if not self._sign[root]:
            self._log.append(_Undo(-1, root, 0, ""))
            self._sign[root], self._sign_by[root] = sign, by
        return None

    def value(self, label: int) -> float:
        """S of a label, with every free factor at +1 or -1 as the demands have it."""
        root, factor = self.find(label)
        return -factor if self._sign[root] < 0 else factor

    def mark(self) -> int:
        """A point to which `undo` can return."""
        return len(self._log)

    def undo(self, mark: int) -> None:
        """Takes back every demand since `mark`."""
        while len(self._log) > mark:
            step = self._log.pop()
            self._sign[step.root], self._sign_by[step.root] = step.sign, step.sign_by
            if step.child >= 0:
                self._size[step.root] -= self._size[step.child]
                self._parent[step.child], self._factor[step.child], self._tied_by[step.child] = step.child, 1.0, ""

    def _reason_of_factors(self, label: int, other: int, root: int) -> str:
        names = list(dict.fromkeys(name for start in (label, other) for name in self._ties(start) if name))
        if root == PINNED:
            return f"its scale would have to pass {_listed(names)}"
        return f"what it reads and what it gives meet again in {_listed(names)}, which needs one scale for both"

    def _ties(self, label: int) -> list[str]:
        """Which operations tie a label to its class, the last one first."""
        names = []
        while self._parent[label] != label:
            names.append(self._tied_by[label])
            label = self._parent[label]
        return names[::-1]

    @staticmethod
    def _reason_of_signs(one: str, other: str) -> str:
        names = list(dict.fromkeys(name for name in (one, other) if name))
        return f"a negative scale would have to pass {_listed(names)}"


def _listed(names: list[str]) -> str:
    """Two names at most, as a phrase."""
    return " or ".join(names[:2]) or "an input or output of the network"
