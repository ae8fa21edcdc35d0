"""Metrics on decisions: whether the two networks choose the same classes, and what that does to accuracy.

They complement the noise floor and never replace it: most defects flip no label of a few hundred samples, and flips
that cancel leave the accuracy where it was.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowprec.export.parity.floor import Array
from lowprec.export.parity.intervals import (
    paired_drop_interval,
    samples_for_margin,
    samples_for_share,
    wilson_interval,
)
from lowprec.export.parity.measured import Context, Measured, allowed_error
from lowprec.export.parity.verdicts import Verdict


def _classes(reference: Array, candidate: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Top-1 classes of both, or None where the output is no (N, C) array of finite scores with C >= 2."""
    if reference.ndim != 2 or reference.shape[1] < 2 or reference.dtype.kind != "f" or not len(reference):
        return None
    if not np.isfinite(reference).all() or not np.isfinite(candidate).all():
        return None
    return reference.argmax(axis=1), candidate.argmax(axis=1)


def measure_agreement(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """Share of samples with the same top-1 class, with its Wilson interval; judged only where a share is claimed."""
    classes = _classes(reference, candidate)
    if classes is None:
        return None
    n, limits = len(classes[0]), context.limits
    equal = int(np.sum(classes[0] == classes[1]))
    low, high = wilson_interval(equal, n, limits.confidence)
    text = f"{equal} of {n} decisions agree; the true share is in [{low:.4f}, {high:.4f}] at {limits.confidence:.0%}"
    verdict: Verdict = "info"
    if limits.min_agreement is not None:
        verdict = "pass" if low >= limits.min_agreement else "fail" if high < limits.min_agreement else "inconclusive"
        if verdict == "inconclusive":
            text += _more_samples(samples_for_share(equal / n, limits.min_agreement, limits.confidence))
    return Measured(equal / n, verdict, limits.min_agreement, text, (low, high))


def measure_unexplained_flips(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """Flips of the top-1 class whose margin in the reference exceeds what rounding can close; any of them fails.

    A flip from class a to b is explained if reference_a - reference_b is at most the sum of the allowed errors of the
    two (the elementwise bound at the failing multiple).
    """
    classes = _classes(reference, candidate)
    if classes is None:
        return None
    rows = np.flatnonzero(classes[0] != classes[1])
    a, b = classes[0][rows], classes[1][rows]
    bound = allowed_error(reference, context, context.limits.fail)
    margin = reference[rows, a].astype(np.float64) - reference[rows, b]
    odd = rows[margin > bound[rows, a] + bound[rows, b]]
    text = f"{len(odd)} of {len(rows)} changed decisions had a margin that rounding cannot close"
    if len(odd):
        text += f", the first at sample {int(odd[0])}"
    return Measured(float(len(odd)), "fail" if len(odd) else "pass", 0.0, text)


def measure_accuracy_drop(reference: Array, candidate: Array, context: Context) -> Measured | None:
    """Accuracy of the reference minus that of the candidate, paired; judged only where a margin is claimed."""
    classes = _classes(reference, candidate)
    if classes is None or context.labels is None:
        return None
    right = [found == context.labels for found in classes]
    lost, gained = int(np.sum(right[0] & ~right[1])), int(np.sum(~right[0] & right[1]))
    n, limits = len(context.labels), context.limits
    low, high = paired_drop_interval(lost, gained, n, limits.confidence)
    text = (
        f"accuracy {right[0].mean():.4f} became {right[1].mean():.4f} ({lost} lost, {gained} gained of {n}); "
        f"the drop is in [{low:.4f}, {high:.4f}] at {limits.confidence:.0%}"
    )
    verdict: Verdict = "info"
    if limits.margin is not None:
        verdict = "pass" if high <= limits.margin else "fail" if low > limits.margin else "inconclusive"
        if verdict == "inconclusive":
            text += _more_samples(samples_for_margin(lost, gained, n, limits.margin, limits.confidence))
    return Measured((lost - gained) / n, verdict, limits.margin, text)


def _more_samples(needed: int | None) -> str:
    if needed is None:
        return "; at this rate no number of samples supports the claim"
    return f"; about {needed} samples at this rate would support the claim"
