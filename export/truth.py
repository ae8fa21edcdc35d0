"""Where golden samples come from: a traced module in float64, or an ONNX file evaluated in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowprec.data import Samples, load_data
from lowprec.errors import DataError
from lowprec.export.float64 import Float64Graph, Kind
from lowprec.export.golden import MAX_SAMPLES, Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.parity import noise_floor
from lowprec.export.parity.floor import DRAWS
from lowprec.export.sketches import take_sketches
from lowprec.export.tensors import check_feeds
from lowprec.formats import format_named

if TYPE_CHECKING:
    from lowprec.export.folding import Traced

Arrays = dict[str, NDArray[Any]]
_BATCH = 64
_SEED = 0

MIN_SAMPLES = 16
MAX_WORK = 10**12
"""Multiply-adds spent on the floors of one network: a minute or so on two cores, at 10 to 20 per nanosecond."""


def golden_from_onnx(path: Path, data: str | Samples, precisions: Collection[str]) -> Golden:
    """Truth and floors of an ONNX file on at most `MAX_SAMPLES` samples of the data."""
    graph = Float64Graph(load_onnx(path))
    samples = data if isinstance(data, Samples) else load_data(data)
    feeds, labels = choose_samples(samples, [spec.name for spec in graph.inputs])
    feeds = check_feeds(graph.inputs, feeds)
    feeds, labels = _affordable(graph, feeds, labels, len(precisions))
    blocks = [
        graph.run({name: a[start : start + _BATCH] for name, a in feeds.items()})
        for start in range(0, len(next(iter(feeds.values()))), _BATCH)
    ]
    outputs = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return _with_floors(Golden(feeds, outputs, labels), graph, precisions)


def golden_from_trace(
    traced: Traced, graph: Float64Graph, feeds: Arrays, labels: NDArray[np.int64] | None, precisions: Collection[str]
) -> Golden:
    """Truth from the traced, unfolded network; floors from `graph`, the network as it is emitted.

    Raises:
        DataError: the feeds do not fit the network.
    """
    import torch

    feeds = check_feeds(graph.inputs, feeds)
    feeds, labels = _affordable(graph, feeds, labels, len(precisions))
    parts: list[Sequence[torch.Tensor]] = []
    total = len(next(iter(feeds.values())))
    with torch.no_grad():
        for start in range(0, total, _BATCH):
            batch = [
                torch.from_numpy(np.ascontiguousarray(feeds[n][start : start + _BATCH])) for n in traced.input_names
            ]
            parts.append(traced.module.run_flat(batch))
    columns = zip(*parts, strict=True)
    outputs = {n: torch.cat(list(c)).numpy() for n, c in zip(traced.output_names, columns, strict=True)}
    return _with_floors(Golden(feeds, outputs, labels), graph, precisions)


def _with_floors(golden: Golden, graph: Float64Graph, precisions: Collection[str]) -> Golden:
    floors = {p: noise_floor(graph, golden.inputs, format_named(p)) for p in sorted(precisions)}
    sketches = take_sketches(graph, golden.inputs, precisions)
    return Golden(golden.inputs, golden.outputs, golden.labels, floors, sketches)


def _affordable(
    graph: Float64Graph, feeds: Arrays, labels: NDArray[np.int64] | None, precisions: int
) -> tuple[Arrays, NDArray[np.int64] | None]:
    """The samples that truth and floors are taken on: all, or the first that `MAX_WORK` pays for.

    Work is counted, not timed, so that the same model and data give the same golden file everywhere.
    """
    work = 0

    def add_work(name: str, kind: Kind, value: NDArray[Any], terms: int) -> NDArray[Any]:
        nonlocal work
        work += value.size * max(terms, 1) if kind == "node" else 0
        return value

    graph.run({name: array[:1] for name, array in feeds.items()}, add_work)
    affordable = MAX_WORK // max(1, work * precisions * (DRAWS + 1))
    count = max(MIN_SAMPLES, affordable)
    return {name: array[:count] for name, array in feeds.items()}, None if labels is None else labels[:count]


def choose_samples(samples: Samples, names: Sequence[str]) -> tuple[Arrays, NDArray[np.int64] | None]:
    """At most `MAX_SAMPLES` of the samples, drawn once with a fixed seed and kept in their order."""
    total = len(samples)
    chosen = np.sort(np.random.default_rng(_SEED).permutation(total)[:MAX_SAMPLES])
    feeds = {name: value[chosen] for name, value in samples.feeds(list(names), 0, total).items()}
    return feeds, None if samples.labels is None else samples.labels[chosen]


def collect_batches(batches: Iterable[Any], names: Sequence[str]) -> tuple[Arrays, NDArray[np.int64] | None]:
    """The first `MAX_SAMPLES` samples of an iterable of batches: tensors, tuples of inputs, or (inputs, labels)."""
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    labels: list[NDArray[Any]] = []
    count = 0
    for batch in batches:
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
        arrays = [np.asarray(part) for part in parts]
        if len(arrays) == len(names) + 1 and arrays[-1].ndim == 1 and arrays[-1].dtype.kind in "iu":
            labels.append(arrays.pop())
        if len(arrays) != len(names):
            raise DataError(f"a batch holds {len(arrays)} arrays; the model takes {len(names)}: {', '.join(names)}")
        for name, array in zip(names, arrays, strict=True):
            columns[name].append(array)
        count += len(arrays[0])
        if count >= MAX_SAMPLES:
            break
    if not count:
        raise DataError("the calibration data is empty; give at least one batch")
    feeds = {name: np.concatenate(parts)[:MAX_SAMPLES] for name, parts in columns.items()}
    return feeds, np.concatenate(labels)[:MAX_SAMPLES].astype(np.int64) if labels else None
