"""Float64 reference of the fused norm in numpy, and how far a kernel may be from it.

The forward is the definition, on complex numbers if need be, so that its derivative can be had by a complex step. The
backward is the chain rule walked step by step (through y, S, |d|, d and the mean), not the closed form of the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.formats import BF16, FP16, FP32, FP64

Array = NDArray[np.float64]
FORMATS = {"float64": FP64, "float32": FP32, "float16": FP16, "bfloat16": BF16}


def rows(x_NCX: Array) -> Array:
    """(C, n): samples first, then places."""
    return np.moveaxis(x_NCX, 1, 0).reshape(x_NCX.shape[1], -1)


def unrows(x_Cn: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(x_Cn.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


@dataclass
class Problem:
    """What is asked: all arrays float64, x and what is like it as (C, n), parameters (C,)."""

    x: Array
    g: Array
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    k: int = 0
    eps: float = 1e-5
    relu: bool = False
    grad_mean: Array | float = 0.0
    grad_scale: Array | float = 0.0

    @property
    def w(self) -> Array:
        return np.ones((len(self.x), 1)) if self.weight is None else self.weight[:, None]

    @property
    def b(self) -> Array:
        return np.zeros((len(self.x), 1)) if self.bias is None else self.bias[:, None]

    @property
    def constant(self) -> float:
        """sqrt(pi/2), or C(n) as the average of the reciprocals of two bounds of the expected maximum."""
        if self.k == 0:
            return math.sqrt(math.pi / 2)
        n = self.x.shape[1]
        return (math.sqrt(math.pi * math.log(2) / math.log(n)) + 1 / math.sqrt(2 * math.log(n))) / 2

    @property
    def used(self) -> int:
        """How many deviations the scale averages over."""
        return min(self.k, self.x.shape[1]) if self.k else self.x.shape[1]


@dataclass
class Answer:
    mean: Array  # (C, 1), scale too
    scale: Array
    d: Array
    y: Array  # after the ReLU
    before: Array  # before the ReLU
    chosen: Array  # (C, used): positions of the deviations that make the scale
    dx: Array = field(default_factory=lambda: np.empty(0))
    dweight: Array = field(default_factory=lambda: np.empty(0))
    dbias: Array = field(default_factory=lambda: np.empty(0))
    dresidual: Array = field(default_factory=lambda: np.empty(0))


def forward(ask: Problem) -> Answer:
    mean = ask.x.mean(1, keepdims=True)
    d = ask.x - mean
    sizes = np.where(d.real >= 0, d, -d)
    if ask.used == d.shape[1]:
        chosen = np.broadcast_to(np.arange(ask.used), d.shape)
    else:
        chosen = np.argsort(-sizes.real, axis=1, kind="stable")[:, : ask.used]
    scale = ask.constant * np.take_along_axis(sizes, chosen, 1).mean(1, keepdims=True) + ask.eps
    before = ask.w * (d / scale) + ask.b
    if ask.residual is not None:
        before = before + ask.residual
    y = np.where(before.real > 0, before, 0) if ask.relu else before
    return Answer(mean, scale, d, y, before, chosen)


def solve(ask: Problem, active: NDArray[np.bool_] | None = None) -> Answer:
    """Forward and backward for the loss sum(g y) + sum(grad_mean mean) + sum(grad_scale scale).

    `active` says where the ReLU lets gradients through, if not where y > 0.
    """
    out = forward(ask)
    g = np.where(out.before > 0 if active is None else active, ask.g, 0) if ask.relu else ask.g
    out.dresidual, out.dbias = g, g.sum(1)
    out.dweight = (g * out.d / out.scale).sum(1)
    to_scale = np.reshape(ask.grad_scale, (-1, 1)) - (g * ask.w * out.d).sum(1, keepdims=True) / out.scale**2
    to_sizes = np.zeros_like(g)
    np.put_along_axis(to_sizes, out.chosen, np.broadcast_to(to_scale * ask.constant / ask.used, out.chosen.shape), 1)
    to_d = g * ask.w / out.scale + np.where(out.d >= 0, to_sizes, -to_sizes)
    to_mean = np.reshape(ask.grad_mean, (-1, 1)) - to_d.sum(1, keepdims=True)
    out.dx = to_d + to_mean / g.shape[1]
    return out


@dataclass
class Bounds:
    """Largest absolute errors to first order; (C, 1) or (C, n) like what they are about."""

    mean: Array
    scale: Array
    before: Array  # y before the ReLU, which storing turns no more than from its smallest number to 0
    y: Array
    dweight: Array
    dbias: Array
    dx: Array


def bounds(ask: Problem, out: Answer, dtype: str, from_output: bool = False, likely: bool = False) -> Bounds:
    """What arithmetic in float32 (float64 for float64), rounded once to `dtype`, can be off by.

    A sum in which each term has an error of at most u |term| times `few`, and whose partial sums s_j are each rounded,
    is off by sum s_j delta_j with |delta_j| <= u, the roundoff of the arithmetic: at most n u sum|terms| in any order.
    For long sums that says nothing; `likely` takes the bound of Azuma and Hoeffding for delta_j of mean 0 instead, 8 u
    sqrt(sum s_j^2), which fails with a chance of 2 exp(-32). Every further operation adds one u of its result; `few`
    counts those generously: no path has more than 8. Storing adds v |value|, v the roundoff of the stored type, and
    half its smallest subnormal number.

    Source of the likely bound: Higham, Mary, A new approach to probabilistic rounding error analysis, SISC 2019.
    """
    store, wide = FORMATS[dtype], FP64 if dtype == "float64" else FP32
    u, v, tiny, n = wide.unit_roundoff, store.unit_roundoff, store.min_subnormal / 2, ask.x.shape[1]
    few = 8 * u

    def total(errors: Array) -> Array:
        """Of independent errors of at most that size."""
        return 8 * np.sqrt((errors**2).sum(1, keepdims=True)) if likely else np.abs(errors).sum(1, keepdims=True)

    def summed(terms: Array) -> Array:
        """Of a sum."""
        order = total(u * np.cumsum(terms, 1)) if likely else n * u * np.abs(terms).sum(1, keepdims=True)
        return order + total(few * terms) + few * np.abs(terms.sum(1, keepdims=True))

    # mean = a + sum(x - a) / n with a an element of the channel: the sum's error, and the last addition's.
    mean = summed(ask.x - ask.x[:, :1]) / n + 2 * u * np.abs(out.mean)
    sizes = np.take_along_axis(np.abs(out.d), out.chosen, 1)
    scale = ask.constant * (summed(sizes) / ask.used + mean) + few * out.scale
    relative = scale / out.scale
    unit = np.abs(ask.w) / out.scale
    terms = unit * np.abs(out.d) + np.abs(ask.b) + (0 if ask.residual is None else np.abs(ask.residual))
    before = unit * (mean + np.abs(out.d) * relative) + few * terms
    stored = v * np.abs(out.before) + tiny
    # dweight = sum(g d) / S: errors of mean and S are common to all terms, so they act on sum(g) and on dweight.
    g, a, dweight = out.dresidual, np.abs(out.dbias[:, None]), np.abs(out.dweight[:, None])
    a_off = summed(g)
    common = mean * a / out.scale + (relative + few) * dweight
    if from_output:  # (sum(g z) - bias sum(g)) / weight: each z is off by its rounding, two sums by theirs
        z_off = total(g * (stored + few * terms)) + summed(g * out.y) + np.abs(ask.b) * a_off
        dweight_off = common + z_off / np.abs(ask.w)
    else:
        dweight_off = common + summed(g * out.d) / out.scale
    # dx = unit (g - A / n) + dS (its share), dS = grad_scale - T / S with T = weight dweight.
    share = np.full_like(ask.x, 1 / n)
    np.put_along_axis(share, out.chosen, 1 / ask.used + 1 / n, 1)
    share *= ask.constant
    given = np.abs(np.reshape(ask.grad_scale, (-1, 1)))
    plain = (relative + few) * unit * (np.abs(g) + a / n) + few * np.abs(np.reshape(ask.grad_mean, (-1, 1))) / n
    spread = unit * (dweight_off + (relative + few) * dweight) + few * given
    dx = plain + unit * a_off / n + spread * share + v * np.abs(out.dx) + tiny
    return Bounds(mean, scale, before + 2 * tiny, before + stored, dweight_off[:, 0], a_off[:, 0], dx)


def doubtful(ask: Problem, out: Answer, off: Bounds) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What rounding may push over an edge: places (C, n), at a ReLU's or a sign's; channels, at being chosen."""
    place = np.zeros_like(ask.x, dtype=bool)
    doubt = 2 * off.mean + 4 * FP32.unit_roundoff * np.abs(out.d)
    np.put_along_axis(place, out.chosen, np.take_along_axis(np.abs(out.d) <= doubt, out.chosen, 1), 1)
    if ask.relu:
        exact = (ask.w == 0) | (out.before == ask.b)  # no rounding in 0 * d + bias, nor in d = 0
        place |= ~exact & (np.abs(out.before) <= 2 * off.before)
    if ask.used == ask.x.shape[1] or ask.x.shape[1] == 2:  # all chosen; of two either gives the same gradient
        return place, np.zeros(len(ask.x), dtype=bool)
    near = np.argpartition(-np.abs(out.d), min(4 * ask.used + 64, ask.x.shape[1] - 1))[:, : 4 * ask.used + 64]
    outside = ~(near[:, None, :] == out.chosen[:, :, None]).any(1)
    gap = np.abs(_pairs(np.abs(out.d), out.chosen, near)) <= 4 * np.take_along_axis(doubt, near, 1)[:, None, :]
    same = _pairs(ask.x, out.chosen, near) == 0
    return place, (gap & ~same & outside[:, None, :]).any((1, 2))


def clear(ask: Problem, out: Answer, off: Bounds) -> NDArray[np.bool_]:
    """Which channels have nothing in doubt."""
    place, channel = doubtful(ask, out, off)
    return ~(place.any(1) | channel)


def _pairs(values_Cn: Array, chosen_Ck: NDArray[Any], near_Cm: NDArray[Any]) -> Array:
    """(C, k, m): the chosen values minus those near them."""
    chosen, near = (np.take_along_axis(values_Cn, at, 1) for at in (chosen_Ck, near_Cm))
    return chosen[:, :, None] - near[:, None, :]
