"""The method `bn_free_binary`: networks of signs without batch norms.

`scaled_ws` with signs: the convolutions inside the network convolve sign(x / std + shift) with the signs of their
standardised weights; ReLUs, behind which every sign would be +1, become PReLUs that shift and bend per channel; and
gradients are clipped in proportion to the weights. What reads the network's input, the classifier and other linear
layers stay real; convolutions of a shortcut have binary weights and real inputs, as the authors have them.

The shifts before the signs start at minus the mean that their input would have, where the authors, whose networks have
PReLUs throughout, start at 0: so a network keeps working whose ReLUs are functions, which cannot be replaced.

Source: Chen, Zhang, Ouyang, Liu, Shen, Wang, "BNN - BN = ?": Training binary neural networks without batch
normalization, CVPR workshops 2021, arXiv 2104.08215, and the authors' code.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.agc import attach_agc
from lowprec.methods.binary import BinaryStandardisation, Estimator, RPReLU, binary_conv
from lowprec.methods.method import Handle
from lowprec.methods.norm_free import draw_weights
from lowprec.methods.rewrite import inherit, replace_module
from lowprec.methods.scaled_ws import Place, read_places, standardise, take_norms_out
from lowprec.methods.signals import is_elementwise
from lowprec.methods.structure import layers_before, residual_branches, traced
from lowprec.norm import ScaleBatchNorm
from lowprec.report import ChangeReport

_KEEP_CHANNELS = (
    nn.Identity, _DropoutNd, _BatchNorm, ScaleBatchNorm, _MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd,
)  # fmt: skip


def convert_bn_free_binary(
    model: nn.Module,
    report: ChangeReport,
    *,
    alpha: float = 0.2,
    estimator: Estimator = "quadratic",
    eps: float = 1e-4,
    init: bool = True,
) -> nn.Module:
    """Takes the batch norms out, makes inner convolutions binary and ReLU modules learned.

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        alpha: as in `scaled_ws`.
        estimator: of the gradient of signs: "quadratic" or "clipped", see `lowprec.methods.binary.sign`.
        eps: least fan-in times weight variance that is divided by.
        init: whether to draw weights from N(0, 1 / fan-in), biases zero.

    Raises:
        ConfigError: an option out of range.
        UnsupportedError: fx cannot trace the network, or it has no convolution to make binary.
    """
    if not (alpha > 0 and eps > 0) or estimator not in ("quadratic", "clipped"):
        raise ConfigError(
            f"bn_free_binary: alpha={alpha}, eps={eps}, estimator={estimator!r}; "
            "alpha and eps are numbers above 0, estimator quadratic or clipped"
        )
    take_norms_out(model, report)
    _bend_relus(model, report)
    places = read_places(model, alpha, report)
    real = _layers_that_read_the_input(model)
    shortcuts = {path for branch in residual_branches(model) for path in branch.shortcut}
    if init:
        draw_weights(model, 1.0, report)
    binary = 0
    for path, place in places.items():
        layer = model.get_submodule(path)
        if place.reason is not None:
            report.refuse(path, f"is not binary: {place.reason}")
        elif path in real or type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            standardise(layer, place.scale / place.std, 1.0, eps)
            report.change(path, "weight standardised; it stays real")
        elif path in shortcuts:
            standardise(layer, place.scale / place.std, 1.0, eps, BinaryStandardisation)
            report.change(path, "binary weight; a shortcut's input stays real")
        else:
            _make_binary(model, path, place, estimator, eps)
            report.change(path, f"binary weight and signs of its input, whose mean would be {place.mean:.4g}")
            binary += 1
    if not binary:
        raise UnsupportedError(f"method 'bn_free_binary' found no convolution to make binary in {type(model).__name__}")
    return model


def attach_bn_free_binary(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float = 0.02, clip_eps: float = 1e-3
) -> Handle:
    """Adaptive gradient clipping on all but the classifier; see `lowprec.methods.agc`.

    Args:
        model: the converted network.
        optimizer: made from its parameters.
        clip: 0.02 in the authors' ImageNet scripts; their program's default is 0.04.
        clip_eps: what a smaller weight norm counts as.
    """
    return attach_agc(model, optimizer, clip=clip, eps=clip_eps)


def _make_binary(model: nn.Module, path: str, place: Place, estimator: Estimator, eps: float) -> None:
    old = model.get_submodule(path)
    assert isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    new = binary_conv(old, 1 / place.std, -place.mean / place.std, estimator)
    inherit(old, new)
    replace_module(model, old, new)
    standardise(new, place.scale, 1.0, eps, BinaryStandardisation)


def _layers_that_read_the_input(model: nn.Module) -> set[str]:
    graph = traced(model)
    behind = layers_before(model, graph)
    return {str(node.target) for node in graph.nodes if node.op == "call_module" and node not in behind}


def _bend_relus(model: nn.Module, report: ChangeReport) -> None:
    """ReLU modules become `RPReLU` where all that they read comes from convolutions with one number of channels."""
    modules = dict(model.named_modules())
    channels: dict[fx.Node, int] = {}
    read: dict[str, set[int | None]] = {}
    for node in traced(model).nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        given = {channels.get(other) for other in node.all_input_nodes}
        count = given.pop() if len(given) == 1 else None
        if type(module) is nn.ReLU:
            read.setdefault(str(node.target), set()).add(count)
        if isinstance(module, _ConvNd):
            channels[node] = module.out_channels
        elif count is not None and (isinstance(module, _KEEP_CHANNELS) or is_elementwise(node, module)):
            channels[node] = count
    like = next(iter(model.parameters()), torch.empty(0))
    for path, counts in read.items():
        count = counts.pop() if len(counts) == 1 else None
        if count is None:
            report.refuse(path, "stays a ReLU: it does not read convolutions with one number of channels")
            continue
        new, old = RPReLU(count, like), modules[path]
        inherit(old, new)
        replace_module(model, old, new)
        report.change(path, f"ReLU became RPReLU over {count} channels")
