"""The method `weight_norm_lp`: bounded weight norm with another norm.

Why: the 2-norm squares, and squares of half weights vanish; the 1-norm, the maximum and the mean of the k largest stay
in the range of the weights. The bound is fixed as in `bounded_weight_norm`, the root mean square of the rows' initial
norms, so that layers start at about their size whatever the norm.

Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018, Lp weight normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lowprec.errors import ConfigError
from lowprec.methods.bounded import check_growth, hold_growth, normalise_weights
from lowprec.methods.method import Handle
from lowprec.report import ChangeReport

LP = "weight_norm_lp"

# What p may be, and the (p, k) it stands for; names, because a config file or a JSON record may have no infinity.
_NORMS: dict[float | str, float] = {1: 1.0, 2: 2.0, math.inf: math.inf, "inf": math.inf, "topk": math.inf}
# The authors' runs with top-k batch norm take the 10 largest.
_DEFAULT_K = 10


def convert_weight_norm_lp(
    model: nn.Module,
    report: ChangeReport,
    *,
    p: float | str = 1,
    k: int | None = None,
    skip: Sequence[str] = (),
    learned: bool = False,
    sphere: bool = False,
    correct_growth: bool = False,
) -> nn.Module:
    """Parametrises the weights of every layer that has rows: w_i = rho * v_i / ||v_i||.

    Args:
        model: a private copy.
        report: gets a row per weight.
        p: 1, 2, "inf" (the largest |v|), or "topk" (the mean of the k largest |v|).
        k: for p = "topk", 10 unless given; a shorter row takes all it has.
        skip: as in `bounded_weight_norm`, like the other options.
        learned: one learned gain per channel under one bound per layer.
        sphere: `attach` holds ||v_i|| at rho.
        correct_growth: `attach` corrects the steps for the growth of ||v_i||.

    Raises:
        ConfigError: no such norm, or a bad combination of options.
        UnsupportedError: no layer could be parametrised.
    """
    order, count = norm_named(p, k)
    check_growth(sphere, correct_growth)
    kept = sphere or correct_growth
    return normalise_weights(model, report, LP, skip, p=order, k=count, learned=learned, on_sphere=kept)


def attach_weight_norm_lp(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sphere: bool = False, correct_growth: bool = False
) -> Handle:
    """Holds the norms of v, or corrects the steps for their growth; see `convert_weight_norm_lp`."""
    return hold_growth(model, optimizer, LP, sphere, correct_growth)


def norm_named(p: float | str, k: int | None = None) -> tuple[float, int | None]:
    """`(p, k)` as `weights.row_norms` takes them, from what a user writes.

    >>> norm_named("topk"), norm_named(1)
    ((inf, 10), (1.0, None))
    """
    if isinstance(p, bool) or p not in _NORMS:
        raise ConfigError(f"weight_norm_lp: p = {p!r} is not a norm here; choose one of 1, 2, 'inf', 'topk'")
    if p != "topk":
        if k is not None:
            raise ConfigError(f"weight_norm_lp: k = {k!r} was given with p = {p!r}; k belongs to p = 'topk'")
        return _NORMS[p], None
    count = _DEFAULT_K if k is None else k
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"weight_norm_lp: k = {k!r} is not a positive whole number")
    return math.inf, count
