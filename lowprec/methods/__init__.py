"""Methods that change how a whole network is trained: the table, `convert` and `attach`.

To add one: a file with its functions, one line in `METHODS`, one case in tests/test_methods.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.bounded import convert_bounded_weight_norm
from lowprec.methods.l1 import convert_l1
from lowprec.methods.method import Handle, Method, check_options, nearest_hint, options_of
from lowprec.methods.mimic_norm import attach_mimic_norm, convert_mimic_norm
from lowprec.report import ChangeReport

__all__ = ["METHODS", "Handle", "Method", "attach", "convert"]

_NORM_MATTERS = "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("l1", "module", "batch norms become L1 batch norms", _NORM_MATTERS, convert_l1),
        Method(
            "bounded_weight_norm",
            "module",
            "every row of the conv and linear weights has one fixed norm per layer",
            _NORM_MATTERS,
            convert_bounded_weight_norm,
        ),
        Method(
            "mimic_norm",
            "module",
            "no batch norm but one on the logits; conv weights are centred after every step",
            "Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278",
            convert_mimic_norm,
            attach_mimic_norm,
        ),
    )
}

# The attribute of a converted model that lists what was done to it: [{"name": ..., "args": {...}}, ...].
_RECORD = "lowprec_methods"


def convert(model: nn.Module, name: str, **args: Any) -> tuple[nn.Module, ChangeReport]:
    """Applies the method `name` to a copy of `model`; the argument stays as it is.

    The copy keeps hooks, dtype, device, training flags, shared modules and the state_dict keys that mean the same, and
    records name and arguments for `attach`. Make the optimizer from the copy's parameters.

    Returns:
        the new model and a report with a row for every place that was changed or left alone.

    Raises:
        ConfigError: no such method or option.
        UnsupportedError: the method finds nothing to convert, or acts on the data and not on a network.
    """
    method = _method_named(name)
    if method.kind == "data":
        raise UnsupportedError(f"method {name!r} acts on the data, not on a network; {method.instead}")
    check_options(method, args, options_of(method.convert) if method.convert else options_of(method.attach))
    report = ChangeReport()
    converted = deepcopy(model)
    if method.convert is not None:
        converted = method.convert(converted, report, **args)
    else:
        report.change("(model)", "is unchanged; attach(model, optimizer) makes the method act")
    record = {"name": name, "args": deepcopy(args)}
    setattr(converted, _RECORD, [*getattr(model, _RECORD, []), record])
    return converted, report


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, method: str | None = None, **args: Any) -> Handle:
    """Puts on what the methods of `model` need around an optimizer step; `handle.remove()` takes it off.

    Reads what `convert` recorded; with `method` only that one, or a step method that needs no conversion. May come
    before or after `Precision.prepare`. Where nothing is needed the handle is inert.

    Args:
        model: a converted model.
        optimizer: made from its parameters.
        method: a name in `METHODS`, or None for all that are recorded.
        args: options, instead of the recorded ones.

    Raises:
        ConfigError: no such method or option, the model was not converted by `method`, or the optimizer does not hold
            the parameters that the method acts on.
    """
    recorded = {record["name"]: record["args"] for record in getattr(model, _RECORD, [])}
    if method is not None:
        entries = [_method_to_attach(method, recorded)]
    else:
        entries = [_method_named(name) for name in recorded if _method_named(name).attach is not None]
        if args and len(entries) != 1:
            raise ConfigError(f"attach got options {', '.join(args)} but no method to give them to; name the method")
    removers = []
    for entry in entries:
        valid = options_of(entry.attach)
        check_options(entry, args, valid)
        options = {name: value for name, value in recorded.get(entry.name, {}).items() if name in valid} | args
        if entry.attach is not None:
            removers.append(entry.attach(model, optimizer, **options).remove)
    return Handle(removers)


def _method_named(name: str) -> Method:
    if name not in METHODS:
        hint = nearest_hint(name, METHODS)
        raise ConfigError(f"no method is called {name!r}; choose one of {', '.join(METHODS)}{hint}")
    return METHODS[name]


def _method_to_attach(name: str, recorded: dict[str, Any]) -> Method:
    method = _method_named(name)
    if method.kind == "data":
        raise UnsupportedError(f"method {name!r} acts on the data, not on an optimizer; {method.instead}")
    if method.kind == "module" and name not in recorded:
        raise ConfigError(
            f"attach: the model was not converted by {name!r}; call lowprec.convert(model, {name!r}) first"
        )
    return method
