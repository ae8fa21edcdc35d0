"""The layers that MimicNorm puts into a network: a convolution with a scalar, a classifier with normalised logits.

Both are subclasses of the layer they replace and keep its state_dict keys, so checkpoints of the plain network load and
anything that looks for convolutions or linear layers still finds them. The scalar multiplies the weight and the bias
instead of the output: fewer elements, nothing stored for the backward pass, and the export bakes it in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.functional import accumulation_dtype, cast
from lowprec.norm.checks import InputValueError
from lowprec.weights import scale_weight

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class BranchConv1d(nn.Conv1d):
    """branch_scale * conv(x), computed as conv with branch_scale * weight and branch_scale * bias. Fold: exact."""

    wide_parameters = ("branch_scale",)
    branch_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The scaled convolution."""
        output: Tensor = self._conv_forward(input, *_scaled_parameters(self))
        return output


class BranchConv2d(nn.Conv2d):
    """branch_scale * conv(x), computed as conv with branch_scale * weight and branch_scale * bias. Fold: exact."""

    wide_parameters = ("branch_scale",)
    branch_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The scaled convolution."""
        output: Tensor = self._conv_forward(input, *_scaled_parameters(self))
        return output


class BranchConv3d(nn.Conv3d):
    """branch_scale * conv(x), computed as conv with branch_scale * weight and branch_scale * bias. Fold: exact."""

    wide_parameters = ("branch_scale",)
    branch_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The scaled convolution."""
        output: Tensor = self._conv_forward(input, *_scaled_parameters(self))
        return output


_BRANCH_CONV: dict[type[nn.Module], type[BranchConv1d | BranchConv2d | BranchConv3d]] = {
    nn.Conv1d: BranchConv1d,
    nn.Conv2d: BranchConv2d,
    nn.Conv3d: BranchConv3d,
}


def branch_conv(conv: Conv, scale: float) -> nn.Module:
    """The branch form of one of torch's convolutions, with its parameter objects and `branch_scale` = `scale`.

    The scalar is 0-d, float32 or wider, and stays so in the half modes.
    """
    geometry: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    make = _BRANCH_CONV[type(conv)]
    new = make(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta", **geometry)
    new.weight, new.bias = conv.weight, conv.bias
    dtype = accumulation_dtype(conv.weight.dtype)
    new.branch_scale = nn.Parameter(torch.tensor(scale, dtype=dtype, device=conv.weight.device))
    return new


def _scaled_parameters(conv: BranchConv1d | BranchConv2d | BranchConv3d) -> tuple[Tensor, Tensor | None]:
    bias = None if conv.bias is None else scale_weight(conv.bias, conv.branch_scale)
    return scale_weight(conv.weight, conv.branch_scale), bias


def check_two_samples(layer: nn.Module, input: Tensor, channels: int, what: str) -> None:
    """Raises `InputValueError` if a training batch has one value per channel: then a norm over them gives zeros."""
    if layer.training and input.numel() <= channels:
        raise InputValueError(
            f"{what} over the batch, so it trains on two samples or more, not on {input.numel() // channels}; "
            "bnp trains on one, and so does kalman where there are positions to average over"
        )


class NormalizedLinear(nn.Linear):
    """logit_scale * norm(linear(x)), norm a batch norm without affine parameters over the logits.

    The norm and the scalar are computed in float32 or wider (the dtype of the norm's buffers) and the result is rounded
    to the dtype of the linear layer's output. Axes before the last all count as samples. Fold: exact.

    Args:
        linear: the classifier; its parameter objects are taken over.
        learn_scale: whether there is a learned scalar `logit_scale`, starting at 1.
    """

    wide_parameters = ("logit_scale",)
    logit_scale: nn.Parameter | None

    def __init__(self, linear: nn.Linear, learn_scale: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        dtype, device = accumulation_dtype(linear.weight.dtype), linear.weight.device
        self.norm = nn.BatchNorm1d(linear.out_features, affine=False, device=device, dtype=dtype)
        one = nn.Parameter(torch.ones((), dtype=dtype, device=device)) if learn_scale else None
        self.register_parameter("logit_scale", one)

    def forward(self, input: Tensor) -> Tensor:
        """Logits whose batch mean is 0 and batch variance 1 (times the square of the scalar)."""
        check_two_samples(self, input, self.in_features, "mimic_norm normalises its logits")
        y = F.linear(input, self.weight, self.bias)
        z = y if self.norm.running_mean is None else cast(y, torch.promote_types(y.dtype, self.norm.running_mean.dtype))
        z = self.norm(z) if z.dim() == 2 else self.norm(z.flatten(0, -2)).reshape(z.shape)
        if self.logit_scale is not None:
            z = z * self.logit_scale
        return cast(z, y.dtype)
