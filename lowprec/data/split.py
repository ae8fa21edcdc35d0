"""Training and held-out part: the source's own where it has them, else a fixed draw.

The draw is taken from the raw stream of a bit generator, which numpy keeps the same from version to version
(`Generator.permutation` carries no such promise); a split that moved with a numpy upgrade would leak test samples into
training.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowprec.data.samples import Samples
from lowprec.errors import DataError

Split = Literal["all", "train", "test"]

TEST_FRACTION = 0.2
_SPLIT_SEED = 0


def part_of(samples: Samples, split: Literal["train", "test"], test_fraction: float = TEST_FRACTION) -> Samples:
    """The training or the held-out part of `samples`; their own parts, whatever the fraction, where they have them.
    A part itself has none.

    Raises `DataError` if the part is empty.
    """
    if samples.held_out is None:
        held_out, how = held_out_mask(len(samples), samples.labels, test_fraction), f" at test fraction {test_fraction}"
    else:
        held_out, how = samples.held_out, " in the parts that the source itself has"
    part = np.flatnonzero(held_out if split == "test" else ~held_out)
    if len(part) == 0:
        raise DataError(f"{samples.source}: {len(samples)} samples leave none for {split!r}{how}")
    return replace(samples.subset(part), held_out=None)  # a part may be parted again


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
