"""`Samples`: arrays in memory, where they came from, and which of them their source holds out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import DataError


@dataclass(frozen=True, eq=False)
class Samples:
    """Arrays whose first axis is the sample.

    Args:
        inputs: by name of the model input; the key is None where the array has no name and matches a single input.
        labels: int64 (N,), or None.
        source: where they came from, for messages and provenance.
        fingerprint: SHA-256 over names, types, shapes and bytes of inputs and labels, lowercase hex.
        held_out: bool (N,), which samples the source itself sets apart for testing; None where it says nothing.
    """

    inputs: dict[str | None, NDArray[Any]]
    labels: NDArray[np.int64] | None
    source: str
    fingerprint: str
    held_out: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        inputs: dict[str | None, NDArray[Any]],
        labels: NDArray[np.int64] | None,
        source: str,
        held_out: NDArray[np.bool_] | None = None,
    ) -> Samples:
        """Builds one and computes its fingerprint."""
        return cls(inputs, labels, source, _fingerprint(inputs, labels), held_out)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def feeds(self, input_names: Sequence[str], start: int = 0, stop: int | None = None) -> dict[str, NDArray[Any]]:
        """Samples `start:stop` under the names of a model's inputs.

        Args:
            input_names: all inputs of the model.
            start: first sample.
            stop: one past the last sample; None is the end.

        Raises:
            DataError: an input has no array, or an array no input.
        """
        if list(self.inputs) == [None]:
            if len(input_names) != 1:
                raise DataError(
                    f"{self.source} holds one unnamed array, the model has inputs {', '.join(input_names)}; "
                    "give an .npz whose arrays bear these names"
                )
            return {input_names[0]: self.inputs[None][start:stop]}
        names = [str(name) for name in self.inputs]
        for wanted in input_names:
            if wanted not in names:
                raise DataError(
                    f"{self.source} has no array for the model's input {wanted!r}; it holds {listed(names)}"
                )
        for name in names:
            if name not in input_names:
                raise DataError(
                    f"{self.source}: the array {name!r} is neither an input of the model ({listed(input_names)}) "
                    "nor 'labels'; rename or drop it"
                )
        return {name: self.inputs[name][start:stop] for name in input_names}

    def take(self, n: int) -> Samples:
        """The first `n` samples (all of them if there are fewer)."""
        return self.subset(np.arange(min(n, len(self))))

    def subset(self, index: NDArray[np.int64]) -> Samples:
        """The samples at `index`, in that order."""
        inputs = {name: array[index] for name, array in self.inputs.items()}
        labels = None if self.labels is None else self.labels[index]
        return Samples.of(inputs, labels, self.source, None if self.held_out is None else self.held_out[index])


def check_array(array: NDArray[Any], name: str) -> None:
    """Raises `DataError` unless the array holds finite numbers along an axis of samples; `name` is for the message."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} is of type {array.dtype}; give numbers")
    if array.ndim == 0:
        raise DataError(f"{name} is a single number; the first axis must be the sample")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise DataError(f"{name} is not finite, first in sample {bad}")


def listed(names: Sequence[str]) -> str:
    """The names, for a message."""
    return ", ".join(names)


def _fingerprint(inputs: dict[str | None, NDArray[Any]], labels: NDArray[np.int64] | None) -> str:
    digest = hashlib.sha256()
    entries = [("" if name is None else f"input:{name}", array) for name, array in inputs.items()]
    if labels is not None:
        entries.append(("labels", labels))
    for name, array in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
