"""The method `scaled_ws`: no norms; standardised weights that hold every constant of the normaliser-free recipe.

A normaliser-free network writes h + alpha f(h / beta): it divides the trunk by its expected size beta before a branch,
multiplies activations by a gain that restores variance 1, and branches by alpha. All three are constants, and a
standardised weight has no size of its own; so here they are one constant per layer, inside the weight: the reciprocal
of the standard deviation that its input would have (`lowprec.methods.signals`), times alpha at the end of a residual
branch. Nothing is added to the activations, the network's own code runs, and the fold bakes the weights.

With ReLU this is the published network up to rounding. Other activations see h where they would see h / beta, and get
the gain of an input of that size. A trunk with an activation after every sum, which the recipe does not have, keeps its
own variance in the same way.

Source: Brock, De, Smith, Characterizing signal propagation to close the performance gap in unnormalized ResNets, arXiv
2101.08692; Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, arXiv
2102.06171; constants as in DeepMind's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.functional import accumulation_dtype
from lowprec.methods.norm_free import add_bias, draw_weights, remove_batch_norms, why_not_plain
from lowprec.methods.rewrite import modules_with_paths
from lowprec.methods.signals import Signal, after_elementwise, propagate
from lowprec.methods.structure import classifier_of, layers_before, residual_branches, traced
from lowprec.norm import ScaleBatchNorm, is_norm
from lowprec.parametrize import ScaledStandardisation, register_on_weight
from lowprec.report import ChangeReport

_STANDARDISED_VARIANCE = 1.0  # of drawn weights times fan-in; what is drawn is then next to what is computed from it
_FUNCTIONAL_NORMS = (F.batch_norm, torch.batch_norm, F.group_norm, F.layer_norm, F.instance_norm)


@dataclass(frozen=True)
class Place:
    """What a layer is in its network.

    Args:
        mean: what its input would have.
        std: the standard deviation that its input would have.
        scale: of its output: alpha where a residual branch ends in it, else 1.
        reason: why its weight cannot be standardised, or None.
    """

    mean: float
    std: float
    scale: float
    reason: str | None


def convert_scaled_ws(
    model: nn.Module,
    report: ChangeReport,
    *,
    alpha: float = 0.2,
    skip_init: bool = False,
    eps: float = 1e-4,
    init: bool = True,
) -> nn.Module:
    """Takes the batch norms out and standardises the weights of every conv and linear layer but the classifier.

    Layers get a bias where they have none, and a learned gain per output channel.

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        alpha: the standard deviation with which a residual branch joins the trunk.
        skip_init: whether the gains of the last convolution of every residual branch start at 0, so that the network
            starts as its trunk.
        eps: least fan-in times weight variance that is divided by.
        init: whether to draw weights from N(0, 1 / fan-in), biases zero; only their direction counts.

    Raises:
        ConfigError: an option out of range.
        UnsupportedError: fx cannot trace the network, or it has no layer to standardise.
    """
    if not (alpha > 0 and eps > 0):
        raise ConfigError(f"scaled_ws: alpha={alpha}, eps={eps}; both are numbers above 0")
    take_norms_out(model, report)
    places = read_places(model, alpha, report)
    if init:
        draw_weights(model, _STANDARDISED_VARIANCE, report)
    for path, place in places.items():
        if place.reason is None:
            gain = 0.0 if skip_init and place.scale != 1 else 1.0
            standardise(model.get_submodule(path), place.scale / place.std, gain, eps)
            report.change(path, _what_was_done(place, gain))
        else:
            report.refuse(path, f"is not standardised: {place.reason}")
    if all(place.reason for place in places.values()):
        raise UnsupportedError(f"method 'scaled_ws' found no weight to standardise in {type(model).__name__}")
    return model


def standardise(
    layer: nn.Module,
    constant: float,
    gain: float,
    eps: float,
    make: type[ScaledStandardisation] = ScaledStandardisation,
) -> None:
    """Puts scaled standardisation, or `make`, on the weight of a conv or linear layer, and gives it a bias."""
    assert isinstance(layer, (_ConvNd, nn.Linear))
    add_bias(layer)
    weight = layer.weight
    dtype = accumulation_dtype(weight.dtype)
    gain_O = torch.full(weight.shape[:1], gain, dtype=dtype, device=weight.device)
    register_on_weight(layer, make(gain_O, constant, eps))


def take_norms_out(model: nn.Module, report: ChangeReport) -> None:
    """Removes the batch norms that a layer comes before; the report says why others stay."""
    modules = dict(model.named_modules())
    graph = traced(model)
    behind = layers_before(model, graph)
    keep: dict[nn.Module, str] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (_BatchNorm, ScaleBatchNorm)) and node not in behind:
            keep[module] = "normalises what the network is given, whose size nothing else knows; it stays"
        if node.target in _FUNCTIONAL_NORMS[:2]:
            report.refuse(node.name, "a functional batch norm is not a module and cannot be taken out; it stays")
    for path, module in modules_with_paths(model):
        if module in keep:
            report.refuse(path, keep[module])
        elif is_norm(module) and not isinstance(module, (_BatchNorm, ScaleBatchNorm)):
            report.refuse(path, f"is a {type(module).__name__}, not a batch norm; it stays")
    remove_batch_norms(model, report, keep)


def read_places(model: nn.Module, alpha: float, report: ChangeReport) -> dict[str, Place]:
    """The conv and linear layers that a network without batch norms calls, in order.

    A layer that is called several times has the largest standard deviation of its inputs.
    """
    graph = traced(model)
    ends: set[str] = set()
    for branch in residual_branches(model):
        if branch.last_conv is None:
            report.refuse(branch.name, f"residual branch {branch.index} keeps its full size: {branch.reason}")
        else:
            ends.add(branch.last_conv)
    logits = _classifier(model, graph)
    places: dict[str, Place] = {}

    def rule(node: fx.Node, module: nn.Module | None, inputs: list[Signal]) -> Signal | None:
        if (module is not None and is_norm(module)) or node.target in _FUNCTIONAL_NORMS:
            return Signal()
        if not isinstance(module, (_ConvNd, nn.Linear)):
            return after_elementwise(node, module, inputs)
        path = str(node.target)
        reason = "it makes the logits" if path == logits else _why_not(module)
        scale = alpha if path in ends and reason is None else 1.0
        std = math.sqrt(inputs[0].variance) or 1.0  # a constant input has nothing to restore
        if path not in places or std > places[path].std:
            places[path] = Place(inputs[0].mean, std, scale, reason)
        return Signal(0.0, scale**2)

    propagate(model, graph, rule)
    for path, layer in modules_with_paths(model):
        if isinstance(layer, (_ConvNd, nn.Linear)) and not any(name in places for name in path.split(" = ")):
            report.refuse(path, "is not standardised: the network never calls it as a layer of its own")
    return places


def _classifier(model: nn.Module, graph: fx.Graph) -> str | None:
    try:
        return classifier_of(model, graph)
    except UnsupportedError:
        return None  # a network of another kind: every layer is like the others


def _why_not(layer: _ConvNd | nn.Linear) -> str | None:
    if isinstance(layer.weight, UninitializedParameter):
        return "it is lazy and has no weight yet; run one batch through the model first"
    reason = why_not_plain(layer)
    if reason is None and not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed by something else (a pruning mask, an older weight norm); undo that first"
    if reason is None and layer.weight[0].numel() == 1:
        return "its fan-in is 1, so that less its mean it would be zero"
    return reason


def _what_was_done(place: Place, gain: float) -> str:
    end = f", times alpha {place.scale:g} at the end of a residual branch" if place.scale != 1 else ""
    return f"weight standardised, for an input of standard deviation {place.std:.4g}{end}; gains start at {gain:g}"
