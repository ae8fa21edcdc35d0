"""Where golden samples come from: a traced module in float64, or an ONNX file evaluated in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowprec.data import Samples, load_data
from lowprec.errors import DataError
from lowprec.export.feeds import Arrays, choose_samples
from lowprec.export.float64 import Float64Graph, Kind
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.parity import noise_floor
from lowprec.export.parity.floor import DRAWS
from lowprec.export.parity.storage import Storage
from lowprec.export.sketches import take_sketches
from lowprec.export.tensors import check_feeds, fixed_batch

if TYPE_CHECKING:
    from lowprec.export.folding import Traced

_BATCH = 64

MIN_SAMPLES = 16
MAX_WORK = 10**12
"""Multiply-adds spent on the floors of one network: a minute or so on two cores, at 10 to 20 per nanosecond."""


def golden_from_onnx(path: Path, data: str | Samples, storages: Collection[Storage]) -> Golden:
    """Truth and floors of an ONNX file on at most `MAX_SAMPLES` samples of the data."""
    graph = Float64Graph(load_onnx(path))
    samples = data if isinstance(data, Samples) else load_data(data)
    feeds, labels = choose_samples(samples, [spec.name for spec in graph.inputs])
    return golden_from(graph.run, graph, feeds, labels, storages)


def golden_from_trace(
    traced: Traced, graph: Float64Graph, feeds: Arrays, labels: NDArray[np.int64] | None, storages: Collection[Storage]
) -> Golden:
    """Truth from the traced, unfolded network; floors from `graph`, the network as it is emitted."""
    return golden_from(lambda block: run_traced(traced, block), graph, feeds, labels, storages)


def run_traced(traced: Traced, feeds: Arrays) -> Arrays:
    """Outputs of a traced, unfolded network in float64."""
    import torch

    batch = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in traced.input_names]
    outputs = traced.module.run_flat(batch)
    return {name: output.numpy() for name, output in zip(traced.output_names, outputs, strict=True)}


def golden_from(
    run: Callable[[Arrays], Arrays],
    graph: Float64Graph,
    feeds: Arrays,
    labels: NDArray[np.int64] | None,
    storages: Collection[Storage],
) -> Golden:
    """The golden samples of a network.

    Args:
        run: the network as it was, in float64: the truth, for a block of samples.
        graph: the network as it is emitted, which floors and sketches are taken of.
        feeds: samples along axis 0 of every input.
        labels: class per sample, or None.
        storages: what floors are wanted for.

    Raises:
        DataError: the feeds do not fit the network, or an output has no row per sample.
    """
    feeds, labels = _whole_batches(graph, feeds, labels)
    feeds, labels = _affordable(graph, feeds, labels, len(storages))
    total, size = len(next(iter(feeds.values()))), fixed_batch(graph.inputs) or _BATCH
    blocks = []
    for start in range(0, total, size):
        block = {name: array[start : start + size] for name, array in feeds.items()}
        blocks.append(run(block))
        _check_rows(blocks[-1], min(size, total - start))
    outputs = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return _with_floors(Golden(feeds, outputs, labels), graph, storages)


def _whole_batches(
    graph: Float64Graph, feeds: Arrays, labels: NDArray[np.int64] | None
) -> tuple[Arrays, NDArray[np.int64] | None]:
    """As many of the samples as make whole batches, where the network fixes their size."""
    lengths = {np.shape(array)[:1] for array in feeds.values()}
    if len(lengths) != 1 or lengths == {()}:
        found = ", ".join(f"{name} {np.shape(array)}" for name, array in feeds.items()) or "no input"
        raise DataError(f"axis 0 of every input is the sample, and these do not have equally many: {found}")
    total, size = lengths.pop()[0], fixed_batch(graph.inputs)
    count = total // size * size if size else total
    if not count:
        raise DataError(f"the model takes {size or 1} samples at a time, the data holds {total}; give more")
    check_feeds(graph.inputs, {name: array[: size or count] for name, array in feeds.items()})
    return {name: array[:count] for name, array in feeds.items()}, None if labels is None else labels[:count]


def _check_rows(outputs: Arrays, samples: int) -> None:
    for name, array in outputs.items():
        if array.shape[:1] != (samples,):
            raise DataError(
                f"the output {name!r} has shape {array.shape} for {samples} samples; "
                "only outputs with one row per sample can be compared"
            )


def _with_floors(golden: Golden, graph: Float64Graph, storages: Collection[Storage]) -> Golden:
    floors = {storage.name: noise_floor(graph, golden.inputs, storage) for storage in storages}
    sketches = take_sketches(graph, golden.inputs, storages)
    return Golden(golden.inputs, golden.outputs, golden.labels, floors, sketches)


def _affordable(
    graph: Float64Graph, feeds: Arrays, labels: NDArray[np.int64] | None, storages: int
) -> tuple[Arrays, NDArray[np.int64] | None]:
    """The samples that truth and floors are taken on: all, or the first that `MAX_WORK` pays for.

    Work is counted, not timed, so that the same model and data give the same golden file everywhere.
    """
    work = 0

    def add_work(name: str, kind: Kind, value: NDArray[Any], terms: int) -> NDArray[Any]:
        nonlocal work
        work += value.size * max(terms, 1) if kind == "node" else 0
        return value

    size = fixed_batch(graph.inputs) or 1
    graph.run({name: array[:size] for name, array in feeds.items()}, add_work)
    affordable = size * MAX_WORK // max(1, work * storages * (DRAWS + 1))
    count = -(-max(MIN_SAMPLES, affordable) // size) * size
    return {name: array[:count] for name, array in feeds.items()}, None if labels is None else labels[:count]
