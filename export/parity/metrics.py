"""The parity metrics: each a function of two arrays and their context, listed in one table.

Why no cosine or accuracy threshold: measured on real defects, cosine > 0.99 and 20 dB miss two thirds of them, and an
accuracy that does not move hides flips that cancel. They are reported beside what the floor predicts and decide
nothing. Every figure that decides is in multiples of the floor, or counts what no rounding can explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowprec.export.parity.decisions import (
    measure_accuracy_drop,
    measure_agreement,
    measure_unexplained_flips,
)
from lowprec.export.parity.floor import Array, channel_rms, deviation, rms
from lowprec.export.parity.measured import (
    MIN_CHANNEL_ELEMENTS,
    Context,
    Measured,
    allowed_error,
    ratio,
)


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Args:
        name: used in check names and reports.
        perfect: the value for two identical arrays.
        measure: figure and verdict; None where the metric does not apply to such an output.
        summary: what it says, in one line.
    """

    name: str
    perfect: float
    measure: Callable[[Array, Array, Context], Measured | None]
    summary: str


def measure_non_finite(reference: Array, candidate: Array, context: Context) -> Measured:
    """Number of elements where one side is NaN, +inf or -inf and the other is not the same."""
    if reference.dtype.kind != "f":
        return Measured(0.0, "pass", 0.0, "the output holds no floating-point numbers")
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    odd = ~(np.isfinite(r) & np.isfinite(c))
    with np.errstate(invalid="ignore"):
        wrong = int(np.sum(odd & ~((np.isnan(r) & np.isnan(c)) | (r == c))))
    text = f"{wrong} of {r.size} elements are NaN or infinite on one side only, or of the other sign"
    return Measured(float(wrong), "fail" if wrong else "pass", 0.0, text)


def measure_rho(reference: Array, candidate: Array, context: Context) -> Measured:
    """rms(error) / rms(floor) over the finite elements."""
    error = deviation(reference, candidate)
    if not np.isfinite(error).any():
        return Measured(
            None, "inconclusive", context.limits.fail, "no element is finite on both sides; nothing to judge"
        )
    rho = ratio(rms(error), rms(np.where(np.isfinite(error), context.floor, 0.0)[np.isfinite(error)]))
    text = f"the rms error is {rho:.3g} times the rounding noise that {context.precision} explains"
    return Measured(rho, context.limits.band(rho), context.limits.fail, text)


def measure_rho_channel(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """The worst channel's rms(error) / rms(floor); only where channels have MIN_CHANNEL_ELEMENTS elements."""
    if reference.ndim < 2 or reference.size < MIN_CHANNEL_ELEMENTS * reference.shape[1]:
        return None
    error = deviation(reference, candidate)
    floor = np.where(np.isfinite(error), context.floor, np.nan)
    pairs = zip(channel_rms(error), channel_rms(floor), strict=True)
    ratios = [ratio(float(e), float(f)) for e, f in pairs]
    worst = int(np.argmax(ratios))
    text = f"the worst channel, {worst}, has an rms error of {ratios[worst]:.3g} times its rounding noise"
    return Measured(ratios[worst], context.limits.band(ratios[worst]), context.limits.fail, text)


def measure_elementwise(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """The largest (|error_i| - 2 ulp) / (t(N) f_i): the bands of rho for the worst single element."""
    error = np.abs(deviation(reference, candidate))
    if not np.isfinite(error).any():
        return None
    slack = allowed_error(reference, context, 0.0)
    scale = allowed_error(reference, context, 1.0) - slack
    excess = np.where(np.isfinite(error), np.maximum(error - slack, 0.0), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhos = np.where(excess > 0, excess / scale, 0.0)
    at = np.unravel_index(int(np.argmax(rhos)), rhos.shape)
    rho = float(rhos[at])
    where = ", ".join(str(int(index)) for index in at)
    text = f"the worst element, [{where}], is {rho:.3g} times as far off as the largest rounding error expected"
    return Measured(rho, context.limits.band(rho), context.limits.fail, text)


def measure_max_abs(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """max |error| over the finite elements."""
    error = np.abs(deviation(reference, candidate))
    error = error[np.isfinite(error)]
    if not error.size:
        return None
    return Measured(float(error.max()), "info", None, f"the largest error is {float(error.max()):.3g}")


def measure_rms(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """rms(error) over the finite elements."""
    error = deviation(reference, candidate)
    if not np.isfinite(error).any():
        return None
    expected = rms(context.floor)
    return Measured(rms(error), "info", None, f"the rms error is {rms(error):.3g}; the floor is {expected:.3g}")


def _finite_pair(reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    if reference.dtype.kind != "f":
        return None
    both = np.isfinite(reference) & np.isfinite(candidate)
    r, c = reference[both].astype(np.float64), candidate[both].astype(np.float64)
    return (r, c) if r.size and rms(r) > 0 else None


def measure_cosine(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """Cosine of the angle between the two, beside what the floor predicts, 1 - (rms(floor) / rms(reference))^2 / 2."""
    pair = _finite_pair(reference, candidate)
    if pair is None:
        return None
    r, c = pair
    cosine = float(np.mean((r / rms(r)) * (c / (rms(c) or 1.0))))
    predicted = 1 - (rms(context.floor) / rms(r)) ** 2 / 2
    text = f"cosine similarity {cosine:.9f}; rounding alone would give {predicted:.9f}"
    return Measured(min(cosine, 1.0), "info", None, text)


def measure_snr(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """20 log10(rms(reference) / rms(error)) in dB, beside what the floor predicts; infinite without error."""
    pair = _finite_pair(reference, candidate)
    if pair is None:
        return None
    r, c = pair
    snr_db, predicted_db = (
        20 * math.log10(rms(r) / noise) if noise > 0 else math.inf for noise in (rms(c - r), rms(context.floor))
    )
    return Measured(
        snr_db, "info", None, f"signal to noise {snr_db:.1f} dB; rounding alone gives {predicted_db:.1f} dB"
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("non_finite", 0.0, measure_non_finite, "NaN and infinities at exactly the same places"),
        Metric("rho", 0.0, measure_rho, "rms error in multiples of the rounding-noise floor"),
        Metric("rho_channel", 0.0, measure_rho_channel, "the same for the worst channel"),
        Metric("elementwise", 0.0, measure_elementwise, "the same for the worst element, against the largest expected"),
        Metric("unexplained_flips", 0.0, measure_unexplained_flips, "changed decisions that rounding cannot explain"),
        Metric("agreement", 1.0, measure_agreement, "share of equal top-1 decisions, with its interval"),
        Metric("accuracy_drop", 0.0, measure_accuracy_drop, "change of accuracy on the labels, with its interval"),
        Metric("max_abs", 0.0, measure_max_abs, "largest error, for information"),
        Metric("rms", 0.0, measure_rms, "rms error, for information"),
        Metric("cosine", 1.0, measure_cosine, "cosine similarity beside what the floor predicts, for information"),
        Metric("snr_db", math.inf, measure_snr, "signal to noise beside what the floor predicts, for information"),
    )
}
