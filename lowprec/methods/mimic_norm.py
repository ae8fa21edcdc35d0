"""The method `mimic_norm`: no batch norm inside the network, one on the logits, weights centred after every step.

A method for training from the start: the affine parameters of the norms it removes are dropped, because without the
norms they belong to another function. Centring acts on the weights after the optimizer step instead of inside forward:
it is a linear projection P, so P(w - lr u) = w - lr P u, the same path for SGD, at no cost in forward, and the stored
weights are what is shipped.

Source: Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278, and the authors' code where it differs (`recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.layers import NormalizedLinear, branch_conv
from lowprec.methods.method import Handle
from lowprec.methods.norm_free import HE_VARIANCE, add_bias, draw_weights, remove_norm
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.methods.structure import Branch, Structure, read_structure
from lowprec.report import ChangeReport
from lowprec.weights import centre_, is_centred

Recipe = Literal["code", "paper"]

# Each centred convolution before a ReLU loses the share 1/pi of its variance; the authors' code makes up for it with a
# gain of about 1/sqrt(1 - 1/pi) = 1.2112 per convolution, rounded to 1.2.
_GAIN_PER_CONV = 1.2
# Weight variance times fan-in: He's 2 where branch scalars hold the gain; in networks without branches the authors'
# 2.8, or the 2 / (1 - 1/pi) = 2.934 of the paper's theorem 3.
_PLAIN_VARIANCE = 2.8
_PAPER_VARIANCE = 2.0 / (1.0 - 1.0 / math.pi)
# Without affine parameters the logits of C classes have variance 1, so the cross-entropy of a perfect, balanced
# classifier cannot fall below ln(1 + (C-1) exp(-C / sqrt(C-1))): 0.278 for C = 10, 0.177 for 20, 0.038 for 50. Up to
# this many classes a learned scalar lifts the floor.
_MAX_CLASSES_WITH_TEMPERATURE = 20


def convert_mimic_norm(
    model: nn.Module,
    report: ChangeReport,
    *,
    init: bool = True,
    recipe: Recipe = "code",
    min_fan_in: int = 50,
    grouped: bool = False,
    temperature: bool | None = None,
) -> nn.Module:
    """Rewrites a network for MimicNorm.

    Batch norms after conv and linear layers become Identity; those layers, and every convolution, get a bias; the last
    convolution of the l-th residual branch is multiplied by a learned scalar that starts at 1.2^k / l, k its number of
    convolutions (the authors' code), or 1 / sqrt(l) (the paper); the classifier's logits are batch-normalised; convs
    with groups 1 and fan-in above `min_fan_in` are centred, now and after every step (`attach`).

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        init: whether to draw new weights: normal, variance c / fan_in with c = 2 in a network with residual branches
            and 2.8 in one without (code) or 2.934 (paper); 2 / fan_in for linear layers; biases zero.
        recipe: "code" or "paper", where they differ.
        min_fan_in: convs are centred when in_channels / groups * kernel elements is larger, and larger than 1.
        grouped: whether those with groups are, too. The authors' CIFAR script has 50 and grouped convolutions, their
            ImageNet script 1 and none.
        temperature: whether the logits get a learned scalar; None: when there are at most 20 classes.

    Raises:
        UnsupportedError: fx cannot trace the network, it has no final Linear, or no batch norm follows a layer.
    """
    if recipe not in ("code", "paper"):
        raise ConfigError(f"mimic_norm: recipe {recipe!r} is unknown; choose one of code, paper")
    structure = read_structure(model)
    if not structure.norms:
        found = f": {structure.other_norms[0].name} {structure.other_norms[0].reason}" if structure.other_norms else ""
        raise UnsupportedError(
            f"method 'mimic_norm' found no batch norm after a conv or linear layer in {type(model).__name__}{found}"
        )
    report.refused += structure.other_norms
    _remove_norms(model, structure, report)
    if init:
        plain = HE_VARIANCE if structure.branches else _PLAIN_VARIANCE
        draw_weights(model, plain if recipe == "code" else _PAPER_VARIANCE, report)
    for branch in structure.branches:
        _scale_branch(model, branch, recipe, report)
    model = _normalise_logits(model, structure.classifier, temperature, report)
    _centre_now(model, min_fan_in, grouped, report)
    return model


def attach_mimic_norm(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, min_fan_in: int = 50, grouped: bool = False
) -> Handle:
    """Centres the weights after every optimizer step and every `load_state_dict`.

    Acts on what the optimizer moves, float32 masters where there are any; the half weights are their rounding, with a
    mean of at most 2^-11 of their mean size. Loaded weights that are centred up to that stay to the bit.

    Raises:
        ConfigError: the optimizer holds none of the weights.
    """
    from lowprec.precision.masters import master_of

    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    layers = [conv for _, conv in _centred_convs(model, min_fan_in, grouped)]
    owned = [conv for conv in layers if id(conv.weight) in held or id(master_of(conv.weight)) in held]
    if layers and not owned:
        raise ConfigError(
            f"attach('mimic_norm'): the optimizer holds none of the {len(layers)} weights to centre; "
            f"make it from the parameters of the converted model"
        )

    def centre(*_: Any) -> None:
        # Looked up at every step, because Precision.prepare may make the masters after this was attached.
        centre_([master_of(conv.weight) for conv in owned])

    def centre_loaded(*_: Any) -> None:
        # The weights themselves too: masters that were made later follow them after this.
        weights = [weight for conv in owned for weight in {conv.weight, master_of(conv.weight)}]
        centre_([weight for weight in weights if not is_centred(weight)])

    hooks = [optimizer.register_step_post_hook(centre), model.register_load_state_dict_post_hook(centre_loaded)]  # type: ignore[no-untyped-call]
    return Handle([hook.remove for hook in hooks])


def _remove_norms(model: nn.Module, structure: Structure, report: ChangeReport) -> None:
    for path, producer in structure.norms.items():
        norm = model.get_submodule(path)
        stays = remove_norm(model, norm)
        add_bias(model.get_submodule(producer))
        kind = f"{type(norm).__name__} after {producer}"
        report.change(path, f"{kind} became {type(stays).__name__}; its parameters are dropped")
    for path, conv in modules_with_paths(model):
        if isinstance(conv, _ConvNd) and add_bias(conv):
            report.change(path, "got a bias of zeros")


def _scale_branch(model: nn.Module, branch: Branch, recipe: Recipe, report: ChangeReport) -> None:
    if branch.last_conv is None:
        report.refuse(branch.name, f"residual branch {branch.index} gets no scalar: {branch.reason}")
        return
    scale = _GAIN_PER_CONV**branch.convs / branch.index if recipe == "code" else 1 / math.sqrt(branch.index)
    old = model.get_submodule(branch.last_conv)
    assert isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    new = branch_conv(old, scale)
    inherit(old, new)
    replace_module(model, old, new)
    report.change(branch.last_conv, f"residual branch {branch.index} ends here: scalar starts at {scale:.6g}")


def _normalise_logits(model: nn.Module, path: str, temperature: bool | None, report: ChangeReport) -> nn.Module:
    old = model.get_submodule(path)
    if type(old) is not nn.Linear:
        raise UnsupportedError(
            f"MimicNorm normalises the logits of a final torch.nn.Linear, but {path!r} is a {type(old).__name__}"
        )
    learn = old.out_features <= _MAX_CLASSES_WITH_TEMPERATURE if temperature is None else temperature
    new = NormalizedLinear(old, learn)
    new.norm.train(old.training)
    inherit(old, new)
    model = replace_module(model, old, new)
    extra = f" and a learned scalar lifts the loss floor of {loss_floor(old.out_features):.3g}" if learn else ""
    report.change(path, f"its logits are batch-normalised without affine parameters{extra}")
    return model


def loss_floor(classes: int) -> float:
    """Least cross-entropy of C classes on logits of batch variance 1: ln(1 + (C-1) exp(-C / sqrt(C-1))).

    With balanced batches and perfect separation the right logit is sqrt(C-1) and the others are -1/sqrt(C-1).

    >>> round(loss_floor(10), 6)
    0.278439
    """
    if classes < 2:
        return 0.0
    return math.log1p((classes - 1) * math.exp(-classes / math.sqrt(classes - 1)))


def _centred_convs(model: nn.Module, min_fan_in: int, grouped: bool) -> Iterator[tuple[str, _ConvNd]]:
    for path, conv in modules_with_paths(model):
        if isinstance(conv, _ConvNd) and _why_not_centred(conv, min_fan_in, grouped) is None:
            yield path, conv


def _why_not_centred(conv: _ConvNd, min_fan_in: int, grouped: bool) -> str | None:
    if isinstance(conv, _ConvTransposeNd):
        return "the method is not defined for transposed convolutions"
    if parametrize.is_parametrized(conv, "weight"):
        return "its weight is parametrised"
    if conv.groups != 1 and not grouped:
        return f"it has {conv.groups} groups"
    fan_in = conv.weight[0].numel()
    if fan_in == 1:
        return "its fan-in is 1, so that centred it would be zero"
    if fan_in <= min_fan_in:
        return f"its fan-in {fan_in} is not above {min_fan_in}"
    return None


def _centre_now(model: nn.Module, min_fan_in: int, grouped: bool, report: ChangeReport) -> None:
    for path, conv in modules_with_paths(model):
        if not isinstance(conv, _ConvNd):
            continue
        reason = _why_not_centred(conv, min_fan_in, grouped)
        if reason is not None:
            report.refuse(path, f"is not centred: {reason}")
            continue
        centre_([conv.weight])
        report.change(path, "weights centred per output channel, now and after every step")
