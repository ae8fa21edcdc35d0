"""Rounds the constants of an ONNX graph, once, from the values that the float32 graph holds."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowprec.errors import UnsupportedError
from lowprec.formats import FP16, FloatFormat, RoundingLoss, round_to, rounding_loss


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
    values = numpy_helper.to_array(tensor)
    loss = rounding_loss(values, fmt)
    if loss.overflow:
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise UnsupportedError(
            f"constant '{tensor.name}' does not fit in {fmt.name}: {loss.overflow} of {values.size} values overflow, "
            f"the largest is {largest:.4g} and {fmt.name} ends at {fmt.max:.4g}; keep the nodes that read it wide"
        )
    rounded = round_to(values, fmt)
    if fmt is FP16:
        return numpy_helper.from_array(rounded.astype(np.float16), name), loss
    return onnx.helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, _bfloat16_bytes(rounded), raw=True), loss


def _bfloat16_bytes(rounded: NDArray[np.float64]) -> bytes:
    """The upper half of each float32, exact for values that are bfloat16 already."""
    bits = np.ascontiguousarray(rounded, np.float32).view(np.uint32) >> 16
    return bits.astype("<u2").tobytes()
