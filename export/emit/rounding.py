"""Rounds the constants of an ONNX graph, once, from the values that the float32 graph holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import array_of
from lowprec.export.folding.algebra import Stored, blocks_of
from lowprec.formats import BF16, FP16, FP32, FP64, FloatFormat, RoundingLoss, round_to, rounding_loss

_BYTES = {"fp64": "<f8", "fp32": "<f4", "fp16": "<f2"}

FORMAT_OF: dict[int, FloatFormat] = {
    TensorProto.DOUBLE: FP64,
    TensorProto.FLOAT: FP32,
    TensorProto.FLOAT16: FP16,
    TensorProto.BFLOAT16: BF16,
}
"""The format of each floating element type that is not narrower than a half."""


def stored_tensor(values: Stored, element_type: int, name: str) -> onnx.TensorProto:
    """Values rounded once, to nearest in an element type, a piece at a time.

    Args:
        values: of any floating type, or not yet multiplied out.
        element_type: one of `FORMAT_OF`.
        name: of the result.

    Raises:
        UnsupportedError: a finite value overflows.
    """
    fmt, data, overflow = FORMAT_OF[element_type], bytearray(), 0
    for block in blocks_of(values):
        rounded = round_to(block, fmt)
        overflow += int(np.sum(np.isinf(rounded) & np.isfinite(block)))
        data += _bfloat16_bytes(rounded) if fmt is BF16 else rounded.astype(_BYTES[fmt.name]).tobytes()
    if overflow:
        raise _overflow(name, np.asarray(values), overflow, fmt)
    return TensorProto(name=name, data_type=element_type, dims=values.shape, raw_data=bytes(data))


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
    loss = tensor_loss(tensor, fmt)
    if loss.overflow:
        raise _overflow(tensor.name, values, loss.overflow, fmt)
    kind = TensorProto.FLOAT16 if fmt is FP16 else TensorProto.BFLOAT16
    return stored_tensor(values, kind, name), loss


def tensor_loss(tensor: onnx.TensorProto, fmt: FloatFormat) -> RoundingLoss:
    """What rounding a float32 tensor to `fmt` would lose."""
    return sum((rounding_loss(block, fmt) for block in blocks_of(array_of(tensor))), RoundingLoss(0, 0, 0))


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
