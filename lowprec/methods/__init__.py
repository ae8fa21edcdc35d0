"""Methods that change how a whole network is trained: `convert` and `attach`, over the table in `table.py`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.method import Handle, Method, check_options, nearest_hint, options_of
from lowprec.methods.norm_record import NormRecord
from lowprec.methods.recording import Recorder, record_norms
from lowprec.methods.table import METHODS
from lowprec.report import ChangeReport

__all__ = ["METHODS", "Handle", "Method", "NormRecord", "Recorder", "attach", "convert", "record_norms"]

# The attribute of a converted model that lists what was done to it: [{"name": ..., "args": {...}}, ...].
_RECORD = "lowprec_methods"


def convert(model: nn.Module, name: str, **args: Any) -> tuple[nn.Module, ChangeReport]:
    """Applies the method `name` to a copy of `model`; the argument stays as it is.

    Options of the method's `attach` may be given here too; `attach` then takes them from the copy.

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
    own = options_of(method.convert)
    check_options(method, args, list(dict.fromkeys([*own, *options_of(method.attach)])))
    report = ChangeReport()
    converted = _copy_of(model)
    if method.convert is not None:
        converted = method.convert(converted, report, **{name: args[name] for name in args if name in own})
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
    handles = []
    for entry in entries:
        valid = options_of(entry.attach)
        check_options(entry, args, valid)
        options = {name: value for name, value in recorded.get(entry.name, {}).items() if name in valid} | args
        if entry.attach is not None:
            handles.append(entry.attach(model, optimizer, **options))
    return handles[0] if len(handles) == 1 else Handle([handle.remove for handle in handles])


def _copy_of(model: nn.Module) -> nn.Module:
    # A process group cannot be copied and need not be: it is the connection, not state of the model.
    groups = (getattr(module, "process_group", None) for module in model.modules())
    memo = {id(group): group for group in groups if group is not None}
    try:
        return deepcopy(model, memo)
    except (RuntimeError, TypeError, ValueError) as error:
        lazy = any(isinstance(value, nn.UninitializedBuffer) for value in model.buffers())
        advice = "run one batch through the model first" if lazy else "remove what deepcopy refuses"
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"convert works on a copy, but {type(model).__name__} has none: {reason}; {advice}"
        ) from None


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
