"""Float64 references for weight norms: numpy, one row at a time, from the definitions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def norm(row: Array, p: float, k: int | None) -> float:
    if k is not None:
        largest = sorted((abs(value) for value in row), reverse=True)[:k]
        return math.fsum(largest) / len(largest)
    if p == math.inf:
        return max(abs(value) for value in row)
    return math.fsum(abs(value) ** p for value in row) ** (1 / p)


def norm_gradient(row: Array, p: float, k: int | None) -> Array:
    """d||v|| / dv for a row without ties: sign(v)|v|^(p-1) / ||v||^(p-1); signs / k on the k largest."""
    size = norm(row, p, k)
    if k is not None or p == math.inf:
        count = min(k or 1, len(row))
        chosen = np.argsort(-np.abs(row))[:count]
        gradient = np.zeros_like(row)
        gradient[chosen] = np.sign(row[chosen]) / count
        return gradient
    return np.sign(row) * np.abs(row) ** (p - 1) / size ** (p - 1)


def bounded_gradient(row: Array, upstream: Array, rho: float, p: float, k: int | None) -> Array:
    """dL/dv = rho / ||v|| * (G - (v . G / ||v||) a) with a the gradient of the norm."""
    size = norm(row, p, k)
    return rho / size * (upstream - float(row @ upstream) / size * norm_gradient(row, p, k))


def gained_gradients(
    rows: list[Array], upstream: list[Array], gain: Array, bound: float, p: float, k: int | None
) -> tuple[list[Array], Array]:
    """Of w_i = u_i gain_i bound / ||gain||, u_i = v_i / ||v_i||: by v as bounded with rho_i, by gain projected."""
    length = math.sqrt(math.fsum(value * value for value in gain))
    by_v = [
        bounded_gradient(row, g, bound * gain[i] / length, p, k)
        for i, (row, g) in enumerate(zip(rows, upstream, strict=True))
    ]
    along = np.array([float(row @ g) / norm(row, p, k) for row, g in zip(rows, upstream, strict=True)])
    unit = gain / length
    return by_v, bound / length * (along - float(along @ unit) * unit)
