"""Half arithmetic and optimizers by numpy loops in float64: the reference of the precision tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def half(x: Array) -> Array:
    """x rounded to half, in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float64)


def conv2d(x_NCHW: Array, w_OIHW: Array) -> Array:
    """Convolution without padding, stride 1, accumulated in float64."""
    n, _, height, width = x_NCHW.shape
    out, _, kh, kw = w_OIHW.shape
    y = np.zeros((n, out, height - kh + 1, width - kw + 1))
    for row in range(y.shape[2]):
        for column in range(y.shape[3]):
            patch = x_NCHW[:, :, row : row + kh, column : column + kw]
            for channel in range(out):
                y[:, channel, row, column] = (patch * w_OIHW[channel]).sum(axis=(1, 2, 3))
    return y


def linear_gradients(x_NI: Array, w_OI: Array, dy_NO: Array) -> tuple[Array, Array]:
    """(dx, dw) of y = x w^T, accumulated in float64."""
    dx, dw = np.zeros(x_NI.shape), np.zeros(w_OI.shape)
    for n in range(len(x_NI)):
        for o in range(len(w_OI)):
            dx[n] += dy_NO[n, o] * w_OI[o]
            dw[o] += dy_NO[n, o] * x_NI[n]
    return dx, dw


def sgd_momentum(w: float, gradients: list[float], lr: float, momentum: float) -> float:
    """torch's SGD on one scalar: v = momentum * v + g (v = g at first), w = w - lr * v, in float64."""
    velocity = None
    for gradient in gradients:
        velocity = gradient if velocity is None else momentum * velocity + gradient
        w -= lr * velocity
    return w
