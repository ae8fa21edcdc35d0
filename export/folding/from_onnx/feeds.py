"""Inputs to run an ONNX model on: a caller's own, or random ones drawn from what the model says of its inputs.

A free first axis is the batch; other free axes have one length that is found by trying, since a model that halves an
image five times says nowhere that it needs 32 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import DataError, UnsupportedError
from lowprec.export.float64 import Float64Graph, Watch
from lowprec.export.folding.accuracy import samples_to_measure
from lowprec.export.tensors import TensorSpec, fixed_batch

Feeds = Mapping[str, NDArray[Any]]

# The batch of the example: what holds for 2 samples holds for more, which 1 would not show.
_BATCH = 2
_LENGTHS = (32, 64, 224, 16, 8, 4, 3, 2, 1)
_SEED = 0


def run_on_example(graph: Float64Graph, feeds: Feeds | None, watch: Watch) -> dict[str, NDArray[Any]]:
    """Runs a graph on two samples, or as many as it fixes, and returns these.

    Args:
        graph: the model.
        feeds: real inputs, of which the first samples are taken; random ones when None.
        watch: gets every value.

    Raises:
        DataError: the feeds do not fit the model.
        UnsupportedError: the graph cannot be evaluated, or not on random inputs of any length that was tried.
    """
    batch = fixed_batch(graph.inputs) or _BATCH
    if feeds is not None:
        example = _taken(graph.inputs, feeds, np.arange(batch))
        graph.run(example, watch=watch)
        return example
    free = any(not isinstance(length, int) for spec in graph.inputs for length in (spec.shape or ())[1:])
    failure = None
    for length in _LENGTHS if free else _LENGTHS[:1]:
        example = random_feeds(graph.inputs, batch, length)
        try:
            graph.run(example, watch=watch)
        except UnsupportedError as error:
            failure = failure or error
        else:
            return example
    assert failure is not None
    raise UnsupportedError(f"{failure} (on random inputs; give real ones, on the command line with --calibration)")


def batches_to_measure(graph: Float64Graph, example: Feeds, feeds: Feeds | None) -> list[dict[str, NDArray[Any]]]:
    """What a folded model is measured on: a batch of another length than the example's, or several where it is fixed.

    Args:
        graph: the model.
        example: what `run_on_example` returned.
        feeds: real inputs; random ones when None.
    """
    per_sample = sum(example[spec.name][:1].size for spec in graph.inputs if _has_batch(graph.inputs, spec.name))
    count, fixed = samples_to_measure(per_sample), fixed_batch(graph.inputs)
    if feeds is None:
        shapes = {name: array.shape for name, array in example.items()}
        batches = max(1, count // fixed) if fixed else 1
        return [_random(graph.inputs, shapes, fixed or count, seed + 1) for seed in range(batches)]
    total = min((len(array) for name, array in feeds.items() if _has_batch(graph.inputs, name)), default=1)
    if fixed is None:
        return [_taken(graph.inputs, feeds, np.arange(max(_BATCH + 1, min(count, total))))]
    starts = range(0, max(min(count, total) // fixed, 1) * fixed, fixed)
    return [_taken(graph.inputs, feeds, np.arange(start, start + fixed)) for start in starts]


def _taken(specs: Sequence[TensorSpec], feeds: Feeds, which: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Some of the samples, from the start again where there are not so many."""
    return {
        name: array[which % len(array)] if _has_batch(specs, name) and array.ndim and len(array) else array
        for name, array in feeds.items()
    }


def random_samples(graph: Float64Graph, count: int) -> dict[str, NDArray[Any]]:
    """About so many random samples of a length that a graph runs on; whole batches where it fixes their size."""
    example = run_on_example(graph, None, lambda name, value: None)
    fixed = fixed_batch(graph.inputs)
    total = max(1, count // fixed) * fixed if fixed else count
    return _random(graph.inputs, {name: array.shape for name, array in example.items()}, total, _SEED)


def random_feeds(specs: Sequence[TensorSpec], batch: int, length: int, seed: int = _SEED) -> dict[str, NDArray[Any]]:
    """Standard normal floats; integers that may be indices or flags, so 0 or 1.

    Args:
        specs: the model's inputs.
        batch: length of free first axes, and of others of the same name.
        length: of other free axes.
        seed: of the values.

    Raises:
        UnsupportedError: an input says nothing about its shape.
    """
    unknown = [spec.name for spec in specs if spec.shape is None]
    if unknown:
        raise UnsupportedError(
            f"the model says nothing about the shape of its input {unknown[0]!r}, so none can be drawn; "
            f"give real inputs, on the command line with --calibration"
        )
    shapes = {
        spec.name: tuple(size if isinstance(size, int) else length for size in spec.shape or ()) for spec in specs
    }
    return _random(specs, shapes, batch, seed)


def _random(
    specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], batch: int, seed: int
) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(seed)
    names = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    feeds: dict[str, NDArray[Any]] = {}
    for spec in specs:
        leads = _has_batch(specs, spec.name)
        free = [axis for axis, size in enumerate(spec.shape or ()) if size in names or (axis == 0 and leads)]
        shape = tuple(batch if axis in free else size for axis, size in enumerate(shapes[spec.name]))
        if spec.is_float:
            feeds[spec.name] = generator.standard_normal(shape).astype(np.float32)
        elif np.dtype(spec.dtype).kind not in "iub":
            raise DataError(f"the input {spec.name!r} holds {spec.dtype}; only numbers can be drawn: give real inputs")
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def _has_batch(specs: Sequence[TensorSpec], name: str) -> bool:
    """Whether axis 0 of an input is the sample: it is free, or all inputs fix the same."""
    spec = next((spec for spec in specs if spec.name == name), None)
    return spec is not None and (spec.batch_axis == 0 or fixed_batch(specs) is not None)
