"""The method `bounded_weight_norm`: the weight rows of a network's layers get a fixed norm.

Norm layers stay where they are: with bounded weights `mean_only` may thin them out, and a network that has none trains
as it is. What `bounded_weight_norm` and `weight_norm_lp` share is here: they differ in the norm alone.

A gradient of w(v) is orthogonal to v, so every step of gradient descent lengthens v, and the step of its direction,
lr / ||v||^2, shrinks as training goes on. That is left alone unless asked: `sphere` puts v back on its sphere after
each step, `correct_growth` lets v grow and lengthens the step instead. Both act in `attach`, on the float32 masters
where there are any, so nothing is done for a step that did not land and nothing is written during a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.method import Handle
from lowprec.methods.rewrite import modules_at, modules_with_paths
from lowprec.parametrize import (
    GainedWeightNorm,
    WeightNorm,
    register_bounded_weight_norm,
    weight_names,
    why_not_bounded,
    zero_rows,
)
from lowprec.precision.masters import master_of
from lowprec.report import ChangeReport
from lowprec.weights import output_rows, row_norms, scale_update

BOUNDED = "bounded_weight_norm"


def convert_bounded_weight_norm(
    model: nn.Module,
    report: ChangeReport,
    *,
    skip: Sequence[str] = (),
    learned: bool = False,
    sphere: bool = False,
    correct_growth: bool = False,
) -> nn.Module:
    """Parametrises the weights of every layer that has rows: w_i = rho * v_i / ||v_i||_2.

    Linear, conv, transposed conv, embedding, recurrent and attention layers; packed weights (the gates of an LSTM, the
    three projections of attention) have one rho. A bounded classifier has bounded logits, so its loss has a floor; name
    it in `skip` to let it grow.

    Args:
        model: a private copy.
        report: gets a row per weight.
        skip: module paths to leave as they are with everything below them, such as the classifier's.
        learned: the form of the authors' code, one learned gain per channel under one bound per layer.
        sphere: v starts at norm rho and `attach` brings it back there after every step.
        correct_growth: v starts at norm rho and `attach` multiplies each of its steps by ||v_i||^2 / rho^2: with SGD,
            with or without momentum, a run from c * v then turns every v_i exactly as the run from v does. Not for
            steps so long that v grows by the share 1 / momentum - 1 in each, which runs away, nor for an optimizer that
            divides by the size of the gradient (Adam); `sphere` is for any.

    Raises:
        ConfigError: a path in `skip` is not a module of the model, or both `sphere` and `correct_growth` are asked.
        UnsupportedError: no layer could be parametrised.
    """
    check_growth(sphere, correct_growth)
    return normalise_weights(model, report, BOUNDED, skip, learned=learned, on_sphere=sphere or correct_growth)


def attach_bounded_weight_norm(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sphere: bool = False, correct_growth: bool = False
) -> Handle:
    """Holds the norms of v, or corrects the steps for their growth; see `convert_bounded_weight_norm`."""
    return hold_growth(model, optimizer, BOUNDED, sphere, correct_growth)


def normalise_weights(
    model: nn.Module,
    report: ChangeReport,
    method: str,
    skip: Sequence[str],
    *,
    p: float = 2.0,
    k: int | None = None,
    learned: bool = False,
    on_sphere: bool = False,
) -> nn.Module:
    """Registers a weight norm on every weight that can have one; the body of both methods.

    Args:
        model: a private copy, edited in place.
        report: gets a row per weight.
        method: the name of the method, which the parametrisations carry.
        skip: module paths to leave as they are.
        p: see `weights.row_norms`.
        k: see `weights.row_norms`.
        learned: one learned gain per channel.
        on_sphere: whether v is scaled to the norm of w at once (w stays as it is).
    """
    skipped = {below for module in modules_at(model, skip, "skip") for below in module.modules()}
    for path, module in list(modules_with_paths(model)):
        if not weight_names(module) and any(param.dim() > 1 for param in module.parameters(recurse=False)):
            report.refuse(path, f"{type(module).__name__} is not a layer whose weight rows are known")
        for name in weight_names(module):
            reason = "left out by skip" if module in skipped else why_not_bounded(module, name)
            if reason is not None:
                report.refuse(path, reason)
                continue
            zeros = zero_rows(module, name)
            made = register_bounded_weight_norm(module, name, p=p, k=k, learned=learned)
            made.owner = method
            if on_sphere:
                original: Tensor = module.parametrizations[name].original  # type: ignore[index, union-attr]
                with torch.no_grad():
                    original.copy_(made.project(original))
            report.change(path, _what_was_done(made, name, zeros))
    if not report.changed:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(f"method {method!r} found no weight to normalise in {type(model).__name__}{found}")
    return model


def hold_growth(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: str, sphere: bool, correct_growth: bool
) -> Handle:
    """Attaches `sphere` or `correct_growth` to the weights that `method` parametrised; inert without either.

    Raises:
        ConfigError: both are asked, or the optimizer holds none of the weights.
    """
    check_growth(sphere, correct_growth)
    if not (sphere or correct_growth):
        return Handle()
    weights = _owned(model, optimizer, method)
    if sphere:
        return Handle([optimizer.register_step_post_hook(_Sphere(weights)).remove])
    correction = _Correction(weights)
    hooks = (optimizer.register_step_pre_hook(correction.before), optimizer.register_step_post_hook(correction.after))
    return Handle([hook.remove for hook in hooks])


class _Sphere:
    """After a step: v_i becomes rho * v_i / ||v_i||."""

    def __init__(self, weights: list[tuple[Tensor, WeightNorm]]) -> None:
        self._weights = weights

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        # Masters are looked up at every step, because Precision.prepare may make them after this was attached.
        masters = [master_of(param) for param, _ in self._weights]
        projected = [norm.project(master) for master, (_, norm) in zip(masters, self._weights, strict=True)]
        torch._foreach_copy_(masters, projected)


class _Correction:
    """Around a step: the change of v_i is multiplied by ||v_i||^2 / rho^2. Holds a copy of v for the time of a step."""

    def __init__(self, weights: list[tuple[Tensor, WeightNorm]]) -> None:
        self._weights = weights
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        """Step pre-hook."""
        self._copies = [master_of(param).detach().clone() for param, _ in self._weights]

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        """Step post-hook."""
        for (param, norm), copy in zip(self._weights, self._copies, strict=True):
            norms = row_norms(*output_rows(copy, norm.groups, norm.transposed), norm.p, norm.k)
            # A row of zeros has no length to be corrected for: its first step is the optimizer's.
            factor = torch.where(norms == 0, torch.ones_like(norms), (norms / norm.radius()).square())
            master = master_of(param)
            master.copy_(scale_update(copy, master, factor, norm.groups, norm.transposed))
        self._copies = []


def check_growth(sphere: bool, correct_growth: bool) -> None:
    """Raises `ConfigError` when both are asked."""
    if sphere and correct_growth:
        raise ConfigError("sphere and correct_growth were both asked; on its sphere v does not grow, so choose one")


def _owned(model: nn.Module, optimizer: torch.optim.Optimizer, method: str) -> list[tuple[Tensor, WeightNorm]]:
    """The parameters (each once, where layers share it) that `method` parametrised and the optimizer moves."""
    found: dict[int, tuple[Tensor, WeightNorm]] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            norm = module[0]
            if isinstance(norm, WeightNorm) and norm.owner == method:
                param: Tensor = module.original
                found.setdefault(id(param), (param, norm))
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    owned = [entry for entry in found.values() if id(entry[0]) in held or id(master_of(entry[0])) in held]
    if found and not owned:
        raise ConfigError(
            f"attach({method!r}): the optimizer holds none of the {len(found)} weights to act on; "
            f"make it from the parameters of the converted model"
        )
    return owned


def _what_was_done(made: WeightNorm, name: str, zeros: int) -> str:
    measure = f"top-{made.k} norm" if made.k is not None else f"{made.p:g}-norm"
    if isinstance(made, GainedWeightNorm):
        done = f"{name} has {measure}s of Frobenius size {float(made.bound):.6g}, shared out by a learned gain per row"
    else:
        done = f"every row of {name} has {measure} {float(made.radius()):.6g}"
    return f"{done}; {zeros} rows of zeros stay zero until their gradient moves them" if zeros else done
