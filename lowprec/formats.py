"""Floating-point formats and correct rounding to them, in numpy alone.

The one place that knows what a half is: no other file writes 65504. Rounding is computed in float64 from the format's
own parameters instead of through a cast, so that the same code serves formats that numpy has no type for, and a value
is rounded once (a cast float64 -> float32 -> bfloat16 would round twice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowprec.errors import ConfigError


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with subnormals, infinities and round-half-to-even.

    Args:
        name: the name used on the command line and in artefacts.
        precision: significand bits p, the implicit one included.
        max_exponent: the largest e in 2^e * 1.f.
    """

    name: str
    precision: int
    max_exponent: int

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, 1 - max_exponent."""
        return 1 - self.max_exponent

    @property
    def max(self) -> float:
        """Largest finite value, (2 - 2^(1-p)) * 2^max_exponent."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.max_exponent

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value, 2^min_exponent."""
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value, 2^(min_exponent - p + 1)."""
        return math.ldexp(1.0, self.min_exponent - self.precision + 1)

    @property
    def eps(self) -> float:
        """Distance from 1 to the next value, 2^(1-p)."""
        return 2.0 ** (1 - self.precision)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of one rounding to nearest, u = 2^-p."""
        return 2.0**-self.precision

    def headroom_bits(self, absmax: float) -> float:
        """Binary orders of magnitude between `absmax` and overflow: log2(max / absmax), inf for absmax 0."""
        if absmax == 0:
            return math.inf
        return math.log2(self.max / absmax) if math.isfinite(absmax) else -math.inf


FP64 = FloatFormat("fp64", 53, 1023)
FP32 = FloatFormat("fp32", 24, 127)
FP16 = FloatFormat("fp16", 11, 15)
BF16 = FloatFormat("bf16", 8, 127)

FORMATS: dict[str, FloatFormat] = {fmt.name: fmt for fmt in (FP64, FP32, FP16, BF16)}


def format_named(name: str) -> FloatFormat:
    """The format called `name`; raises `ConfigError` that lists the valid ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(f"unknown number format {name!r}; choose one of {', '.join(FORMATS)}") from None


def spacing(x: ArrayLike, fmt: FloatFormat) -> NDArray[np.float64]:
    """Distance between neighbouring values of `fmt` around x: 2^(max(e, min_exponent) - p + 1), |x| in [2^e, 2^(e+1)).

    One ulp of x; below the normal range it is the constant subnormal step. Zero has the subnormal step.
    """
    x64 = np.asarray(x, np.float64)
    exponent = np.frexp(x64)[1] - 1
    exponent = np.where(x64 == 0, fmt.min_exponent, np.maximum(exponent, fmt.min_exponent))
    return np.asarray(np.ldexp(1.0, exponent - fmt.precision + 1), np.float64)


def round_to(x: ArrayLike, fmt: FloatFormat) -> NDArray[np.float64]:
    """x rounded once to the nearest value of `fmt`, ties to even, returned in float64.

    Values that round beyond `fmt.max` become infinite, as IEEE 754 has it; NaN and infinities stay.
    """
    x64 = np.asarray(x, np.float64)
    if fmt is FP64:
        return x64.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        step = spacing(x64, fmt)
        rounded = np.rint(x64 / step) * step
        rounded = np.where(np.abs(rounded) > fmt.max, np.copysign(np.inf, x64), rounded)
    return np.asarray(np.where(np.isfinite(x64), rounded, x64), np.float64)


@dataclass(frozen=True)
class RoundingLoss:
    """What a rounding to a format does to a tensor: counts of values that overflow, vanish or turn subnormal."""

    overflow: int
    vanished: int
    subnormal: int

    def __bool__(self) -> bool:
        return bool(self.overflow or self.vanished or self.subnormal)

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        counts = (self.overflow + other.overflow, self.vanished + other.vanished, self.subnormal + other.subnormal)
        return RoundingLoss(*counts)


def rounding_loss(x: ArrayLike, fmt: FloatFormat) -> RoundingLoss:
    """Counts the finite values of x that overflow, vanish to zero, or turn subnormal when rounded to `fmt`."""
    x64 = np.asarray(x, np.float64)
    rounded = round_to(x64, fmt)
    magnitude = np.abs(rounded)
    return RoundingLoss(
        overflow=int(np.sum(np.isfinite(x64) & np.isinf(rounded))),
        vanished=int(np.sum((x64 != 0) & (rounded == 0))),
        subnormal=int(np.sum((magnitude > 0) & (magnitude < fmt.min_normal))),
    )
