"""What goes in and out of a network: names, shapes and element types, and feeds that fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import DataError, UnsupportedError


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and element type of an input or output.

    Args:
        name: as in the graph.
        shape: one entry per axis, a name or None where the size is free; None when even the rank is.
        dtype: numpy's name of the element type, or `bfloat16`.
    """

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: str

    @property
    def batch_axis(self) -> int | None:
        """0 if the size of axis 0 is free, else None."""
        return 0 if self.shape and not isinstance(self.shape[0], int) else None

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype in ("float16", "bfloat16", "float32", "float64")


def fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """How many samples a model takes at a time where it fixes that: the length of axis 0 that all inputs share."""
    lengths = {spec.shape[0] if spec.shape else None for spec in specs}
    length = lengths.pop() if len(lengths) == 1 else None
    return length if isinstance(length, int) else None


def specs_of(values: Any) -> tuple[TensorSpec, ...]:
    """The specs of a graph's inputs or outputs (onnx ValueInfoProto)."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise UnsupportedError(f"{value.name!r} is no tensor; only tensor inputs and outputs can be compared")
        shape = None
        if kind.HasField("shape"):
            shape = tuple(
                dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in kind.shape.dim
            )
        found.append(TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))))
    return tuple(found)


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The feeds as arrays, one for each input and no other.

    Raises:
        DataError: an input is missing or unknown, or has the wrong rank, size or kind of number.
    """
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in feeds]
    unknown = [name for name in feeds if name not in names]
    if missing or unknown:
        raise DataError(
            f"the model takes the inputs {', '.join(names) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    arrays = {spec.name: np.asarray(feeds[spec.name]) for spec in specs}
    for spec in specs:
        array = arrays[spec.name]
        if spec.shape is not None and (
            array.ndim != len(spec.shape)
            or any(isinstance(want, int) and want != size for want, size in zip(spec.shape, array.shape, strict=True))
        ):
            wanted = ", ".join("?" if size is None else str(size) for size in spec.shape)
            raise DataError(f"the input {spec.name!r} has shape {array.shape}; the model takes ({wanted})")
        if array.dtype.kind not in "fiub" or (array.dtype.kind == "f" and not spec.is_float):
            raise DataError(f"the input {spec.name!r} holds {array.dtype}; the model takes {spec.dtype}")
    return arrays
