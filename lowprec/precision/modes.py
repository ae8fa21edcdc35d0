"""The table of precision modes.

What modes differ in is data, so that a new one is an entry here and no branch on its name elsewhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowprec.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Mode:
    """What a precision mode does.

    Args:
        name: as in `Precision(name)`.
        half: the half type by its torch name, or None for float32 throughout.
        narrow_weights: weights are stored in the half type, the optimizer works on float32 masters; else weights stay
            float32 and are narrowed where they are used.
        scaled: the loss is scaled dynamically.
        summary: one sentence.
    """

    name: str
    half: str | None
    narrow_weights: bool
    scaled: bool
    summary: str


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("fp32", None, False, False, "float32 throughout, no scale; a non-finite gradient reaches the weights"),
        Mode("fp16-autocast", "float16", False, True, "float32 weights, half operands in products, float32 losses"),
        Mode("fp16-master", "float16", True, True, "half weights and activations, float32 masters in the optimizer"),
    )
}

PLANNED = ("bf16", "fp16-pure", "fp16-kahan", "fp16-stochastic")
"""Names that are reserved for modes that this version does not have."""


def mode_named(name: str) -> Mode:
    """The mode called `name`.

    Raises:
        UnsupportedError: a reserved name.
        ConfigError: no such mode; the message names the nearest.
    """
    if name in MODES:
        return MODES[name]
    works = ", ".join(MODES)
    if name in PLANNED:
        raise UnsupportedError(f"precision {name!r} is not in this version; the modes that work are {works}")
    near = difflib.get_close_matches(str(name), [*MODES, *PLANNED], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown precision {name!r}; {hint}the modes that work are {works}")
