"""Judges a candidate's outputs against the reference's: one loop over outputs and metrics, for every stage alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowprec.errors import DataError
from lowprec.export.parity.floor import Array, Floor
from lowprec.export.parity.measured import Context
from lowprec.export.parity.metrics import METRICS
from lowprec.export.parity.verdicts import Check, Limits


def judge(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    floor: Floor,
    labels: Array | None = None,
    limits: Limits | None = None,
) -> list[Check]:
    """Runs every metric that applies on every output.

    Args:
        reference: float64 outputs by name.
        candidate: outputs by name, of any floating type. A single output is matched whatever its name.
        floor: rounding noise of each reference output, of its shape.
        labels: true class per sample, shape (N,), or None.
        limits: what figures are held against; `Limits()` when None.

    Returns:
        One check per metric and output, in table order. An output without elements is one inconclusive check.

    Raises:
        DataError: names, shapes or kinds of number differ, or the floor or the labels belong to other samples.
    """
    matched = match_outputs(reference, candidate)
    checks: list[Check] = []
    for name, (wanted, found) in matched.items():
        if name not in floor.rms or floor.rms[name].shape != wanted.shape:
            raise DataError(
                f"the noise floor was not measured on these samples of the output {name!r}; measure it anew"
            )
        if wanted.size == 0:
            checks.append(Check(f"rho:{name}", "inconclusive", None, None, "the output has no elements to compare"))
            continue
        here = _labels_for(labels, wanted)
        context = Context(floor.rms[name], floor.storage, limits or Limits(), here)
        for metric in METRICS.values():
            measured = metric.measure(wanted, found, context)
            if measured is not None:
                text = f"{name}: {measured.text}"
                figures = (measured.verdict, measured.value, measured.limit)
                checks.append(Check(f"{metric.name}:{name}", *figures, text, measured.interval))
    return checks


def match_outputs(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Pairs of arrays by the reference's names. Raises `DataError` where they cannot be paired or differ in shape."""
    if not reference:
        raise DataError("the reference has no outputs, so there is nothing to compare")
    if set(reference) != set(candidate):
        if len(reference) != 1 or len(candidate) != 1:
            raise DataError(
                f"the outputs differ: the reference has {', '.join(reference)}, "
                f"the candidate {', '.join(candidate) or 'none'}; rename them to match"
            )
        candidate = dict(zip(reference, candidate.values(), strict=True))
    pairs = {name: (np.asarray(reference[name]), np.asarray(candidate[name])) for name in reference}
    for name, (wanted, found) in pairs.items():
        if wanted.shape != found.shape:
            raise DataError(f"the output {name!r} has shape {found.shape} where the reference has {wanted.shape}")
        if (wanted.dtype.kind == "f") != (found.dtype.kind == "f"):
            raise DataError(f"the output {name!r} holds {found.dtype} where the reference holds {wanted.dtype}")
    return pairs


def _labels_for(labels: Array | None, output: Array) -> Array | None:
    """The labels as an array, for an output with one row of class scores per sample; None for other outputs."""
    if labels is None or output.ndim != 2:
        return None
    found = np.asarray(labels)
    if found.shape != output.shape[:1] or found.dtype.kind not in "iu":
        raise DataError(
            f"the labels have shape {found.shape} and type {found.dtype}; "
            f"needed is one whole number for each of the {output.shape[0]} samples"
        )
    if found.size and (found.min() < 0 or found.max() >= output.shape[1]):
        raise DataError(f"the labels run from {found.min()} to {found.max()}; the model has {output.shape[1]} classes")
    return found
