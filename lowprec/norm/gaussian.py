"""Moments of what an operation makes of independent normal values, in closed form or by quadrature; differentiable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_NODES, _REACH = 240, 6.0
LEAST_VARIANCE = 1e-12
"""Below it the gradient of a root, and m / s^2, would overflow in float32."""


def relu_moments(mean_C: Tensor, variance_C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean m P(a) + s p(a) and variance of max(x, 0), x normal with mean m and deviation s; a = m / s.

    p and P are the standard normal density and distribution: E max(x, 0)^2 = (m^2 + s^2) P(a) + m s p(a).
    """
    s_C = variance_C.clamp(min=LEAST_VARIANCE).sqrt()
    a_C = mean_C / s_C
    below_C = torch.special.ndtr(a_C)
    density_C = torch.exp(-a_C.square() / 2) / math.sqrt(2 * math.pi)
    first_C = mean_C * below_C + s_C * density_C
    second_C = (mean_C.square() + variance_C) * below_C + mean_C * s_C * density_C
    return first_C, F.relu(second_C - first_C.square())


def elementwise_moments(f: Callable[[Tensor], Tensor], mean_C: Tensor, variance_C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of f(x), x normal.

    The trapezoid rule with spacing h = 12 / 239 standard deviations: for a smooth f exact to rounding, at a kink where
    the slope jumps by j off by at most h^2 / 8 * j * sigma * 0.4 = 1.3e-4 j sigma.

    Args:
        f: of each element; may depend on the channel, axis 1.
        mean_C: of x.
        variance_C: of x.
    """
    t_K = torch.linspace(-_REACH, _REACH, _NODES, dtype=mean_C.dtype, device=mean_C.device)
    weight_K1 = torch.softmax(-t_K.square() / 2, 0)[:, None]
    y_KC = f(mean_C + variance_C.clamp(min=LEAST_VARIANCE).sqrt() * t_K[:, None])
    first_C = (weight_K1 * y_KC).sum(0)
    return first_C, (weight_K1 * (y_KC - first_C).square()).sum(0)


def position_moments(
    mean_C: Tensor,
    variance_C: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a convolution's output, without bias, over positions and over independent inputs.

    At a position p the output has the mean sum W m and the variance sum W^2 v over the kernel elements that do not read
    padding; over positions the variance is the mean of the variances plus the variance of the means. Positions that
    read the same elements count together, so that this is a convolution of a few positions, whatever the size.

    Args:
        mean_C: of the inputs.
        variance_C: of the inputs.
        weight: (O, C / groups, kernel...).
        sizes: of the input, per axis.
        stride: as for torch's convolution, and so the rest.
        padding: zeros.
        dilation: of the kernel.
        groups: of channels.
    """
    axes = len(sizes)
    strides, dilations = _each(stride, axes), _each(dilation, axes)
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if isinstance(padding, str):
        both = [(s - 1) // 2 if padding == "same" else 0 for s in spans]
        ends = [s - 1 - b if padding == "same" else 0 for s, b in zip(spans, both, strict=True)]
    else:
        both = ends = list(_each(padding, axes))
    pads, counts, small = [], [], []
    for size, low, high, span, step in zip(sizes, both, ends, spans, strides, strict=True):
        length, count = _shortened(size, low, high, span, step)
        small.append(length)
        counts.append(count)
        pads.append((low, high))
    flat = list(itertools.chain.from_iterable(reversed(pads)))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    def convolved(value_C: Tensor, kernel: Tensor) -> Tensor:
        image = value_C.view(1, -1, *[1] * axes).expand(1, -1, *small)
        return convolve(F.pad(image, flat), kernel, None, strides, 0, dilations, groups)[0].flatten(1)

    share = torch.ones(1, dtype=mean_C.dtype, device=mean_C.device)
    for count in counts:
        share = (share[:, None] * torch.tensor(count, dtype=mean_C.dtype, device=mean_C.device)).flatten()
    share = share / share.sum()
    means_OP, variances_OP = convolved(mean_C, weight), convolved(variance_C, weight.square())
    mean_O = (means_OP * share).sum(1)
    between_O = ((means_OP - mean_O[:, None]).square() * share).sum(1)
    return mean_O, (variances_OP * share).sum(1) + between_O


def _shortened(size: int, low: int, high: int, span: int, stride: int) -> tuple[int, list[float]]:
    """The length of an axis that has every kind of output position once, and how many positions each stands for."""
    outputs = (size + low + high - span) // stride + 1
    left = min(math.ceil(low / stride), outputs)
    inside = max((size - span + low) // stride + 1, left)  # the first output that reads the far padding
    same = inside - left
    if same <= 1:
        return size, [1.0] * outputs
    count = [1.0] * (outputs - same + 1)
    count[left] = float(same)
    return size - (same - 1) * stride, count


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    """One number per axis; torch also takes one for all, as a number or alone in a sequence."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values
