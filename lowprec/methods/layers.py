"""The layers that MimicNorm puts into a network: a convolution with a scalar, a classifier with normalised logits.

Both are subclasses of the layer they replace and keep its state_dict keys, so checkpoints of the plain network load and
anything that looks for convolutions or linear layers still finds them. The scalar multiplies the weight and the bias
instead of the output: fewer elements, no tensor more for the backward pass, and the export bakes it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.functional import accumulation_dtype, cast
from lowprec.kernels import kernels_apply
from lowprec.norm.checks import InputValueError
from lowprec.weights import scale_weight

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _BranchConv(nn.Module):
    """branch_scale * conv(x), computed as conv with branch_scale * weight and branch_scale * bias. Fold: exact."""

    wide_parameters = ("branch_scale",)
    branch_scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The scaled convolution; between forward and backward it keeps what the plain one would."""
        conv: Any = self
        padding = conv.padding
        if conv.padding_mode != "zeros":
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0,) * len(conv.kernel_size)
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        # Transforms of gradients need operations of torch, and only those know inputs without a batch axis and padding
        # by name.
        plain = not kernels_apply(input) or isinstance(padding, str)
        compute: Any = _convolved if plain or input.dim() != conv.weight.dim() else _ScaledConvolution.apply
        result: Tensor = compute(input, conv.weight, conv.bias, self.branch_scale, geometry)
        return result


class BranchConv1d(_BranchConv, nn.Conv1d):
    """See `branch_conv`."""


class BranchConv2d(_BranchConv, nn.Conv2d):
    """See `branch_conv`."""


class BranchConv3d(_BranchConv, nn.Conv3d):
    """See `branch_conv`."""


Geometry = tuple[tuple[int, ...], Any, tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, geometry: Geometry) -> Tensor:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    result: Tensor = function(
        x, scale_weight(weight, scale), None if bias is None else scale_weight(bias, scale), *geometry
    )
    return result


class _ScaledConvolution(torch.autograd.Function):
    """`_convolved`, but for the backward the scaled weight is computed again instead of kept: it is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.geometry = geometry
        return _convolved(x, weight, bias, scale, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs_x, needs_weight, needs_bias, needs_scale = ctx.needs_input_grad[:4]
        half = grads[0].dtype
        # As in forward: operands of the type of the output, on a CPU with the arithmetic of `HalfArithmetic`.
        wide = accumulation_dtype(half) if grads[0].device.type == "cpu" else half
        grad, kept, scaled = (cast(cast(value, half), wide) for value in (grads[0], x, scale_weight(weight, scale)))
        mask = [needs_x, needs_weight or needs_scale, bias is not None and (needs_bias or needs_scale)]
        found = torch.ops.aten.convolution_backward(
            grad, kept, scaled, None if bias is None else list(bias.shape), stride, padding, dilation, False,
            [0] * len(stride), groups, mask,
        )  # fmt: skip
        grad_x, grad_scaled, grad_shift = (None if value is None else cast(value, half) for value in found)
        exact = accumulation_dtype(weight.dtype, scale.dtype)
        grad_scale = scale.new_zeros((), dtype=exact) if needs_scale else None
        results: list[Tensor | None] = []
        for param, value in ((weight, grad_scaled), (bias, grad_shift)):
            if param is None or value is None:
                results.append(None)
                continue
            arrived = cast(cast(value, param.dtype), exact)
            if grad_scale is not None:
                grad_scale = grad_scale + (arrived * cast(param, exact)).sum()
            results.append(cast(arrived * cast(scale, exact), param.dtype))
        grad_scale = None if grad_scale is None else cast(grad_scale, scale.dtype)
        return None if grad_x is None else cast(grad_x, x.dtype), *results, grad_scale, None


_BRANCH_CONV: dict[type[nn.Module], type[BranchConv1d | BranchConv2d | BranchConv3d]] = {
    nn.Conv1d: BranchConv1d,
    nn.Conv2d: BranchConv2d,
    nn.Conv3d: BranchConv3d,
}


def conv_as(conv: Conv, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Conv:
    """One of torch's convolutions as the subclass that `classes` has for it, with its parameter objects."""
    geometry: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    make: Any = classes[type(conv)]
    new: Conv = make(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta", **geometry)
    new.weight, new.bias = conv.weight, conv.bias
    return new


def branch_conv(conv: Conv, scale: float) -> nn.Module:
    """The branch form of one of torch's convolutions, with its parameter objects and `branch_scale` = `scale`.

    The scalar is 0-d, float32 or wider, and stays so in the half modes.
    """
    new = conv_as(conv, _BRANCH_CONV)
    dtype = accumulation_dtype(conv.weight.dtype)
    new.branch_scale = nn.Parameter(torch.tensor(scale, dtype=dtype, device=conv.weight.device))
    return new


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
