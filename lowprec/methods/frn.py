"""The method `frn`: batch norms become filter response norms, and ReLUs after them learned thresholds.

A filter response norm takes no mean off, so what comes out of it may lie far from zero, where a ReLU passes all or
nothing; the threshold max(y, tau) is the ReLU that learns where to stand. It takes the ReLU's place and stands nowhere
else, as in the ports of the paper's networks: a norm that is added before the ReLU has its threshold after the
addition, and a norm with no ReLU, or with another activation, has none. A ReLU that cannot be taken out stays, without
a threshold before it: max(y, 0) has no gradient for a tau that starts at 0.

No sample depends on another, so any batch size trains, one included. Meant for training from the start: on a trained
network it changes the function. Training needs a warm-up of the learning rate.

Source: Singh, Krishnan, Filter Response Normalization Layer, CVPR 2020.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.fuse import ReluPlan
from lowprec.methods.replace_norm import why_not_replaced
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.methods.tracing import is_hooked
from lowprec.norm import FilterResponseNorm, ScaleBatchNorm, is_norm
from lowprec.report import ChangeReport


def convert_frn(
    model: nn.Module, report: ChangeReport, *, learn_eps: bool | None = None, eps: float = 1e-6
) -> nn.Module:
    """Batch norms, torch's and this library's, synchronised ones too, become filter response norms.

    Weight and bias are kept, as parameters and in value: they scale and shift what was divided, as before. Running
    statistics go.

    Args:
        model: a private copy.
        report: gets a row per norm, which says what became of the ReLU after it.
        learn_eps: whether the norms learn what is added to eps; None for those that may get inputs (N, C), batch norms
            of one dimension. A norm that does not refuses maps of one element.
        eps: added to the mean of the squares, instead of the old norm's own, which is for variances.

    Raises:
        ConfigError: eps is not a positive number.
        UnsupportedError: there is nothing to replace.
    """
    if not 0 < eps < math.inf:
        raise ConfigError(f"frn: eps is {eps!r}; it must be a positive number, and 1e-6 is the published one")
    norms: dict[nn.Module, str] = {}
    for path, module in modules_with_paths(model):
        if not is_norm(module):
            continue
        reason = None if isinstance(module, ScaleBatchNorm) else why_not_replaced(module)
        if reason is not None:
            report.refuse(path, reason)
        else:
            norms[module] = path
    if not norms:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(f"method 'frn' found no batch norm to replace in {type(model).__name__}{found}")
    plan = ReluPlan(model, [norm for norm in norms if not is_hooked(norm) and getattr(norm, "act", None) is None])
    plan.take_out()
    for norm, path in norms.items():
        new, threshold = _from_batch_norm(norm, plan, eps, learn_eps)
        model = replace_module(model, norm, new)
        learned = ", with a learned eps" if new.learned_eps is not None else ""
        report.change(path, f"{type(norm).__name__} became FilterResponseNorm{learned}; {threshold}")
    return model


def _from_batch_norm(
    old: nn.Module, plan: ReluPlan, eps: float, learn_eps: bool | None
) -> tuple[FilterResponseNorm, str]:
    """The norm that takes the place of `old`, and a sentence about its threshold."""
    assert isinstance(old, (_BatchNorm, ScaleBatchNorm))
    like = next((value for value in (old.weight, old.running_mean) if value is not None), torch.empty(0))
    inside = isinstance(old, ScaleBatchNorm) and old.act is not None  # convert has fused the ReLU before
    if learn_eps is None:
        learn_eps = isinstance(old, nn.BatchNorm1d) or getattr(old, "input_ranks", ()) == (2, 3)
    new = FilterResponseNorm(
        old.num_features, eps, False, like.device, like.dtype,
        learn_eps=learn_eps, threshold=inside or old in plan.fused,
    )  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    new.awaits_residual = old.awaits_residual if isinstance(old, ScaleBatchNorm) else False
    if old in plan.fused:
        new.awaits_residual = plan.adds(old)
    inherit(old, new)
    return new, _about_threshold(old, plan, inside)


def _about_threshold(old: nn.Module, plan: ReluPlan, inside: bool) -> str:
    if inside:
        return "its threshold stands for the ReLU inside"
    if old in plan.fused:
        where = "after the addition, " if plan.adds(old) else ""
        return f"its threshold stands {where}for the ReLU {plan.relus_after(old)}"
    if old in plan.reasons:
        return f"no threshold: {plan.reasons[old]}"
    if is_hooked(old):
        return "no threshold: there are hooks on the norm, which would see the threshold's output instead"
    return "no threshold, as no ReLU follows"
