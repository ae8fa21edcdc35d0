"""Samples for a network: chosen from data, or collected from the batches that a caller gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.data import Samples
from lowprec.errors import DataError
from lowprec.export.golden import MAX_SAMPLES

Arrays = dict[str, NDArray[Any]]
_SEED = 0


@dataclass(frozen=True, eq=False)
class Feeds:
    """Samples for a network, and where they are from.

    Args:
        inputs: by input name, samples along axis 0.
        labels: class per sample, or None.
        source: in words, for the manifest.
    """

    inputs: Arrays
    labels: NDArray[np.int64] | None
    source: str


def feeds_from(data: Samples | Iterable[Any], names: list[str]) -> Feeds:
    """The samples that a caller gave."""
    if isinstance(data, Samples):
        return Feeds(*choose_samples(data, names), data.source)
    return Feeds(*collect_batches(data, names), "batches given by the caller")


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
