"""Operators that onnx's reference computes through float32 even when it is given float64, done in float64.

Found by running each operator against torch in float64: Erf and Gelu call math.erf and store float32, the bodies of
GroupNormalization and HardSwish cast to float32 or hold 1/6 as one, DequantizeLinear subtracts in float32.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from onnx.reference.ops._quant_utils import reshape_input

Array = NDArray[Any]


@functools.cache
def _erf() -> Callable[[Array], Array]:
    """scipy's erf where scipy is installed (50 times faster), else the standard library's, element by element."""
    try:
        found: Callable[[Array], Array] = importlib.import_module("scipy.special").erf
    except ImportError:
        return np.vectorize(math.erf, otypes=[np.float64])
    return found


class Erf(OpRun):
    """The error function."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(_erf()(x)),)


class Gelu(OpRun):
    """x P(Z <= x), Z normal, or its approximation through tanh.

    Source: ONNX operator specification, Gelu; Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """

    op_domain = ""

    def _run(self, x: Array, approximate: str | None = None) -> tuple[Array]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + _erf()(x / math.sqrt(2))),)


class HardSwish(OpRun):
    """x * clip(x / 6 + 1/2, 0, 1)."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x * np.clip(x / 6 + 0.5, 0, 1),)


class GroupNormalization(OpRun):
    """(x - mean) / sqrt(var + eps) over each group of channels, scaled and shifted.

    Scale and bias are per channel from opset 21 on, per group before; their length tells.
    """

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, bias: Array, epsilon: float | None = None, num_groups: int | None = None,
        stash_type: int | None = None,
    ) -> tuple[Array]:  # fmt: skip
        channels, groups = x.shape[1], num_groups or 1
        grouped = x.reshape(x.shape[0], groups, -1)
        centred = grouped - grouped.mean(axis=2, keepdims=True)
        variance = np.mean(np.square(centred), axis=2, keepdims=True)
        unit = (centred / np.sqrt(variance + (1e-5 if epsilon is None else epsilon))).reshape(x.shape)
        shape = (1, channels, *[1] * (x.ndim - 2))
        gain, shift = (np.repeat(value, channels // len(value)).reshape(shape) for value in (scale, bias))
        return (unit * gain + shift,)


class DequantizeLinear(OpRun):
    """(x - zero_point) * scale in float64; onnx's own computes the difference in float32."""

    op_domain = ""

    def _run(
        self, x: Array, x_scale: Array, x_zero_point: Array | None = None, axis: int | None = None,
        block_size: int | None = None, output_dtype: int | None = None,
    ) -> tuple[Array]:  # fmt: skip
        where = 1 if axis is None else axis
        scale = reshape_input(x_scale.astype(np.float64), x.shape, where, block_size or 0)
        wide = x.astype(np.float64)
        if x_zero_point is not None:
            wide = wide - reshape_input(x_zero_point.astype(np.float64), x.shape, where, block_size or 0)
        return (wide * scale,)


EXACT_OPERATORS: tuple[type[OpRun], ...] = (Erf, Gelu, HardSwish, GroupNormalization, DequantizeLinear)
