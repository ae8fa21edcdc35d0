"""Networks whose batch norms are taken out: what the methods that do so share.

Without its norms a network is another function, so such methods draw new weights: signals then keep their size from
layer to layer, and the ends of residual branches are small enough that the sum of them does too.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lowprec.errors import UnsupportedError
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.methods.structure import Branch, residual_branches
from lowprec.norm import ScaleBatchNorm
from lowprec.norm.activation import AddReLU
from lowprec.report import ChangeReport

HE_VARIANCE = 2.0
"""Weight variance times fan-in with which ReLU networks keep the size of their signals (He et al., 2015)."""


def check_removable(norm: nn.Module) -> None:
    """Raises `UnsupportedError` for a subclass of a batch norm that computes something else, or something more."""
    forward = type(norm).forward
    if isinstance(norm, _BatchNorm) and forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise UnsupportedError(
            f"a {type(norm).__name__} is a batch norm with a forward of its own, and what that does beside the norm "
            "(timm's BatchNormAct2d: the activation) would be lost; put torch's norm and the rest in its place first"
        )


def remove_norm(model: nn.Module, norm: nn.Module) -> nn.Module:
    """Puts an Identity in place of `norm`, or the ReLU that a fused norm computes; returns it. Not for the root.

    Raises `UnsupportedError` as `check_removable` does.
    """
    check_removable(norm)
    stays: nn.Module = nn.Identity()
    if isinstance(norm, ScaleBatchNorm) and norm.act is not None:
        stays = AddReLU(norm.awaits_residual)
    inherit(norm, stays)
    replace_module(model, norm, stays)
    return stays


def remove_batch_norms(model: nn.Module, report: ChangeReport, keep: Collection[nn.Module] = ()) -> int:
    """Takes out every batch norm, torch's and this library's, but those in `keep`; returns how many."""
    count = 0
    for path, norm in list(modules_with_paths(model)):
        if isinstance(norm, (_BatchNorm, ScaleBatchNorm)) and norm is not model and norm not in keep:
            stays = remove_norm(model, norm)
            report.change(path, f"{type(norm).__name__} became {type(stays).__name__}; its parameters are dropped")
            count += 1
    return count


def add_bias(layer: nn.Module) -> bool:
    """Gives a conv or linear layer without one a bias of zeros; whether it did."""
    assert isinstance(layer, (_ConvNd, nn.Linear))
    if layer.bias is not None:
        return False
    outputs = int(getattr(layer, "out_channels", layer.weight.shape[0]))  # axis 0 counts inputs in a transposed conv
    layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))
    return True


@torch.no_grad()
def draw_weights(model: nn.Module, variance: float, report: ChangeReport) -> None:
    """Weights from N(0, variance / fan_in), biases zero; linear layers with `HE_VARIANCE`.

    Args:
        model: the network.
        variance: of a convolution's weights, times its fan-in.
        report: gets a row per layer.
    """
    for path, layer in modules_with_paths(model):
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        reason = why_not_plain(layer)
        if reason is not None:
            report.refuse(path, f"keeps its weights: {reason}")
            continue
        share = HE_VARIANCE if layer.weight.dim() == 2 else variance
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, 0.0, math.sqrt(share / fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        report.change(path, f"weights drawn from N(0, {share:.4g} / {fan_in}), bias zero")


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the weight of a conv or linear layer is not its own, or not of the kind that these methods know."""
    if parametrize.is_parametrized(layer, "weight"):
        return "its weight is parametrised"
    if isinstance(layer, _ConvTransposeNd):
        return "the method is not defined for transposed convolutions"
    return None


@torch.no_grad()
def initialise(model: nn.Module, report: ChangeReport) -> None:
    """Draws weights for a network without norms: He's variance, the ends of L residual branches 1 / sqrt(L) as large.

    The sum of L such branches has at most e times the variance of what enters them: (1 + 1/L)^L < e.
    """
    draw_weights(model, HE_VARIANCE, report)
    try:
        branches = [branch for branch in residual_branches(model) if branch.last_conv is not None]
    except UnsupportedError as error:
        report.refuse("(model)", f"residual branches keep their full size: {error}")
        return
    for branch in branches:
        _shrink(model, branch, 1 / math.sqrt(len(branches)), report)


def _shrink(model: nn.Module, branch: Branch, factor: float, report: ChangeReport) -> None:
    assert branch.last_conv is not None
    layer = model.get_submodule(branch.last_conv)
    if why_not_plain(layer) is None:
        layer.weight.mul_(factor)  # type: ignore[operator]
        report.change(
            branch.last_conv, f"ends residual branch {branch.index}: its weights are {factor:.3g} times as large"
        )
