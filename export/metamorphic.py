"""Checks that need no reference: what must be equal when the same network is asked in another way.

Run twice: the same bits. A sample alone, in a batch of every other size, or beside others: the same answer, up to the
rounding noise of the precision, since another batch may choose another kernel. One sample in every row: the same
answer in every row. They find kernels that race, that read beyond their row, and batches that leak into one another.
Source: metamorphic testing, Chen, Cheung, Yiu, 1998.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.export.backends import Session
from lowprec.export.golden import Golden
from lowprec.export.parity import Check, Limits
from lowprec.export.parity.floor import deviation, rms
from lowprec.export.stages import run_batched

Arrays = dict[str, NDArray[Any]]

_ROWS = 16  # samples looked at, fewer where a batch holds fewer


def metamorphic_checks(session: Session, golden: Golden, precision: str, limits: Limits) -> tuple[Check, ...]:
    """Asks a session the same in other ways.

    Args:
        session: an opened artefact.
        golden: samples, and the noise floor of each output at the precision.
        precision: that the artefact stores values in.
        limits: the bands; deviations are in multiples of the floor.
    """
    rows = session.batch_near(golden.inputs, min(golden.samples, _ROWS))
    taken = np.arange(rows) % golden.samples
    feeds = {name: array[taken] for name, array in golden.inputs.items()}
    floors = {name: array[taken] for name, array in golden.floors[precision].rms.items()}
    whole = session.run(feeds)
    checks = [_twice(whole, session.run(feeds))]
    sizes = _sizes(session, feeds, rows)
    if sizes != [rows]:
        figures = {size: _deviation(whole, run_batched(session, feeds, size, fill=True), floors) for size in sizes}
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


def _sizes(session: Session, feeds: Arrays, rows: int) -> list[int]:
    """Batches to ask in: one sample, two, half and all of the rows, and the ends of what the session is built for."""
    ranges = session.batches(feeds)
    inner = {size for size in (1, 2, rows // 2, rows) if any(size in sizes for sizes in ranges)}
    return sorted(inner | {end for sizes in ranges for end in (sizes[0], sizes[-1]) if sizes[-1] < sys.maxsize - 1})


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
