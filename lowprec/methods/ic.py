"""The method `ic`: batch norm and dropout move from behind the weight layers to before them.

A unit conv - BN - ReLU becomes ReLU - BN - Dropout - conv: what a weight layer reads is whitened as far as is cheap.
ReLUs and sums stay where the network has them, so a pre-activation block becomes the published residual block,
x + conv(IC(relu(conv(IC(relu(x)))))), and a block with a ReLU after the sum has that ReLU on its shortcut too.

Which layers: the published rule is "before each weight layer". So depthwise convolutions, the 1x1 convolutions of
shortcuts and the classifier get one each, and layers that read the same tensor one each too. Only what reads the
network's input has none: there is no ReLU before it, and dropping pixels is another method.

What the fold leaves: nothing before linear layers and convolutions that read no zero padding. Between a ReLU and a
zero-padded convolution one operation per channel stays, because a shift can pass neither.

Source: Chen, Chen, Shi, Hsieh, Liao, Zhang, Rethinking the Usage of Batch Normalization and Dropout in the Training of
Deep Neural Networks, arXiv 1905.05928.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.functional import accumulation_dtype, cast
from lowprec.methods.layers import check_two_samples
from lowprec.methods.method import nearest_hint
from lowprec.methods.norm_free import add_bias, remove_norm
from lowprec.methods.replace_norm import replace_norms
from lowprec.methods.rewrite import modules_at, modules_with_paths
from lowprec.methods.structure import traced
from lowprec.norm import NORMS, ScaleBatchNorm, is_norm
from lowprec.report import ChangeReport


class ICLayer(nn.Module):
    """Mixin: layer(dropout(norm(x))), the norm over the channels that the layer reads.

    Dropout is elementwise. It is computed in float32 or wider and rounded to the dtype of x: the factor 1 / (1 - p)
    rounded to a half would move the mean of every activation. In evaluation the layer is a per-channel affine before
    the weights. Fold: exact, borders included.

    In training the second moment of what the weights read is 1 / (1 - p) times that in evaluation (1.053 at 0.05), for
    zero-mean inputs; norms further on keep running statistics of the larger, those of evaluation are measured by
    `lowprec.calibration.recompute_batch_stats`.
    """

    norm: nn.Module
    drop: nn.Dropout

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer, of its normalised and thinned input."""
        linear = isinstance(self, nn.Linear)
        check_two_samples(self, input, input.shape[-1 if linear else 1], "ic normalises what each layer reads")
        flat = linear and input.dim() != 2
        x = self.norm(input.flatten(0, -2)).reshape(input.shape) if flat else self.norm(input)
        if self.drop.training:
            x = cast(self.drop(cast(x, accumulation_dtype(x.dtype))), x.dtype)
        return super().forward(x, *args, **kwargs)


class ICLinear(ICLayer, nn.Linear):
    """See `ICLayer`; axes before the last all count as samples."""


class ICConv1d(ICLayer, nn.Conv1d):
    """See `ICLayer`."""


class ICConv2d(ICLayer, nn.Conv2d):
    """See `ICLayer`."""


class ICConv3d(ICLayer, nn.Conv3d):
    """See `ICLayer`."""


class ICConvTranspose1d(ICLayer, nn.ConvTranspose1d):
    """See `ICLayer`."""


class ICConvTranspose2d(ICLayer, nn.ConvTranspose2d):
    """See `ICLayer`."""


class ICConvTranspose3d(ICLayer, nn.ConvTranspose3d):
    """See `ICLayer`."""


_IC: dict[type[nn.Module], tuple[type[nn.Module], type[_BatchNorm]]] = {
    nn.Linear: (ICLinear, nn.BatchNorm1d),
    nn.Conv1d: (ICConv1d, nn.BatchNorm1d),
    nn.Conv2d: (ICConv2d, nn.BatchNorm2d),
    nn.Conv3d: (ICConv3d, nn.BatchNorm3d),
    nn.ConvTranspose1d: (ICConvTranspose1d, nn.BatchNorm1d),
    nn.ConvTranspose2d: (ICConvTranspose2d, nn.BatchNorm2d),
    nn.ConvTranspose3d: (ICConvTranspose3d, nn.BatchNorm3d),
}


def convert_ic(
    model: nn.Module, report: ChangeReport, *, p: float = 0.05, norm: str = "bn", skip: Sequence[str] = ()
) -> nn.Module:
    """Takes the batch norms between layers out and puts a norm and dropout before every layer but the first.

    Weights stay, and layers get a bias where they have none. A norm that no layer comes before (of the network's input)
    or after (of its output) stays. Synchronised norms in, synchronised norms out.

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        p: the share of elements that dropout sets to zero.
        norm: "bn", or a name in `NORMS`.
        skip: module paths of layers that get no IC layer.

    Raises:
        ConfigError: an option out of range, or a path in `skip` that there is not.
        UnsupportedError: fx cannot trace the network, it is converted already, or no batch norm is between layers.
    """
    if not 0 <= p < 1:
        raise ConfigError(f"ic: p is {p}; give the share of elements to drop, from 0 to below 1")
    if norm not in ("bn", *NORMS):
        raise ConfigError(f"ic: norm is {norm!r}; choose one of bn, {', '.join(NORMS)}{nearest_hint(norm, NORMS)}")
    if any(isinstance(module, ICLayer) for module in model.modules()):
        raise UnsupportedError("method 'ic' was applied to this network already; convert the one it came from")
    skipped = modules_at(model, skip, "skip")
    flow = _flow(model)
    removed = _remove_norms(model, flow, report)
    for path, layer in modules_with_paths(model):
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        added = " and got a bias of zeros" if add_bias(layer) else ""
        reason = "left out by skip" if layer in skipped else _why_not(layer, flow)
        if reason is not None:
            report.refuse(path, f"has no IC layer before it{added}: {reason}")
            continue
        _put_before(layer, p, removed)
        report.change(path, f"reads its input through a norm ({norm}) and dropout of {p:g}{added}")
    if norm != "bn":
        replace_norms(model, ChangeReport(), "ic", norm, None, "tree", fuse=False)
    return model


def _remove_norms(model: nn.Module, flow: _Flow, report: ChangeReport) -> list[nn.Module]:
    removed: list[nn.Module] = []
    for path, norm in list(modules_with_paths(model)):
        if not isinstance(norm, (_BatchNorm, ScaleBatchNorm)) or norm not in flow.called:
            continue
        end = "the network's input" if norm in flow.first else "its output" if norm in flow.last else None
        if end is not None:
            report.refuse(path, f"is a norm of {end}, not between layers; it stays")
            continue
        stays = remove_norm(model, norm)
        report.change(path, f"{type(norm).__name__} became {type(stays).__name__}; its parameters are dropped")
        removed.append(norm)
    if not removed:
        raise UnsupportedError(f"method 'ic' found no batch norm between the layers of {type(model).__name__}")
    return removed


def _put_before(layer: Any, p: float, removed: list[nn.Module]) -> None:
    """Makes a layer an `ICLayer` in place, so that whatever hangs on it stays."""
    kind, norm = _IC[type(layer)]
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    place: Any = {"device": layer.weight.device, "dtype": accumulation_dtype(layer.weight.dtype)}
    joined = next((norm for norm in removed if isinstance(norm, nn.SyncBatchNorm)), None)
    layer.__class__ = kind
    if joined is not None:
        layer.norm = nn.SyncBatchNorm(channels, process_group=joined.process_group, **place)
    else:
        layer.norm = norm(channels, **place)
    layer.drop = nn.Dropout(p)
    layer.train(layer.training)


@dataclass(frozen=True)
class _Flow:
    """The modules that a network calls, and those of them that one call at least finds first or last.

    Args:
        called: all.
        first: no layer comes before.
        last: no layer comes after.
    """

    called: set[nn.Module]
    first: set[nn.Module]
    last: set[nn.Module]


def _flow(model: nn.Module) -> _Flow:
    graph, modules = traced(model), dict(model.named_modules())
    calls = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    layers = {node for node, module in calls.items() if _is_layer(module)}
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if any(other in layers or other in behind for other in node.all_input_nodes):
            behind.add(node)
    ahead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in layers or user in ahead for user in node.users):
            ahead.add(node)
    first = {module for node, module in calls.items() if node not in behind}
    return _Flow(set(calls.values()), first, {module for node, module in calls.items() if node not in ahead})


def _is_layer(module: nn.Module) -> bool:
    """Whether it has weights: convolutions, linear and recurrent layers, embeddings."""
    return not is_norm(module) and not isinstance(module, nn.PReLU) and any(True for _ in module.parameters())


def _why_not(layer: nn.Module, flow: _Flow) -> str | None:
    if layer not in flow.called:
        return "the network does not call it as a layer of its own"
    if layer in flow.first:
        return "it reads the network's input"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrised; convert with ic first"
    if type(layer) not in _IC or "forward" in vars(layer):
        return f"it is a {type(layer).__name__} that may compute something else than torch's own class"
    return None
