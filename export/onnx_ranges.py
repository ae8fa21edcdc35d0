"""Ranges of every tensor of an ONNX graph on data, for calibration.json where there is no module to hook.

In float64, as the truth is: what a value needs of a format does not depend on how it was rounded on the way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.calibration.record import Calibration, range_summary
from lowprec.export.feeds import Arrays
from lowprec.export.float64 import Float64Graph, Kind
from lowprec.export.folding.algebra import blocks_of
from lowprec.export.folding.from_onnx.edits import names_read
from lowprec.export.tensors import fixed_batch
from lowprec.formats import FP16

_BATCH = 64


@dataclass
class _Range:
    """Extremes and counts of the finite values of a tensor, streamed."""

    count: int = 0
    low: float = np.inf
    high: float = -np.inf
    zeros: int = 0
    subnormal: int = 0
    squares: float = 0.0

    def add(self, value: NDArray[np.float64]) -> None:
        for block in blocks_of(value):
            self._add(block)

    def _add(self, value: NDArray[np.float64]) -> None:
        finite = value[np.isfinite(value)]
        if not finite.size:
            return
        magnitude = np.abs(finite)
        self.count += finite.size
        self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        self.zeros += int((finite == 0).sum())
        self.subnormal += int(((magnitude > 0) & (magnitude < FP16.min_normal)).sum())
        self.squares += float(np.square(finite).sum())

    def summary(self) -> dict[str, Any]:
        return range_summary(self.count, self.low, self.high, self.zeros, self.subnormal, self.squares)


def graph_ranges(model: onnx.ModelProto, graph: Float64Graph, feeds: Arrays) -> Calibration:
    """Ranges of inputs, weights, and what nodes make of the inputs, under the names of the tensors.

    Infinities are left out: masks are full of them.

    Args:
        model: the model.
        graph: the same for evaluation.
        feeds: samples along axis 0.
    """
    found: dict[Kind, dict[str, _Range]] = {"input": {}, "node": {}, "weight": {}}
    computed = _computed(model)
    first = True

    def visit(name: str, kind: Kind, value: NDArray[Any], terms: int) -> NDArray[Any]:
        wanted = first if kind == "weight" else kind == "input" or name in computed
        if wanted and value.dtype == np.float64:
            found[kind].setdefault(name, _Range()).add(value)
        return value

    total, size = len(next(iter(feeds.values()))), fixed_batch(graph.inputs) or _BATCH
    starts = range(0, total, size)
    for start in starts:
        graph.run({name: array[start : start + size] for name, array in feeds.items()}, visit)
        first = False
    summaries = {kind: {n: r.summary() for n, r in ranges.items() if r.count} for kind, ranges in found.items()}
    data = {"sha256": _fingerprint(feeds), "batches": len(starts), "samples": total}
    return Calibration(summaries["input"], summaries["node"], summaries["weight"], data)


def _computed(model: onnx.ModelProto) -> set[str]:
    """Values that depend on the inputs."""
    found = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if any(name in found for name in names_read(node)):
            found |= set(node.output)
    return found


def _fingerprint(feeds: Arrays) -> str:
    digest = hashlib.sha256()
    for array in feeds.values():
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
