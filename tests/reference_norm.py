"""Float64 references for norms, statistics and weight maps: numpy, one channel at a time, from the definitions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lowprec.formats import FP64, FloatFormat, round_to

Array = NDArray[np.float64]


def rounding_bound(fmt: FloatFormat, length: int = 1, operations: int = 8) -> float:
    """Relative error bound of a sum of `length` terms and `operations` further roundings, to first order: k * u."""
    return (length + operations) * fmt.unit_roundoff


def close(a: object, b: object, terms: int = 4096) -> None:
    """Asserts that arrays or tensors are equal up to float64 rounding of sums of `terms`, of the largest value or 1."""
    a, b = (np.asarray(getattr(value, "detach", lambda value=value: value)(), dtype=np.float64) for value in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding_bound(FP64, terms) * max(np.abs(b).max(), 1))


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


def topk_statistics(x: Array, eps: float, k: int = 10) -> tuple[Array, Array]:
    """Sorts everything; the constant from its two bounds of the expected maximum, one reciprocal each, averaged."""
    means, scales = [], []
    for index in range(x.shape[1]):
        values = channel(x, index)
        n = len(values)
        mean = math.fsum(values) / n
        largest = sorted((abs(v - mean) for v in values), reverse=True)[:k]
        lower, upper = math.sqrt(math.log(n) / (math.pi * math.log(2))), math.sqrt(2 * math.log(n))
        means.append(mean)
        scales.append((1 / lower + 1 / upper) / 2 * math.fsum(largest) / len(largest) + eps)
    return np.array(means), np.array(scales)


def linf_statistics(x: Array, eps: float) -> tuple[Array, Array]:
    return topk_statistics(x, eps, 1)


def l2_statistics(x: Array, eps: float) -> tuple[Array, Array]:
    means, scales = [], []
    for index in range(x.shape[1]):
        values = channel(x, index)
        mean = math.fsum(values) / len(values)
        means.append(mean)
        scales.append(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values) + eps))
    return np.array(means), np.array(scales)


def l2_running(scale: Array, eps: float, count: int) -> Array:
    """The unbiased variance that torch keeps, from the scale that it divides by."""
    return (scale**2 - eps) * count / (count - 1)


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


def filter_response(
    x: Array, gamma: Array, beta: Array, eps: float, tau: Array | None = None, residual: Array | None = None
) -> Array:
    z = np.empty_like(x)
    for sample in range(x.shape[0]):
        for index in range(x.shape[1]):
            values = np.ravel(x[sample, index])
            scale = math.sqrt(math.fsum(v * v for v in values) / len(values) + eps)
            z[sample, index] = gamma[index] * x[sample, index] / scale + beta[index]
            if residual is not None:
                z[sample, index] += residual[sample, index]
            if tau is not None:
                z[sample, index] = np.where(z[sample, index] > tau[index], z[sample, index], tau[index])
    return z


def filter_response_backward(x: Array, upstream: Array, gamma: Array, eps: float) -> tuple[Array, Array, Array]:
    """dx, dgamma, dbeta without a threshold, from the derivative of each quotient: d(x_i / r) / dx_j."""
    dx, dgamma, dbeta = np.empty_like(x), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for sample in range(x.shape[0]):
        for index in range(x.shape[1]):
            values, g = np.ravel(x[sample, index]), np.ravel(upstream[sample, index])
            n = len(values)
            r = math.sqrt(math.fsum(v * v for v in values) / n + eps)
            jacobian = np.eye(n) / r - np.outer(values, values) / (n * r**3)
            dx[sample, index] = (gamma[index] * g @ jacobian).reshape(x[sample, index].shape)
            dgamma[index] += math.fsum(g * values / r)
            dbeta[index] += math.fsum(g)
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


def rounded_sum(values: Array, fmt: FloatFormat, accumulation: str) -> float:
    """The sum with every partial sum rounded: one after the other, or neighbours first ("tree")."""
    partial = list(values)
    if accumulation == "naive":
        total = 0.0
        for value in partial:
            total = float(round_to(total + value, fmt))
        return total
    while len(partial) > 1:
        odd = [partial.pop()] if len(partial) % 2 else []
        partial = [float(round_to(a + b, fmt)) for a, b in zip(partial[::2], partial[1::2], strict=True)] + odd
    return float(partial[0])


def rounded_mean(values: Array, fmt: FloatFormat, accumulation: str) -> float:
    """The sum of value / n, each quotient and each partial sum rounded."""
    return rounded_sum(round_to(np.asarray(values) / len(values), fmt), fmt, accumulation)


def rounded_statistics(name: str, x: Array, eps: float, fmt: FloatFormat, accumulation: str) -> tuple[Array, Array]:
    """Mean and scale of `name` (running variance for l2) with every intermediate rounded to `fmt`."""

    def rounded(value: Array | float) -> Array:
        return round_to(value, fmt)

    means, spreads = [], []
    for index in range(x.shape[1]):
        values = rounded(channel(x, index))
        n = len(values)
        mean = rounded_mean(values, fmt, accumulation)
        if math.isfinite(mean):
            mean = min(max(mean, values.min()), values.max())
        d = rounded(values - mean)
        constant = (1 / math.sqrt(math.log(n) / (math.pi * math.log(2))) + 1 / math.sqrt(2 * math.log(n))) / 2
        if name == "l1":
            average = rounded_mean(np.abs(d), fmt, accumulation)
            spread = rounded(rounded(math.sqrt(math.pi / 2) * average) + eps)
        elif name == "l2":
            average = rounded_mean(rounded(d * d), fmt, accumulation)
            spread = rounded(average * (n / (n - 1)))
        else:
            k = {"linf": 1, "topk": min(10, n)}[name]
            largest = np.sort(np.abs(d))[::-1][:k]
            average = rounded_mean(largest, fmt, accumulation) if k > 1 else largest[0]
            spread = rounded(rounded(constant * average) + eps)
        means.append(mean)
        spreads.append(spread)
    return np.array(means, np.float64), np.array(spreads, np.float64)
