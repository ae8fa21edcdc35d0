"""Sources that are arrays already: scikit-learn's digits and .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.artifacts import read_npz
from lowprec.data.samples import Samples, check_array
from lowprec.errors import ArtifactError, DataError, MissingDependencyError


def digits() -> Samples:
    """scikit-learn's 1797 handwritten digits, float32 (N, 1, 8, 8), grey levels 0..16 divided by 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("the digits data needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    images_NHW = np.asarray(bunch.images, np.float64) / 16.0
    x_NCHW = images_NHW[:, None].astype(np.float32)
    return Samples.of({None: x_NCHW}, np.asarray(bunch.target, np.int64), "digits")


def load_npz(path: Path, what: str) -> Samples:
    """Arrays by name of the model's input, and `labels` where there are any."""
    try:
        arrays = read_npz(path, what)
    except ArtifactError as error:
        raise DataError(str(error)) from None
    labels = arrays.pop("labels", None)
    if not arrays:
        raise DataError(f"{what} {path} holds no input; give arrays named like the model's inputs")
    for name, array in arrays.items():
        check_array(array, f"{what} {path}: array {name!r}")
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
