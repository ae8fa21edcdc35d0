"""Rounds the constants of an ONNX graph, once, from the values that the float32 graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import array_of
from lowprec.formats import BF16, FP16, FP32, FP64, FloatFormat, RoundingLoss, round_to, rounding_loss

_BLOCK = 1 << 22  # elements rounded at a time

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
    loss, data = RoundingLoss(0, 0, 0), bytearray()
    for block in _blocks(values):
        loss += rounding_loss(block, fmt)
        rounded = round_to(block, fmt)
        data += rounded.astype("<f2").tobytes() if fmt is FP16 else _bfloat16_bytes(rounded)
    if loss.overflow:
        raise _overflow(tensor.name, values, loss.overflow, fmt)
    kind = TensorProto.FLOAT16 if fmt is FP16 else TensorProto.BFLOAT16
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=bytes(data)), loss


def tensor_loss(tensor: onnx.TensorProto, fmt: FloatFormat) -> RoundingLoss:
    """What rounding a float32 tensor to `fmt` would lose."""
    return sum((rounding_loss(block, fmt) for block in _blocks(array_of(tensor))), RoundingLoss(0, 0, 0))


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A tensor in pieces, since rounding goes through several float64 copies."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


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
