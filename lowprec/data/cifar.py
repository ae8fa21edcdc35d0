"""CIFAR-10 and CIFAR-100 from a folder that is on disk already; nothing is downloaded.

The binary version is plain bytes. The python version is pickled, so torchvision reads it, which checks the published
MD5 sum of every file before it unpickles one; without torchvision it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.data.samples import Samples, listed
from lowprec.errors import DataError, MissingDependencyError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """One form in which CIFAR is published.

    Args:
        title: of the data and the version.
        folder: the name that the published archive gives its folder.
        train: files of the training part.
        test: files of the test part.
        names: the file with the names of the classes.
        classes: of each label byte before the pixels of a record; the last byte is the label. Empty if pickled.
        reader: the class of torchvision that reads it if it is pickled.
    """

    title: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    classes: tuple[int, ...] = ()
    reader: str = ""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout(
        "CIFAR-10 binary",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        classes=(10,),
    ),
    Layout(
        "CIFAR-100 binary",
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        classes=(20, 100),
    ),
    Layout("CIFAR-10 python", "cifar-10-batches-py", _BATCHES, ("test_batch",), "batches.meta", reader="CIFAR10"),
    Layout("CIFAR-100 python", "cifar-100-python", ("train",), ("test",), "meta", reader="CIFAR100"),
)


def find_cifar(folder: Path, what: str) -> tuple[Path, Layout] | None:
    """Where in `folder` CIFAR is, and in which layout: there, or in a sub-folder under its published name.

    Two of a layout's files are enough, so that an incomplete copy is told as such. Raises `DataError` if there are
    several.
    """
    found = [
        (place, layout)
        for layout in LAYOUTS
        for place in (folder, folder / layout.folder)
        if sum((place / name).is_file() for name in (*layout.train, *layout.test, layout.names)) >= 2
    ]
    if len(found) > 1:
        places = listed([f"{place} ({layout.title})" for place, layout in found])
        raise DataError(f"{what} {folder} holds CIFAR more than once: {places}; give the folder of one")
    return found[0] if found else None


def load_cifar(folder: Path, layout: Layout, what: str) -> Samples:
    """Both parts, the training part first: float32 (N, 3, 32, 32), 0 to 1; CIFAR-100 by its 100 fine labels."""
    missing = [name for name in (*layout.train, *layout.test) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{what} {folder} is {layout.title} without {listed(missing)}; unpack the whole archive again")
    read = _read_pickled if layout.reader else _read_binary
    (train, train_labels), (test, test_labels) = read(folder, layout, what)
    x_NCHW = np.concatenate([train, test]).astype(np.float32)
    x_NCHW /= np.float32(255)
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    held_out = np.repeat([False, True], [len(train_labels), len(test_labels)])
    return Samples.of({None: x_NCHW}, labels, str(folder), held_out)


_Part = tuple[NDArray[np.uint8], NDArray[Any]]
"""Pixels (N, 3, 32, 32) and labels (N,)."""


def _read_binary(folder: Path, layout: Layout, what: str) -> list[_Part]:
    parts = []
    for names in (layout.train, layout.test):
        records = np.concatenate([_records(folder / name, layout, what) for name in names])
        label_bytes = len(layout.classes)
        parts.append((records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]))
    return parts


def _records(path: Path, layout: Layout, what: str) -> NDArray[np.uint8]:
    """The records of one file, uint8 (N, label bytes + pixels)."""
    size = len(layout.classes) + _PIXELS
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    if len(content) == 0 or len(content) % size:
        raise DataError(
            f"{what} {path} has {len(content)} bytes, {layout.title} has records of {size}; "
            "it is truncated or something else: unpack the archive again"
        )
    records = content.reshape(-1, size)
    labels = records[:, : len(layout.classes)]
    wrong = np.flatnonzero((labels >= layout.classes).any(axis=1))
    if len(wrong):
        raise DataError(
            f"{what} {path}: record {wrong[0]} has the label {listed([str(n) for n in labels[wrong[0]]])}, "
            f"{layout.title} has {listed([str(n) for n in layout.classes])} classes; unpack the archive again"
        )
    return records


def _read_pickled(folder: Path, layout: Layout, what: str) -> list[_Part]:
    reader = getattr(_torchvision_datasets(folder, layout, what), layout.reader)
    place = folder.resolve()
    if place.name != layout.folder:
        raise DataError(f"{what} {folder}: torchvision reads {layout.title} from {layout.folder} only; rename it so")
    try:
        parts = [reader(str(place.parent), train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise DataError(
            f"{what} {folder}: a file is missing or has another MD5 sum than published, and such a file is never "
            "unpickled; unpack the archive again, or take the binary version"
        ) from None
    return [(np.asarray(part.data, np.uint8).transpose(0, 3, 1, 2), np.asarray(part.targets)) for part in parts]


def _torchvision_datasets(folder: Path, layout: Layout, what: str) -> Any:
    asked = f"{what} {folder} is {layout.title}, which is pickled, and only torchvision reads it"
    binary = "the binary version of CIFAR needs nothing"
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingDependencyError(f"{asked}: pip install 'lowprec[data]'; {binary}") from None
    except (RuntimeError, AttributeError, OSError) as error:  # built for another torch
        reason = " ".join(str(error).split())
        raise MissingDependencyError(
            f"{asked}, and it cannot be imported here ({reason}): pip install 'lowprec[data]'; {binary}"
        ) from None
    return datasets
