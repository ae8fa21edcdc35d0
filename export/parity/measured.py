"""What metrics share: their context, their result, and the noise floor of single elements."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.export.parity.floor import Array, channel_rms, rms
from lowprec.export.parity.storage import format_of_precision
from lowprec.export.parity.verdicts import Limits, Verdict
from lowprec.formats import FloatFormat, spacing

# Below this many elements the rms of a channel is noise about noise: its relative standard deviation is
# sqrt((1 + 1/draws) / 2n), 14 % for n = 30 and 6 draws, so the worst of 1000 channels (3.2 sigma) stays below 1.5
# floors.
MIN_CHANNEL_ELEMENTS = 30


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may know beside the two arrays.

    Args:
        floor: rms rounding noise per element, float64, of the reference's shape.
        precision: what the floor assumes of stored values, by name.
        limits: what figures are held against.
        labels: true class per sample, shape (N,), or None.
    """

    floor: NDArray[np.float64]
    precision: str
    limits: Limits
    labels: Array | None = None

    @property
    def storage(self) -> FloatFormat:
        """The floating format of values that are not quantised."""
        return format_of_precision(self.precision)


@dataclass(frozen=True)
class Measured:
    """A metric's figure, what it was held against, one sentence, and the figure's confidence interval if it has one."""

    value: float | None
    verdict: Verdict
    limit: float | None
    text: str
    interval: tuple[float, float] | None = None


def ratio(error: float, floor: float) -> float:
    """error / floor; 0 where both are 0, infinite where the floor alone is."""
    if floor > 0:
        return error / floor
    return 0.0 if error == 0 else math.inf


def smoothed_floor(floor: NDArray[np.float64]) -> NDArray[np.float64]:
    """sqrt((f_i^2 + F^2) / 2), F the rms of the element's channel (of the whole output where channels are short).

    An element's own rms comes from a handful of draws and may by chance be close to 0; half of the weight on what its
    neighbours show bounds it from below by F / sqrt(2).
    """
    if floor.ndim >= 2 and floor.size // max(1, floor.shape[1]) >= MIN_CHANNEL_ELEMENTS:
        pooled = channel_rms(floor).reshape(1, -1, *[1] * (floor.ndim - 2))
    else:
        pooled = np.full([1] * floor.ndim, rms(floor))
    return np.asarray(np.sqrt((np.square(floor) + np.square(pooled)) / 2))


def largest_of_normals(n: int) -> float:
    """About the largest of n standard normal values in magnitude: E max |Z_i| <= sqrt(2 ln 2n).

    Source: Boucheron, Lugosi and Massart, Concentration Inequalities, 2013, theorem 2.5, for the 2n values +-Z_i.
    """
    return math.sqrt(2 * math.log(2 * max(n, 1)))


def allowed_error(reference: Array, context: Context, multiple: float) -> NDArray[np.float64]:
    """Bound on one element's error: multiple * t(N) * f_i + 2 ulp(reference_i).

    f_i is the smoothed floor, t(N) the largest of N normal values: if every error is normal with a standard deviation
    of up to `multiple` floors, the largest of all N stays near this bound. The 2 ulp cover the last rounding of the
    result and the reference's own, where the floor is 0. For outputs that are no floats there are no ulp.
    """
    ulp = (
        spacing(np.where(np.isfinite(reference), reference, 0.0), context.storage)
        if reference.dtype.kind == "f"
        else 0.0
    )
    return np.asarray(multiple * largest_of_normals(reference.size) * smoothed_floor(context.floor) + 2 * ulp)
