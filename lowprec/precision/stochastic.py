"""Rounding at random from float32 to float16, so that the mean of many roundings is the value itself.

A value between two neighbours of the half grid becomes the upper one with the probability of its distance from the
lower one. bfloat16 has this in several libraries, because there it is one integer addition; in float16 the subnormals
need a step of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowprec.formats import FP16, FP32

_DROPPED = FP32.precision - FP16.precision
_OVERFLOWS = FP16.max + FP16.unit_roundoff * 2.0**FP16.max_exponent  # from here on rounding to nearest gives infinity
_CHUNK = 2**20  # values at a time, so that what is between the passes stays in a cache


@torch.no_grad()
def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 `x` in float16: down with probability (up - x) / (up - down), up otherwise.

    13 random bits are added to the bits that float16 has no room for, and the carry decides: exact, since float32 has
    just these. Below 2^-14 the grid of float16 is 2^-24 wide; |x| + 2^-14 has that grid at the same 13 bits, and is
    rounded itself by 2^-14 of a step at most. Values of float16 stay as they are, infinities and NaN too; from 65520 on
    the result is infinite, as in rounding to nearest.

    Args:
        x: float32, any shape.
        generator: where the random numbers are from; torch's own for the device of `x` by default.
    """
    parts = [_rounded(part, generator) for part in torch.split(x.reshape(-1), _CHUNK)]
    return torch.cat(parts).view(x.shape)


def _rounded(x: Tensor, generator: torch.Generator | None) -> Tensor:
    size = x.abs()
    finite = size < _OVERFLOWS  # false for NaN
    lift = torch.where(size < FP16.min_normal, FP16.min_normal, 0.0)
    limit = torch.where(finite, FP16.max, math.inf)  # the largest half has no upper neighbour
    drawn = size + lift
    drawn.view(torch.int32).add_(_noise(x, generator)).bitwise_and_(-(1 << _DROPPED))
    drawn.sub_(lift).clamp_(max=limit).copysign_(x)
    return torch.where(finite, drawn, x).half()


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A number from 0 to 2^13 - 1 per value; four are cut out of each drawn number."""
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(generator=generator)
    return drawn.view(torch.int16)[: x.numel()].bitwise_and_((1 << _DROPPED) - 1)
