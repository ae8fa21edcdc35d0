"""What a method is: a name, a kind, and up to two functions.

A method changes how a whole network is trained, so it is described by functions of a model and an optimizer rather than
by a layer: some rewrite modules, some only act around a step, some concern the data alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from lowprec.errors import ConfigError


class Handle:
    """What `attach` returns: `remove()` undoes it. A handle without removers is inert."""

    def __init__(self, removers: Iterable[Callable[[], None]] = ()) -> None:
        self._removers = list(removers)

    def remove(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        while self._removers:
            self._removers.pop()()


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`.

    Args:
        name: the name in configs and in `convert`.
        kind: "module" rewrites the network, "step" acts around the optimizer step, "data" concerns the batches.
        summary: one sentence.
        source: where it was published.
        convert: `convert(model, report, **args) -> model`; gets a private copy, may edit it in place, returns the root
            (a new object if the root itself was replaced) and fills the report. None for kinds that leave the network.
        attach: `attach(model, optimizer, **args) -> Handle`; None for a method that needs nothing around a step.
        instead: for kind "data", where the method is switched on.
        folds: what becomes of it when the network is folded; begins with "no:" where norms stay.
    """

    name: str
    kind: Literal["module", "step", "data"]
    summary: str
    source: str
    convert: Callable[..., nn.Module] | None = None
    attach: Callable[..., Handle] | None = None
    instead: str = ""
    folds: str = "nothing to fold"


def options_of(function: Callable[..., Any] | None) -> list[str]:
    """Names of the keyword-only arguments of `function`: the options a user may give."""
    if function is None:
        return []
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def check_options(method: Method, given: Mapping[str, Any], valid: list[str]) -> None:
    """Raises `ConfigError` for an option that the method does not have."""
    for name in given:
        if name not in valid:
            options = f"its options are {', '.join(valid)}" if valid else "it has none here"
            raise ConfigError(f"method {method.name!r} has no option {name!r}; {options}{nearest_hint(name, valid)}")


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest valid name, or nothing."""
    nearest = get_close_matches(name, list(valid), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
