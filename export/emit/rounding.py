"""Rounds the constants of an ONNX graph, once, from the values that the float32 graph holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import array_of
from lowprec.formats import BF16, FP16, FP32, FP64, FloatFormat, RoundingLoss, round_to, rounding_loss

FORMAT_OF: dict[int, FloatFormat] = {
    TensorProto.DOUBLE: FP64,
    TensorProto.FLOAT: FP32,
    TensorProto.FLOAT16: FP16,
    TensorProto.BFLOAT16: BF16,
}
"""The format of each floating element type that is not narrower than a half."""


def stored_tensor(values: NDArray[np.float64], element_type: int, name: str) -> onnx.TensorProto:
    """Float64 values rounded once, to nearest in an element type.

    Args:
        values: float64.
        element_type: one of `FORMAT_OF`.
        name: of the result.

    Raises:
        UnsupportedError: a finite value overflows.
    """
    fmt = FORMAT_OF[element_type]
    rounded = round_to(values, fmt)
    overflow = np.isinf(rounded) & np.isfinite(values)
    if overflow.any():
        raise _overflow(name, values, int(overflow.sum()), fmt)
    if fmt is BF16:
        return onnx.helper.make_tensor(name, element_type, values.shape, _bfloat16_bytes(rounded), raw=True)
    return numpy_helper.from_array(rounded.astype(onnx.helper.tensor_dtype_to_np_dtype(element_type)), name)


def round_tensor(tensor: onnx.TensorProto, fmt: FloatFormat, name: str) -> tuple[onnx.TensorProto, RoundingLoss]:
    """A float32 tensor rounded to nearest in `fmt`, ties to even, and what that lost.

    Values are never clipped to the largest finite one, as converters commonly do: a clipped weight is another network.

    Args:
        tensor: float32.
        fmt: FP16 or BF16.
        name: of the result.

    Raises:
        UnsupportedError: a finite value overflows.
    """
    values = array_of(tensor)
    loss = rounding_loss(values, fmt)
    if loss.overflow:
        raise _overflow(tensor.name, values, loss.overflow, fmt)
    rounded = round_to(values, fmt)
    if fmt is FP16:
        return numpy_helper.from_array(rounded.astype(np.float16), name), loss
    return onnx.helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, _bfloat16_bytes(rounded), raw=True), loss


def _overflow(name: str, values: NDArray[Any], count: int, fmt: FloatFormat) -> UnsupportedError:
    largest = float(np.abs(values[np.isfinite(values)]).max())
    return UnsupportedError(
        f"constant '{name}' does not fit in {fmt.name}: {count} of {values.size} values overflow, "
        f"the largest is {largest:.4g} and {fmt.name} ends at {fmt.max:.4g}; keep the nodes that read it wide"
    )


def _bfloat16_bytes(rounded: NDArray[np.float64]) -> bytes:
    """The upper half of each float32, exact for values that are bfloat16 already."""
    bits = np.ascontiguousarray(rounded, np.float32).view(np.uint32) >> 16
    return bits.astype("<u2").tobytes()
