"""The table of precision modes.

What modes differ in is data, so that a new one is an entry here and no branch on its name elsewhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowprec.errors import ConfigError


@dataclass(frozen=True)
class Mode:
    """What a precision mode does.

    Args:
        name: as in `Precision(name)`.
        half: the half type by its torch name, or None for float32 throughout.
        update: how half weights take an optimizer's update, a name in `updates.UPDATES`; None where weights stay
            float32 and are narrowed where they are used.
        scaled: the loss is scaled dynamically.
        summary: one sentence.
    """

    name: str
    half: str | None
    update: str | None
    scaled: bool
    summary: str


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("fp32", None, None, False, "float32 throughout, no scale; a non-finite gradient reaches the weights"),
        Mode("bf16", "bfloat16", None, False, "float32 weights, bfloat16 operands in products, no scale, as fp32 else"),
        Mode("fp16-autocast", "float16", None, True, "float32 weights, half operands in products, float32 losses"),
        Mode("fp16-master", "float16", "master", True, "half weights and activations, float32 masters (4 bytes each)"),
        Mode("fp16-pure", "float16", "nearest", True, "half weights alone; updates below half an ulp are lost"),
        Mode("fp16-kahan", "float16", "kahan", True, "half weights and a half Kahan term (2 bytes each) keep updates"),
        Mode("fp16-stochastic", "float16", "stochastic", True, "half weights alone, rounded at random so that the mean"
             " keeps every update"),
    )
}  # fmt: skip


def mode_named(name: str) -> Mode:
    """The mode called `name`.

    Raises:
        ConfigError: no such mode; the message names the nearest.
    """
    if name in MODES:
        return MODES[name]
    near = difflib.get_close_matches(str(name), MODES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown precision {name!r}; {hint}the modes are {', '.join(MODES)}")
