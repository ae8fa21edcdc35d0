"""The method `one_batch_norm`: fixed scales for all norms, one batch norm before the head, and a head without it.

Every norm becomes y = K x + bias with K = 1 / sqrt(V), V the variance that its input would have in a network of unit
signals: a residual sum adds the variances of its sides, so the norm that begins block l of a pre-activation network
gets K = 1 / sqrt(l + 1). What batch norm does beyond that is left to one norm on what the classifier reads. A second
classifier reads the same without the norm; both are trained, the other one for a fifth of the loss, and it alone is
there at inference: nothing depends on running statistics.

In training a sample's logits are those of the bypass with probability `bypass`, so the expected loss of an unchanged
loop is (1 - bypass) L_normalised + bypass L_bypass, as KataGo has it with two losses. `heads="both"` returns both.

Source: KataGo, docs/KataGoMethods.md, "One Batch Norm" and "Fixed Variance Initialization".
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.affine import ChannelAffine
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.functional import accumulation_dtype, apply_channel_affine, cast
from lowprec.methods.layers import check_two_samples
from lowprec.methods.norm_free import HE_VARIANCE, check_removable, draw_weights
from lowprec.methods.rewrite import inherit, replace_module
from lowprec.methods.signals import Signal, propagate
from lowprec.methods.structure import classifier_of, traced
from lowprec.norm import ScaleBatchNorm
from lowprec.report import ChangeReport

Heads = Literal["drawn", "both"]


class FixedScale(nn.Module):
    """y = scale * x + bias, with a scale that is no parameter. Fold: exact.

    Args:
        channels: C of inputs (N, C, ...).
        scale: the constant K.
        like: gives dtype and device.
    """

    wide_parameters = ("bias",)

    def __init__(self, channels: int, scale: float, like: Tensor) -> None:
        super().__init__()
        self.scale = scale
        dtype = accumulation_dtype(like.dtype)
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """K x + bias, rounded once to x's dtype."""
        scale_C = torch.full_like(self.bias, self.scale)
        return apply_channel_affine(x, torch.zeros_like(scale_C), None, scale_C, self.bias)

    def inference_affine(self) -> ChannelAffine:
        """The same in float64."""
        shift = self.bias.detach().double().cpu().numpy()
        return ChannelAffine.from_statistics(0.0, 1.0, self.scale + 0 * shift, shift)

    def extra_repr(self) -> str:
        """Channels and scale."""
        return f"{self.bias.numel()}, scale={self.scale:.4g}"


class TwoHeads(nn.Linear):
    """A classifier that reads its input as it is, and in training a twin that reads it normalised. Fold: exact.

    Args:
        linear: the classifier; its parameter objects are the bypass's.
        bypass: the share of samples, and so of the loss, that goes to the bypass.
        heads: "drawn" for one tensor of logits in training, "both" for (normalised, bypass).
    """

    def __init__(self, linear: nn.Linear, bypass: float, heads: Heads) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        place: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.normalised = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, **place)
        self.normalised.load_state_dict(dict(linear.named_parameters(recurse=False)))
        dtype = accumulation_dtype(linear.weight.dtype)
        self.norm = nn.BatchNorm1d(linear.in_features, affine=False, device=linear.weight.device, dtype=dtype)
        self.bypass, self.heads = bypass, heads

    def forward(self, input: Tensor) -> Any:
        """Logits; in training see `heads`."""
        plain = F.linear(input, self.weight, self.bias)
        if not self.training:
            return plain
        check_two_samples(self, input, self.in_features, "one_batch_norm normalises what the classifier reads")
        flat = cast(input.flatten(0, -2), torch.promote_types(input.dtype, torch.float32))
        normalised = self.normalised(cast(self.norm(flat), input.dtype).reshape(input.shape))
        if self.heads == "both":
            return normalised, plain
        drawn = torch.rand((*plain.shape[:-1], 1), device=plain.device) < self.bypass
        return torch.where(drawn, plain, normalised)


def convert_one_batch_norm(
    model: nn.Module,
    report: ChangeReport,
    *,
    bypass: float = 0.2,
    heads: Heads = "drawn",
    init: bool = True,
) -> nn.Module:
    """Replaces every batch norm by its fixed scale and the classifier by two.

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        bypass: share of the loss of the head without the norm.
        heads: what the network returns in training, one tensor of logits or (normalised, bypass).
        init: whether to draw weights of variance 2 / fan-in, for which the scales are meant.

    Raises:
        ConfigError: an option out of range.
        UnsupportedError: fx cannot trace the network, it has no final Linear, or no batch norm.
    """
    if not 0 < bypass < 1 or heads not in ("drawn", "both"):
        raise ConfigError(
            f"one_batch_norm: bypass={bypass}, heads={heads!r}; bypass is between 0 and 1, heads drawn or both"
        )
    graph = traced(model)
    path = classifier_of(model, graph)
    old = model.get_submodule(path)
    if type(old) is not nn.Linear:
        raise UnsupportedError(f"one_batch_norm needs a final torch.nn.Linear, but {path!r} is a {type(old).__name__}")
    for module in model.modules():
        check_removable(module)
    norms = _norms(model, graph)
    if not norms:
        raise UnsupportedError(f"method 'one_batch_norm' found no batch norm in {type(model).__name__}")
    for name, variance in norms.items():
        norm: Any = model.get_submodule(name)
        if getattr(norm, "act", None) is not None:
            report.refuse(name, f"is a {type(norm).__name__} with a ReLU inside; convert the network it came from")
            continue
        like = next(iter(norm.parameters()), next(iter(norm.buffers()), torch.empty(0)))
        fixed = FixedScale(norm.num_features, 1 / math.sqrt(variance), like)
        inherit(norm, fixed)
        model = replace_module(model, norm, fixed)
        report.change(name, f"{type(norm).__name__} became a scale of 1 / sqrt({variance:.4g}) and a bias")
    if init:
        draw_weights(model, HE_VARIANCE, report)
    heads_module = TwoHeads(old, bypass, heads)
    inherit(old, heads_module)
    heads_module.train(old.training)
    report.change(path, f"reads its input as it is; a twin reads it batch-normalised, for {1 - bypass:.0%} of the loss")
    return replace_module(model, old, heads_module)


def _norms(model: nn.Module, graph: fx.Graph) -> dict[str, float]:
    """Path and input variance of each batch norm; the largest where it is called several times."""
    found: dict[str, float] = {}

    def rule(node: fx.Node, module: nn.Module | None, inputs: list[Signal]) -> Signal | None:
        if not isinstance(module, (_BatchNorm, ScaleBatchNorm)):
            return None  # weights of variance 2 / fan-in give their input's variance again, the ReLU included
        found[str(node.target)] = max(inputs[0].variance, found.get(str(node.target), 0.0))
        return Signal()

    propagate(model, graph, rule)
    return found
