"""Large weights in a file instead of in memory: written once, mapped, and out of memory again when told.

A network of several gigabytes would else be held twice, as it was given and as it is exported. The file is in the
layout of ONNX's external data, so that what was folded into it is already where the exported model looks for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.artifacts import umask

LARGE = 1 << 30
"""Bytes of weights from which on a network is large: half of what one protobuf message can hold."""

ALIGNMENT = max(4096, mmap.ALLOCATIONGRANULARITY)
"""Of every weight in the file, so that it can be mapped."""

SMALLEST = 1 << 16
"""Bytes of a weight that is worth a place in a file."""


PARTIAL = ".weights.*.partial"
"""Pattern of the names of files that have no final name yet."""


def let_go(array: NDArray[Any]) -> None:
    """Takes the pages of an array that is mapped read-only out of this process's memory; they are read again on use."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


class WeightFile:
    """A file that grows by one weight at a time.

    Args:
        folder: where it lies, on a disk with room for it; the caller removes what is there after a crash.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: Path) -> None:
        prefix, suffix = PARTIAL.split("*")
        descriptor, name = tempfile.mkstemp(suffix, prefix, folder)
        os.close(descriptor)
        self.path = Path(name)
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._maps: list[mmap.mmap] = []

    def add(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same values out of the file; what is written to them stays in memory. Small arrays stay what they are.

        Raises:
            OSError: the disk is full.
        """
        if array.nbytes < SMALLEST:
            return array
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), array.nbytes, access=mmap.ACCESS_COPY, offset=start)
        self._end = start + array.nbytes
        self._maps.append(mapped)
        result = np.frombuffer(mapped, array.dtype, array.size).reshape(array.shape)
        self._places[result.ctypes.data] = (start, array.nbytes)
        return result

    def find(self, array: NDArray[Any]) -> tuple[int, int] | None:
        """(offset, length) in the file of an array that `add` gave, in bytes; None for any other."""
        place = self._places.get(array.ctypes.data)
        return place if place is not None and place[1] == array.nbytes and array.flags.c_contiguous else None

    def release(self) -> None:
        """Takes the mapped weights out of this process's memory; they are read again when they are needed."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def move_to(self, path: Path) -> None:
        """Makes it the file of that name, whole on the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(self.path, 0o666 & ~umask())
        os.replace(self.path, path)
        self.path = path

    def discard(self) -> None:
        """Removes the file; what is mapped stays readable."""
        with contextlib.suppress(OSError):
            self.path.unlink()
