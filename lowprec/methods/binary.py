"""Binary convolutions: signs of activations times signs of weights, trained through straight-through estimators.

A sign is +1 at zero and above and -1 below, here and in an export: torch.sign gives 0 at 0, which a bit cannot hold.
Weights are standardised before they are binarised, so that no batch norm is needed to give them a size. Zero padding
adds zeros, neither +1 nor -1, as the authors have it.

Source: Chen, Zhang, Ouyang, Liu, Shen, Wang, "BNN - BN = ?", CVPR workshops 2021, arXiv 2104.08215; its layers are
those of Liu, Shen, Savvides, Cheng, ReActNet, ECCV 2020, arXiv 2003.03488.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.functional import accumulation_dtype, cast, per_channel
from lowprec.methods.layers import conv_as
from lowprec.parametrize import ScaledStandardisation
from lowprec.weights import standardised_weight

Estimator = Literal["quadratic", "clipped"]
_SLOPE = 0.25  # with which torch's PReLU starts, and so ReActNet's


def _signs(x: Tensor) -> Tensor:
    """In x's dtype, without a conversion that a trace would hold on to: an export computes this in float64 too."""
    ones = torch.ones_like(x)
    return torch.where(x >= 0, ones, -ones)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimator = estimator
        return _signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        size = x.abs()
        # The sign of NaN is -1; its slope is NaN, so that the loss scale sees it.
        clipped = torch.where(size.isnan(), size, (size <= 1).to(x.dtype))
        slope = (2 - 2 * size).clamp(min=0) if ctx.estimator == "quadratic" else clipped
        return grads[0] * slope, None


def sign(x: Tensor, estimator: Estimator = "quadratic") -> Tensor:
    """+1 where x >= 0, else -1; its gradient is that of a function which is 1 above 1 and -1 below -1.

    Args:
        x: floating point.
        estimator: "quadratic" for slope 2 - 2|x| (Bi-Real Net, ReActNet), "clipped" for slope 1, where |x| < 1.
    """
    return _Sign.apply(x, estimator)  # type: ignore[no-untyped-call, no-any-return]


def binary_weight(v: Tensor, gain_O: Tensor, constant: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """w_o = constant * gain_o * mean|u_o| * sign(u_o) for every output channel o, u the standardised v.

    To the gradient mean|u| sign(u) is u: the authors clip u to [-1, 1], which rows of norm 1 never leave. So above eps
    the gradient of v_o sums to 0 and is orthogonal to the centred v_o.

    Args:
        v: weight of a conv layer, (O, ...).
        gain_O: (O,).
        constant: a factor of the whole layer.
        eps: see `weights.standardised_weight`.

    Returns:
        like v; computed in float32 or wider, rounded once.
    """
    wide = accumulation_dtype(v.dtype, gain_O.dtype)
    gain = cast(gain_O, wide)
    u = standardised_weight(cast(v, wide), torch.ones_like(gain), 1.0, eps).flatten(1)
    binary = _Binary.apply(u)  # type: ignore[no-untyped-call]
    return cast((constant * gain[:, None] * binary).reshape(v.shape), v.dtype)


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u.abs().mean(1, keepdim=True) * _signs(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class BinaryStandardisation(ScaledStandardisation):
    """The weight of a binary convolution; see `binary_weight`, and `ScaledStandardisation` for the arguments."""

    def forward(self, v: Tensor) -> Tensor:
        """The binary weight of v."""
        return binary_weight(v, self.gain, self.constant, self.eps)


class _BinaryInput(nn.Module):
    """A convolution of signs: conv(sign(scale * x + shift)), the shift learned per input channel. Fold: the weight."""

    wide_parameters = ("shift", "scale")
    shift: nn.Parameter
    scale: Tensor
    estimator: Estimator

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of what is +1 and -1; before the sign in float32 or wider."""
        conv: Any = super()
        return conv.forward(self.signs(input))  # type: ignore[no-any-return]

    def signs(self, x: Tensor) -> Tensor:
        """What the convolution reads, like x."""
        wide = accumulation_dtype(x.dtype, self.shift.dtype)
        spatial = [1] * (getattr(self, "weight").dim() - 2)  # noqa: B009  a convolution's, which this class is not yet
        moved = cast(x, wide) * cast(self.scale, wide) + cast(self.shift, wide).reshape(-1, *spatial)
        return cast(sign(moved, self.estimator), x.dtype)


class BinaryConv1d(_BinaryInput, nn.Conv1d):
    """See `binary_conv`."""


class BinaryConv2d(_BinaryInput, nn.Conv2d):
    """See `binary_conv`."""


class BinaryConv3d(_BinaryInput, nn.Conv3d):
    """See `binary_conv`."""


_CLASSES: dict[type[nn.Module], type[BinaryConv1d | BinaryConv2d | BinaryConv3d]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Conv3d: BinaryConv3d,
}


def binary_conv(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, scale: float = 1.0, shift: float = 0.0, estimator: Estimator = "quadratic"
) -> BinaryConv1d | BinaryConv2d | BinaryConv3d:
    """One of torch's convolutions as conv(sign(scale * x + shift)), with its parameter objects.

    Args:
        conv: keeps its weight as it is; `BinaryStandardisation` makes it binary.
        scale: brings the input to standard deviation 1, so that the estimator's slope reaches it; a buffer.
        shift: what the learned shifts (C_in,) start from.
        estimator: see `sign`.
    """
    new: Any = conv_as(conv, _CLASSES)
    place: dict[str, Any] = {"dtype": accumulation_dtype(conv.weight.dtype), "device": conv.weight.device}
    new.shift = nn.Parameter(torch.full((conv.in_channels,), shift, **place))
    new.register_buffer("scale", torch.tensor(scale, **place))
    new.estimator = estimator
    return new  # type: ignore[no-any-return]


class RPReLU(nn.PReLU):
    """prelu(x + before) + after, with slope and both shifts learned per channel, in float32 or wider.

    Args:
        channels: C of inputs (N, C, ...).
        like: gives dtype and device.
    """

    wide_parameters = ("weight", "before", "after")

    def __init__(self, channels: int, like: Tensor) -> None:
        place: dict[str, Any] = {"dtype": accumulation_dtype(like.dtype), "device": like.device}
        super().__init__(channels, _SLOPE, **place)
        self.before = nn.Parameter(torch.zeros(channels, **place))
        self.after = nn.Parameter(torch.zeros(channels, **place))

    def forward(self, input: Tensor) -> Tensor:
        """Like the input, rounded once."""
        wide = accumulation_dtype(input.dtype, self.before.dtype)
        moved = cast(input, wide) + per_channel(cast(self.before, wide), input)
        y = F.prelu(moved, cast(self.weight, wide)) + per_channel(cast(self.after, wide), input)
        return cast(y, input.dtype)
