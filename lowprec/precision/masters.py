"""What belongs to half parameters: float32 masters, Kahan terms.

A half weight at 1.0 ignores every update below 2^-11, so the optimizer works on a float32 copy and the half weight is
its rounding; or what rounding cut off is kept beside the weight. Either is reached from the parameter through a weak
table instead of an attribute of the parameter: an attribute would travel into `torch.save(model)`, and a table keyed by
the living tensor needs no names, survives tied weights and disappears with the model. A deep copy of a model has
neither, as it has no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_masters: WeakIdKeyDictionary = WeakIdKeyDictionary()
_kahan_terms: WeakIdKeyDictionary = WeakIdKeyDictionary()


def master_of(param: Tensor) -> Tensor:
    """What the optimizer moves in place of `param` now: a float32 master or stand-in, else `param` itself."""
    master: Tensor = _masters.get(param, param)  # type: ignore[no-untyped-call]
    return master


def make_master(param: nn.Parameter) -> nn.Parameter:
    """Makes a leaf that holds the exact value of `param`, in float32 or wider, and registers it as its master."""
    wide = torch.promote_types(param.dtype, torch.float32)
    master = nn.Parameter(param.detach().to(dtype=wide, copy=True), requires_grad=param.requires_grad)
    set_master(param, master)
    return master


def set_master(param: Tensor, master: nn.Parameter | None) -> None:
    """Makes `master` what the optimizer moves in place of `param`; None for `param` itself."""
    if master is not None:
        _masters[param] = master
    elif param in _masters:
        del _masters[param]


@torch.no_grad()
def weights_from_masters(params: Iterable[Tensor]) -> None:
    """Sets every parameter that has a master to the master's value, rounded once to the parameter's type."""
    pairs = [(param, master) for param in params if (master := master_of(param)) is not param]
    if pairs:
        torch._foreach_copy_([param for param, _ in pairs], [master for _, master in pairs])


def kahan_term_of(param: Tensor) -> Tensor:
    """The Kahan term of `param`, which has one."""
    term: Tensor = _kahan_terms[param]
    return term


def make_kahan_term(param: Tensor, term: Tensor) -> None:
    """Registers `term` as what rounding cut off of `param`."""
    _kahan_terms[param] = term


@torch.no_grad()
def weights_were_loaded(params: Iterable[Tensor]) -> None:
    """Makes masters and Kahan terms follow weights that were changed from outside (a `load_state_dict`).

    A master that still rounds to its weight keeps its finer value; a term belongs to the weight it was made with.
    """
    for param in params:
        master = master_of(param)
        if master is not param and not torch.equal(master.to(param.dtype), param):
            master.copy_(param)
        if param in _kahan_terms:
            kahan_term_of(param).zero_()
