"""Samples from `digits`, an .npz or a folder of images, in numpy alone.

One loader serves training, export and verification, so that all three see the same samples in the same order and agree
on what was held out. It imports neither torch nor a data framework: `lowprec verify` must read data on a machine that
has onnxruntime and nothing else. The hold-out is drawn from the raw stream of a bit generator, which numpy keeps the
same from version to version (`Generator.permutation` carries no such promise); a split that moved with a numpy upgrade
would leak test samples into training. Everything is held in memory; streaming formats are another loader's work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lowprec.artifacts import read_npz
from lowprec.errors import ArtifactError, ConfigError, DataError, MissingDependencyError

Split = Literal["all", "train", "test"]

TEST_FRACTION = 0.2
_SPLIT_SEED = 0
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_IGNORED_FILES = ("thumbs.db", "desktop.ini")
_GREY_MODES = ("1", "L", "LA")
_WIDE_MODES = ("I", "F")  # 16- and 32-bit grey: their range is not stated in the file


@dataclass(frozen=True, eq=False)
class Samples:
    """Arrays whose first axis is the sample.

    Args:
        inputs: by name of the model input; the key is None where the array has no name and matches a single input.
        labels: int64 (N,), or None.
        source: where they came from, for messages and provenance.
        fingerprint: SHA-256 over names, types, shapes and bytes, lowercase hex.
    """

    inputs: dict[str | None, NDArray[Any]]
    labels: NDArray[np.int64] | None
    source: str
    fingerprint: str

    @classmethod
    def of(cls, inputs: dict[str | None, NDArray[Any]], labels: NDArray[np.int64] | None, source: str) -> Samples:
        """Builds one and computes its fingerprint."""
        return cls(inputs, labels, source, _fingerprint(inputs, labels))

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
                raise DataError(f"{self.source} has no array for the model's input {wanted!r}; it holds {_list(names)}")
        for name in names:
            if name not in input_names:
                raise DataError(
                    f"{self.source}: the array {name!r} is neither an input of the model ({_list(input_names)}) "
                    "nor 'labels'; rename or drop it"
                )
        return {name: self.inputs[name][start:stop] for name in input_names}

    def take(self, n: int) -> Samples:
        """The first `n` samples (all of them if there are fewer)."""
        return self.subset(np.arange(min(n, len(self))))

    def subset(self, index: NDArray[np.int64]) -> Samples:
        """The samples at `index`, in that order."""
        inputs = {name: array[index] for name, array in self.inputs.items()}
        return Samples.of(inputs, None if self.labels is None else self.labels[index], self.source)


def load_data(
    source: str | Path, split: Split = "all", what: str = "the data", test_fraction: float = TEST_FRACTION
) -> Samples:
    """Loads samples from `digits`, an .npz file, or a folder of images in class sub-folders.

    `train` and `test` part them by a fixed draw: ceil(test_fraction * N) samples are held out, from each class in
    proportion; the order within a part is that of the source.

    Args:
        source: `digits`, or a path.
        split: which part.
        what: how messages call it (`--data`).
        test_fraction: the share held out, between 0 and 1.

    Raises:
        DataError: there is no such source, or its content cannot be used; one line says why.
        MissingDependencyError: the package that reads this kind of source is not installed.
        ConfigError: no such split, or a fraction outside (0, 1).
    """
    if split not in get_args(Split):
        raise ConfigError(f"unknown split {split!r}; choose one of {_list(get_args(Split))}")
    if not 0 < test_fraction < 1:
        raise ConfigError(f"the test fraction is {test_fraction}; give a number between 0 and 1")
    samples = _load(str(source), what)
    return samples if split == "all" else part_of(samples, split, test_fraction)


def part_of(samples: Samples, split: Literal["train", "test"], test_fraction: float = TEST_FRACTION) -> Samples:
    """The training or the held-out part of `samples`. Raises `DataError` if it is empty."""
    held_out = held_out_mask(len(samples), samples.labels, test_fraction)
    part = np.flatnonzero(held_out if split == "test" else ~held_out)
    if len(part) == 0:
        raise DataError(
            f"{samples.source}: {len(samples)} samples leave none for {split!r} at test fraction {test_fraction}"
        )
    return samples.subset(part)


def held_out_mask(n: int, labels: NDArray[np.int64] | None, fraction: float) -> NDArray[np.bool_]:
    """Which of n samples are held out: ceil(fraction * n) of them, shared among the classes by largest remainder.

    Each class gives floor(fraction * n_c), and the classes with the largest remainders (ties: the lower label) one
    more until the total is reached; which samples of a class is a fixed draw.

    Returns:
        bool (n,).
    """
    classes = np.zeros(n, np.int64) if labels is None else labels
    names, counts = np.unique(classes, return_counts=True)
    exact = fraction * counts
    quota = np.floor(exact).astype(np.int64)
    missing = math.ceil(fraction * n - n * np.finfo(np.float64).eps) - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:missing]] += 1
    draw = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(n), kind="stable")
    mask = np.zeros(n, bool)
    for name, count in zip(names, quota, strict=True):
        mask[draw[classes[draw] == name][:count]] = True
    return mask


def _load(source: str, what: str) -> Samples:
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _image_folder(path, what)
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return _npz(path, what)
        raise DataError(f"{what} {path} is a {path.suffix or 'nameless'} file; give `digits`, an .npz or a folder")
    raise DataError(f"{what} {source!r} is not there: give `digits`, an .npz file, or a folder of images by class")


def _digits() -> Samples:
    """scikit-learn's 1797 handwritten digits, float32 (N, 1, 8, 8), grey levels 0..16 divided by 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("the digits data needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    images_NHW = np.asarray(bunch.images, np.float64) / 16.0
    x_NCHW = images_NHW[:, None].astype(np.float32)
    return Samples.of({None: x_NCHW}, np.asarray(bunch.target, np.int64), "digits")


def _npz(path: Path, what: str) -> Samples:
    try:
        arrays = read_npz(path, what)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    labels = arrays.pop("labels", None)
    if not arrays:
        raise DataError(f"{what} {path} holds no input; give arrays named like the model's inputs")
    for name, array in arrays.items():
        _check_array(array, f"{what} {path}: array {name!r}")
    lengths = {name: len(array) for name, array in arrays.items()}
    if labels is not None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{what} {path}: 'labels' is {labels.dtype} {labels.shape}; give one integer class per sample"
            )
        lengths["labels"] = len(labels)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{what} {path}: the arrays differ in their number of samples ({found})")
    if next(iter(lengths.values())) == 0:
        raise DataError(f"{what} {path} holds 0 samples")
    inputs: dict[str | None, NDArray[Any]] = {name: array for name, array in arrays.items()}  # noqa: C416 - wider key type
    return Samples.of(inputs, None if labels is None else labels.astype(np.int64), str(path))


def _check_array(array: NDArray[Any], name: str) -> None:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} is of type {array.dtype}; give numbers")
    if array.ndim == 0:
        raise DataError(f"{name} is a single number; the first axis must be the sample")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argmax(~np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise DataError(f"{name} is not finite, first in sample {bad}")


def _image_folder(folder: Path, what: str) -> Samples:
    """Images in one sub-folder per class (sorted by name), float32 (N, C, H, W), 0 to 1; C is 1 if all are grey."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("a folder of images needs Pillow: pip install 'lowprec[data]'") from None
    files, labels = _image_files(folder, what)
    pictures = []
    for path in files:
        try:
            with Image.open(path) as picture:
                picture.load()
                pictures.append(picture.convert("L" if picture.mode in _GREY_MODES else _colour(picture.mode, path)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{what}: {path} cannot be read as an image ({error})") from None
        if pictures[-1].size != pictures[0].size:
            (width, height), (width0, height0) = pictures[-1].size, pictures[0].size
            raise DataError(f"{what}: {path} is {width}x{height}, {files[0]} is {width0}x{height0}; sizes must agree")
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    x_NHWC = np.stack([np.atleast_3d(np.asarray(picture.convert(mode), np.uint8)) for picture in pictures])
    x_NCHW = np.ascontiguousarray(x_NHWC.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return Samples.of({None: x_NCHW}, np.asarray(labels, np.int64), str(folder))


def _colour(mode: str, path: Path) -> str:
    if mode.partition(";")[0] in _WIDE_MODES:
        raise DataError(f"{path} holds {mode} pixels, whose range is not known; store such data as an .npz")
    return "RGB"


def _image_files(folder: Path, what: str) -> tuple[list[Path], list[int]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{what} {folder} has no class sub-folders; put each class in a folder of its own")
    files: list[Path] = []
    labels: list[int] = []
    for label, entry in enumerate(classes):
        found = [
            path
            for path in sorted(entry.iterdir())
            if not path.name.startswith(".") and path.name.lower() not in _IGNORED_FILES
        ]
        if not found:
            raise DataError(f"{what}: the class folder {entry} is empty")
        for path in found:
            if path.suffix.lower() not in _IMAGE_SUFFIXES:
                raise DataError(f"{what}: {path} is not an image (one of {_list(_IMAGE_SUFFIXES)}); move it elsewhere")
        files += found
        labels += [label] * len(found)
    return files, labels


def _fingerprint(inputs: dict[str | None, NDArray[Any]], labels: NDArray[np.int64] | None) -> str:
    digest = hashlib.sha256()
    entries = [("" if name is None else f"input:{name}", array) for name, array in inputs.items()]
    if labels is not None:
        entries.append(("labels", labels))
    for name, array in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
