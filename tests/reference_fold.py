"""Float64 references for folding: linear operations as plain loops, sharing nothing with the code under test."""

import itertools

import numpy as np


def conv(x, weight, bias, stride, padding, dilation, groups):
    """Cross-correlation of x (N, C, *space) with weight (O, C/groups, *kernel), zero padding, any number of axes."""
    batch, channels, *space = x.shape
    outputs, per_group, *kernel = weight.shape
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(space, kernel, strict=True)]
    y = np.zeros((batch, outputs, *size))
    for n, o in itertools.product(range(batch), range(outputs)):
        group = o // (outputs // groups)
        for at in itertools.product(*map(range, size)):
            total = 0.0 if bias is None else bias[o]
            for i in range(per_group):
                for tap in itertools.product(*map(range, kernel)):
                    place = tuple(a * stride - padding + t * dilation for a, t in zip(at, tap, strict=True))
                    if all(0 <= p < s for p, s in zip(place, space, strict=True)):
                        total += weight[(o, i, *tap)] * x[(n, group * (channels // groups) + i, *place)]
            y[(n, o, *at)] = total
    return y


def conv_transpose(x, weight, bias, stride, padding, dilation, groups):
    """The transpose of `conv`: each input element adds a kernel, weight (C, O/groups, *kernel)."""
    batch, channels, *space = x.shape
    _, per_group, *kernel = weight.shape
    size = [(n - 1) * stride - 2 * padding + dilation * (k - 1) + 1 for n, k in zip(space, kernel, strict=True)]
    y = np.zeros((batch, per_group * groups, *size))
    for n, c in itertools.product(range(batch), range(channels)):
        group = c // (channels // groups)
        for at in itertools.product(*map(range, space)):
            for m in range(per_group):
                for tap in itertools.product(*map(range, kernel)):
                    place = tuple(a * stride - padding + t * dilation for a, t in zip(at, tap, strict=True))
                    if all(0 <= p < s for p, s in zip(place, size, strict=True)):
                        y[(n, group * per_group + m, *place)] += x[(n, c, *at)] * weight[(c, m, *tap)]
    if bias is not None:
        for o in range(per_group * groups):
            y[:, o] += bias[o]
    return y


def linear(x, weight, bias):
    """x (N, C) times weight (O, C) transposed."""
    y = np.zeros((x.shape[0], weight.shape[0]))
    for n, o in itertools.product(range(x.shape[0]), range(weight.shape[0])):
        y[n, o] = sum(x[n, c] * weight[o, c] for c in range(x.shape[1])) + (0.0 if bias is None else bias[o])
    return y


def affine(x, scale, shift):
    """Per channel on axis 1."""
    y = np.empty_like(x)
    for channel in range(x.shape[1]):
        y[:, channel] = scale[channel] * x[:, channel] + shift[channel]
    return y


def batch_norm(x, mean, variance, gamma, beta, eps):
    """Inference batch norm on axis 1, in the order in which it is defined."""
    y = np.empty_like(x)
    for channel in range(x.shape[1]):
        y[:, channel] = (x[:, channel] - mean[channel]) / (variance[channel] + eps) ** 0.5 * gamma[channel]
        y[:, channel] += beta[channel]
    return y
