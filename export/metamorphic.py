"""Checks that need no reference: what must be equal when the same network is asked in another way.

Run twice: the same bits. A sample alone, in a batch of every other size, or beside others: the same answer, up to the
rounding noise of the precision, since another batch may choose another kernel. One sample in every row: the same
answer in every row. They find kernels that race, that read beyond their row, and batches that leak into one another.
Source: metamorphic testing, Chen, Cheung, Yiu, 1998.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.export.backends import Session
from lowprec.export.golden import Golden
from lowprec.export.parity import Check, Limits
from lowprec.export.parity.floor import deviation, rms
from lowprec.export.tensors import fixed_batch

Arrays = dict[str, NDArray[Any]]

_ROWS = 16  # samples looked at, fewer where a batch holds fewer


def metamorphic_checks(
    session: Session, golden: Golden, precision: str, limits: Limits, largest: int | None = None
) -> tuple[Check, ...]:
    """Asks a session the same in other ways.

    Args:
        session: an opened artefact.
        golden: samples, and the noise floor of each output at the precision.
        precision: that the artefact stores values in.
        limits: the bands; deviations are in multiples of the floor.
        largest: the largest batch that the session takes; None for any.
    """
    fixed = fixed_batch(session.inputs)
    rows = fixed or min(golden.samples, _ROWS, largest or _ROWS)
    feeds = {name: array[:rows] for name, array in golden.inputs.items()}
    floors = {name: array[:rows] for name, array in golden.floors[precision].rms.items()}
    whole = session.run(feeds)
    checks = [_twice(whole, session.run(feeds))]
    if fixed is None:
        sizes = sorted({1, 2, max(rows // 2, 1), largest or rows})
        figures = {size: _deviation(whole, _in_batches(session, feeds, size, rows), floors) for size in sizes}
        checks.append(_judged("batch", figures, limits, "batches of"))
    repeated = {
        row: session.run({name: np.repeat(array[row : row + 1], rows, 0) for name, array in feeds.items()})
        for row in (0, rows - 1)
    }
    figures = {row: _spread(values, floors, row) for row, values in repeated.items()}
    checks.append(_judged("rows", figures, limits, "every row holding sample"))
    return tuple(checks)


def _twice(first: Arrays, second: Arrays) -> Check:
    differing = sum(int(np.sum(_bits(first[name]) != _bits(second[name]))) for name in first)
    text = (
        "run twice, the same bits" if not differing else f"run twice, {differing} bytes differ: it is not deterministic"
    )
    return Check("twice", "fail" if differing else "pass", float(differing), 0.0, text)


def _bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _in_batches(session: Session, feeds: Arrays, size: int, rows: int) -> Arrays:
    """Outputs of the rows, computed `size` at a time; a batch beyond the rows is filled with copies of the last one."""
    parts = []
    for start in range(0, rows, size):
        taken = np.minimum(np.arange(start, start + size), rows - 1)
        parts.append(session.run({name: array[taken] for name, array in feeds.items()}))
    return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}


def _deviation(expected: Arrays, found: Arrays, floors: Mapping[str, NDArray[np.float64]]) -> float:
    """Largest deviation of the outputs, rms over the rows, in multiples of their floor; infinite where only one of both
    is finite.
    """
    figures = []
    for name, value in expected.items():
        off = deviation(value, found[name])
        if value.dtype.kind == "f" and not np.array_equal(np.isfinite(value), np.isfinite(found[name])):
            return float("inf")
        size, floor = rms(np.nan_to_num(off)), rms(floors.get(name, np.zeros(1)))
        figures.append(0.0 if size == 0 else size / floor if floor > 0 else float("inf"))
    return max(figures, default=0.0)


def _spread(values: Arrays, floors: Mapping[str, NDArray[np.float64]], row: int) -> float:
    """How far the rows of a batch of one sample are from its first row, in multiples of that sample's floor."""
    first = {name: np.repeat(array[:1], len(array), 0) for name, array in values.items()}
    own = {name: floor[row : row + 1] for name, floor in floors.items()}
    return _deviation(first, values, own)


def _judged(name: str, figures: Mapping[int, float], limits: Limits, words: str) -> Check:
    where = max(figures, key=lambda key: figures[key])
    value = figures[where]
    text = f"{words} {where} change the answer by {value:.2g} times the rounding noise"
    return Check(name, limits.band(value), value, limits.fail, text)
