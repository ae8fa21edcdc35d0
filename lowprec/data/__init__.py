"""Samples from `digits`, an .npz, images, CIFAR or tar shards, in numpy alone (Pillow for pictures).

One loader serves training, export and verification, so that all three see the same samples in the same order and agree
on what was held out. It imports neither torch nor a data framework: `lowprec verify` must read data on a machine that
has onnxruntime and nothing else. Everything is held in memory; streaming formats are another loader's work.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from lowprec.data.arrays import digits, load_npz
from lowprec.data.cifar import find_cifar, load_cifar
from lowprec.data.images import load_image_folder
from lowprec.data.samples import Samples, listed
from lowprec.data.shards import is_pattern, load_shards, shards_in, shards_of_pattern
from lowprec.data.split import TEST_FRACTION, Split, held_out_mask, part_of
from lowprec.errors import ConfigError, DataError

__all__ = ["TEST_FRACTION", "Samples", "Split", "held_out_mask", "load_data", "part_of"]

_UNDERSTOOD = (
    "`digits`, an .npz file, a folder of images by class (or of such folders train and val), "
    "a CIFAR-10 or CIFAR-100 folder, or tar shards (one .tar, a folder of them, NAME-{000..003}.tar)"
)


def load_data(
    source: str | Path, split: Split = "all", what: str = "the data", test_fraction: float = TEST_FRACTION
) -> Samples:
    """Loads samples from `digits`, an .npz file, a folder of images, a CIFAR folder or tar shards.

    Where the source has a test part of its own (CIFAR; images under `train` and `val`), `train` and `test` are its
    parts whatever the fraction, and `all` is both, train first. Else they part the samples by a fixed draw:
    ceil(test_fraction * N) are held out, from each class in proportion. The order within a part is that of the source.

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
        raise ConfigError(f"unknown split {split!r}; choose one of {listed(get_args(Split))}")
    if not 0 < test_fraction < 1:
        raise ConfigError(f"the test fraction is {test_fraction}; give a number between 0 and 1")
    samples = _load(str(source), what)
    return samples if split == "all" else part_of(samples, split, test_fraction)


def _load(source: str, what: str) -> Samples:
    if source == "digits":
        return digits()
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, what)
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return load_npz(path, what)
        if path.suffix.lower() == ".tar":
            return load_shards([path], source, what)
        raise DataError(f"{what} {path} is a {path.suffix or 'nameless'} file; give {_UNDERSTOOD}")
    if is_pattern(source):
        return load_shards(shards_of_pattern(source, what), source, what)
    raise DataError(f"{what} {source!r} is not there: give {_UNDERSTOOD}")


def _load_folder(folder: Path, what: str) -> Samples:
    cifar = find_cifar(folder, what)
    if cifar is not None:
        return load_cifar(*cifar, what)
    shards = shards_in(folder)
    return load_shards(shards, str(folder), what) if shards else load_image_folder(folder, what)
