"""Float64 references for norms, statistics and weight maps: numpy, one channel at a time, from the definitions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lowprec.formats import FloatFormat

Array = NDArray[np.float64]


def rounding_bound(fmt: FloatFormat, length: int = 1, operations: int = 8) -> float:
    """Relative error bound of a sum of `length` terms and `operations` further roundings, to first order: k * u."""
    return (length + operations) * fmt.unit_roundoff


def channel(x: Array, index: int) -> Array:
    """All elements of one channel, flat."""
    return np.concatenate([np.ravel(sample[index]) for sample in x])


def l1_statistics(x: Array, eps: float) -> tuple[Array, Array]:
    means, scales = [], []
    for index in range(x.shape[1]):
        values = channel(x, index)
        mean = math.fsum(values) / len(values)
        means.append(mean)
        scales.append(math.sqrt(math.pi / 2) * math.fsum(abs(v - mean) for v in values) / len(values) + eps)
    return np.array(means), np.array(scales)


def normalised(x: Array, mean: Array, scale: Array, gamma: Array, beta: Array) -> Array:
    y = np.empty_like(x)
    for sample in range(x.shape[0]):
        for index in range(x.shape[1]):
            y[sample, index] = gamma[index] * (x[sample, index] - mean[index]) / scale[index] + beta[index]
    return y


def l1_backward(x: Array, upstream: Array, gamma: Array, eps: float) -> tuple[Array, Array, Array]:
    """The closed form: dx = (g - mean g - C mean(g d) (s - mean s)) / S with d = (x - mu) / S, s = sign(x - mu)."""
    mean, scale = l1_statistics(x, eps)
    dx, dgamma, dbeta = np.empty_like(x), np.empty(x.shape[1]), np.empty(x.shape[1])
    for index in range(x.shape[1]):
        d = (x[:, index] - mean[index]) / scale[index]
        s = np.sign(x[:, index] - mean[index])
        g = gamma[index] * upstream[:, index]
        correction = math.sqrt(math.pi / 2) * (g * d).mean() * (s - s.mean())
        dx[:, index] = (g - g.mean() - correction) / scale[index]
        dgamma[index] = (upstream[:, index] * d).sum()
        dbeta[index] = upstream[:, index].sum()
    return dx, dgamma, dbeta


def fan_in_indices(shape: tuple[int, ...], groups: int, transposed: bool) -> list[tuple[NDArray[np.intp], int]]:
    """For every output channel: the indices on the input axis and the index on the output axis of its weights."""
    if not transposed:
        return [(np.arange(shape[1]), output) for output in range(shape[0])]
    per_group_in, per_group_out = shape[0] // groups, shape[1]
    return [
        (np.arange(per_group_in) + group * per_group_in, output)
        for group in range(groups)
        for output in range(per_group_out)
    ]


def rows(weight: Array, groups: int = 1, transposed: bool = False) -> list[Array]:
    """The weights that feed each output channel."""
    found = []
    for inputs, output in fan_in_indices(weight.shape, groups, transposed):
        block = weight[inputs, output] if transposed else weight[output, inputs]
        found.append(np.ravel(block))
    return found
