"""Rounding at random from float32 to float16, so that the mean of many roundings is the value itself.

A value between two neighbours of the half grid becomes the upper one with the probability of its distance from the
lower one. bfloat16 has this in several libraries, because there it is one integer addition; in float16 the subnormals
need a rule of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.formats import FP16, FP32

_DROPPED = FP32.precision - FP16.precision
_OVERFLOWS = FP16.max * (
    1 + FP16.unit_roundoff / (2 - FP16.eps)
)  # 65520: from here on rounding to nearest gives infinity


@torch.no_grad()
def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 `x` in float16: down with probability (up - x) / (up - down), up otherwise.

    Normal results: 13 random bits are added to the bits that will be cut off, and the carry decides. Subnormal ones
    (|x| < 2^-14) lie on a grid of 2^-24, where |x| / 2^-24 plus a uniform number below 1 is rounded down. Values of
    float16 stay as they are; so do infinities and NaN. From 65520 on the result is infinite, as in rounding to nearest.

    Args:
        x: float32, any shape.
        generator: where the random numbers are from; torch's own for the device of `x` by default.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << _DROPPED, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    kept = torch.bitwise_and(bits + noise, -(1 << _DROPPED)).view(torch.float32)
    steps = (x.abs().double() / FP16.min_subnormal + noise.double() / (1 << _DROPPED)).floor()
    small = torch.copysign((steps * FP16.min_subnormal).float(), x)
    rounded = torch.where(x.abs() < FP16.min_normal, small, kept)
    # Between the largest half and 65520 there is no upper neighbour to go to.
    rounded = torch.where(
        (x.abs() > FP16.max) & (x.abs() < _OVERFLOWS), torch.copysign(x.new_tensor(FP16.max), x), rounded
    )
    return torch.where(x.isfinite(), rounded, x).half()
