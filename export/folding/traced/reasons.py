"""Says in one line why torch.export could not trace a network, and where.

torch's own messages are pages long, name its environment variables and leave out the module.
"""

from __future__ import annotations

import re
from types import TracebackType

from torch import nn


def reason_from_failure(error: BaseException, network: nn.Module) -> str:
    """One line: which module torch.export could not trace, and why.

    Args:
        error: what torch.export raised.
        network: the network that it was given, to turn the failing frame's module into its path.
    """
    path = _module_path(error.__traceback__, network)
    where = f"'{path}' ({type(network.get_submodule(path)).__name__})" if path else type(network).__name__
    text = f"{type(error).__name__}: {error}"
    fixed = re.search(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", text)
    if fixed:
        return (
            f"{where} cannot be traced: its code fixes the axis '{fixed[1]}' to {fixed[2]}; "
            f"take lengths from the input's shape, or name the free axes in dynamic_shapes"
        )
    limits = re.search(r"Suggested fixes:\n((?:\s+\S+ = .*\n)+)", text)
    if limits:
        advice = ", ".join(line.strip() for line in limits[1].splitlines())
        return f"{where} cannot be traced for every length of its free axes; give dynamic_shapes with {advice}"
    unmet = re.search(r"Not all values of (\w+) = (\S+) .*satisfy the generated guard (.+)", text)
    if unmet:
        axis, expression, guard = unmet.groups()
        needs = guard.rstrip(".").replace(expression, axis)
        return (
            f"{where} cannot be traced for every length of the axis '{axis}': it needs {needs}; "
            f"give dynamic_shapes with narrower limits"
        )
    if re.search(r"data-dependent|GuardOnDataDependent", text):
        return (
            f"{where} cannot be traced: its control flow depends on the values of a tensor; "
            f"write it with torch.where or torch.cond"
        )
    return f"{where} cannot be traced: {_first_line(str(error)) or type(error).__name__}; see torch.export's limits"


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.rstrip(".") if len(line) <= 200 else f"{line[:197]}..."


def _module_path(traceback: TracebackType | None, network: nn.Module) -> str:
    """Path of the innermost module of the network that was running when the error was raised."""
    paths = {id(module): path for path, module in network.named_modules()}
    found = ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = paths.get(id(owner), found) or found
        traceback = traceback.tb_next
    return found
