"""What a fold did to the numbers: its algebra in float64, its rounding in float32, its constants in half.

Algebra and rounding are judged apart: in float64 a wrong formula cannot hide behind a tolerance that is meant for
rounding. Plain numpy on whatever runs a network, so that one judgement serves traced modules and ONNX files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import FoldError
from lowprec.formats import FloatFormat, rounding_loss

Arrays = Sequence[NDArray[Any]]
Run = Callable[[Arrays], Arrays]
"""A network: outputs in order for inputs in order."""

# Far above what reordering float64 sums leaves (measured: at most 1e-14) and far below any defect of a fold.
MAX_FLOAT64_ERROR = 1e-10
# A fold is accepted if rounding to float32 costs at most this many times what it costs the network as it was.
MAX_FLOAT32_RATIO = 2.0

# A float64 error of a hundred roundings is none: what float32 is off by, times u64 / u32 = 2^-29 and a hundred, may
# differ, and stays within MAX_FLOAT64_ERROR if the output is worth this many times the float32 error.
_NOISE = 100 * 2.0**-29 / MAX_FLOAT64_ERROR

# Small networks are measured on many samples, because the ratio of two errors over a few numbers is mostly chance;
# a network on images of 224 x 224 pixels gets one, which takes as long as the rest of the fold.
_MAX_SAMPLES = 64
_MAX_INPUT = 3 * 224 * 224


def samples_to_measure(per_sample: int) -> int:
    """How many samples a network is measured on whose inputs hold so many numbers per sample."""
    return min(_MAX_SAMPLES, max(1, _MAX_INPUT // max(per_sample, 1)))


@dataclass(frozen=True)
class Measured:
    """Errors of a folded network against the truth.

    Args:
        float64_error: largest relative error in float64.
        float32_error_ratio: rms error in float32 over that of the network as it was; None where that one is exact and
            the folded one is not, where one of them overflows, and where nothing here runs float32.
        float32_ran: whether float32 was run at all.
    """

    float64_error: float
    float32_error_ratio: float | None
    float32_ran: bool = True

    @property
    def is_right(self) -> bool:
        """Whether the algebra holds."""
        return self.float64_error <= MAX_FLOAT64_ERROR

    @property
    def loss(self) -> float:
        """What rounding costs, to choose among folds: infinite where it is not known or the algebra is wrong."""
        return self.float32_error_ratio if self.is_right and self.float32_error_ratio is not None else math.inf

    @property
    def is_accepted(self) -> bool:
        """Whether the fold is right and, as far as is known, loses no more to rounding than it may."""
        if not self.is_right or not self.float32_ran:
            return self.is_right
        return self.float32_error_ratio is not None and self.float32_error_ratio <= MAX_FLOAT32_RATIO


class Truth:
    """What the network as it was computes on a few inputs, in float64, and how far float32 strays from it.

    Args:
        exact: the network as it was, in float64.
        plain: the same in float32, or None where nothing here runs it.
        inputs: batches of inputs.
    """

    def __init__(self, exact: Run, plain: Run | None, inputs: Sequence[Arrays]) -> None:
        self._inputs = inputs
        self._expected = [exact(batch) for batch in inputs]
        errors = None if plain is None else self._errors(plain)
        self._plain_error = None if errors is None else rms([part for batch in errors for part in batch])
        # What an output is at least taken to be worth: where terms cancel it is all rounding, which tells nothing.
        self._floors = [[_NOISE * rms([part]) for part in batch] for batch in errors or [[] for _ in inputs]]

    def measure(self, wide: Run, narrow: Run | None) -> Measured:
        """Errors of a folded network.

        Args:
            wide: the folded network in float64.
            narrow: the same in float32, or None where nothing here runs it.
        """
        return Measured(self.float64_error(wide), *self.float32_ratio(narrow))

    def float64_error(self, wide: Run) -> float:
        """Largest relative error of a folded network that is run in float64."""
        return max(
            relative_error(known, wide(batch), floors)
            for known, batch, floors in zip(self._expected, self._inputs, self._floors, strict=True)
        )

    def float32_ratio(self, narrow: Run | None) -> tuple[float | None, bool]:
        """What a folded network loses in float32 over what the network as it was loses, and whether that was run."""
        if narrow is None or self._plain_error is None:
            return None, False
        error = rms([part for batch in self._errors(narrow) for part in batch])
        if self._plain_error == 0:
            return (1.0 if error == 0 else None), True
        ratio = error / self._plain_error
        return (ratio if math.isfinite(ratio) else None), True

    def _errors(self, network: Run) -> list[list[NDArray[Any]]]:
        """For each batch the errors of each floating output, where it is finite."""
        found = [[a for a in network(batch) if a.dtype.kind == "f"] for batch in self._inputs]
        known = [[b for b in batch if b.dtype.kind == "f"] for batch in self._expected]
        return [
            [a[np.isfinite(b)].astype(np.float64) - b[np.isfinite(b)] for a, b in zip(*pair, strict=True)]
            for pair in zip(found, known, strict=True)
        ]


def relative_error(reference: Arrays, candidate: Arrays, floors: Sequence[float] = ()) -> float:
    """Largest over the floating outputs of max |candidate - reference| / rms(reference), in float64.

    A difference in which elements are not finite counts as infinite; an output that is zero everywhere is compared
    absolutely.

    Args:
        reference: outputs.
        candidate: outputs of the same shapes.
        floors: for each floating output, what its rms is taken to be at least.
    """
    worst = 0.0
    pairs = [(b, a) for b, a in zip(reference, candidate, strict=True) if b.dtype.kind == "f"]
    for (expected, found), floor in zip(pairs, floors or [0.0] * len(pairs), strict=True):
        expected, found = expected.astype(np.float64), found.astype(np.float64)
        finite = np.isfinite(expected)
        if not np.array_equal(finite, np.isfinite(found)):
            return math.inf
        difference = float(np.abs(found[finite] - expected[finite]).max(initial=0.0))
        worst = max(worst, difference / (max(rms([expected[finite]]), floor) or 1.0))
    return worst


def rms(arrays: Arrays) -> float:
    """Root mean square over all elements of all arrays; 0 where there are none."""
    count = sum(array.size for array in arrays)
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays) / count) if count else 0.0


def refuse_wrong(measured: Measured, declared: Sequence[str] = ()) -> None:
    """Raises `FoldError` where the float64 error of a fold cannot be rounding.

    Args:
        measured: errors of the fold.
        declared: layers that were taken at their word, which the message then names.
    """
    error = measured.float64_error
    if not measured.is_right and declared:
        raise FoldError(
            f"the network folded by what {', '.join(map(repr, declared))} say in inference_affine differs from the "
            f"original by {error:.2g} in float64; let inference_affine state what the layer computes, or remove it"
        )
    if not measured.is_right:
        raise FoldError(
            f"internal: the folded network differs from the original by {error:.2g} in float64, limit "
            f"{MAX_FLOAT64_ERROR:.0e}; this is a defect in lowprec, please report the network"
        )


def range_losses(constants: Iterable[tuple[str, NDArray[Any]]], fmt: FloatFormat) -> dict[str, dict[str, int]]:
    """Counts of constants that overflow, vanish or turn subnormal in `fmt`, for each tensor that has any.

    Args:
        constants: floating tensors by name.
        fmt: the narrow format.
    """
    losses: dict[str, dict[str, int]] = {}
    for name, array in constants:
        magnitude = np.abs(array)
        # Nothing happens to the others, which are nearly all, and correct rounding in software is slow.
        suspects = array[(magnitude >= fmt.max) | (magnitude < 2 * fmt.min_normal)]
        loss = rounding_loss(suspects[suspects != 0], fmt)
        if loss:
            losses[name] = {"overflow": loss.overflow, "vanished": loss.vanished, "subnormal": loss.subnormal}
    return losses
