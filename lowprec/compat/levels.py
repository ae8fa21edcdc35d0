"""What apex.amp's opt levels and properties are in this engine's modes and loss scales."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.precision.scale import is_power_of_two

_LEVELS = {"O0": "fp32", "O1": "fp16-autocast", "O2": "fp16-master", "O3": "fp16-pure"}
_TRUE, _FALSE = (True, "True"), (False, "False")
_NEVER_SHRINKS = 2**31  # overflows before a static scale would change


def mode_of(level: str, master_weights: bool | None) -> str:
    """The precision mode of a level. Raises `ConfigError` for an unknown one."""
    if level not in _LEVELS:
        hint = " (the letter O, not the number zero)" if str(level).startswith("0") else ""
        raise ConfigError(f"opt_level is {level!r}; give O0, O1, O2 or O3{hint}")
    if master_weights is None or level in ("O0", "O1"):
        return _LEVELS[level]
    return "fp16-master" if master_weights else "fp16-pure"


def refuse_foreign(
    level: str,
    cast_model_type: torch.dtype | None,
    patch_torch_functions: bool | None,
    keep_batchnorm_fp32: bool | str | None,
    cast_model_outputs: torch.dtype | None,
) -> None:
    """Raises `UnsupportedError` for what apex has and this engine has not, `ConfigError` for what is nothing."""
    own_type = {"O0": torch.float32, "O1": None}.get(level, torch.float16)
    if cast_model_type not in (None, own_type):
        raise UnsupportedError(f"cast_model_type {cast_model_type} is not what {level} is here; leave it out")
    if patch_torch_functions not in (None, level == "O1"):
        raise UnsupportedError(f"patch_torch_functions={patch_torch_functions} does not go with {level}; leave it out")
    if keep_batchnorm_fp32 in _FALSE:
        raise UnsupportedError("batch norms stay float32 at every level; leave keep_batchnorm_fp32 out")
    if keep_batchnorm_fp32 not in (None, *_TRUE):
        raise ConfigError(f"keep_batchnorm_fp32 is {keep_batchnorm_fp32!r}; give True or leave it out")
    if cast_model_outputs not in (None, torch.float32):
        raise UnsupportedError(f"outputs are float32, cast_model_outputs is {cast_model_outputs}; cast them yourself")


def scale_arguments(
    level: str, loss_scale: float | str | None, min_loss_scale: float | None, max_loss_scale: float
) -> dict[str, Any]:
    """The arguments of `Precision` that the scale is made by."""
    if loss_scale is None and level == "O3":
        loss_scale = 1.0
    if loss_scale in (None, "dynamic"):
        low = 2.0**-2 if min_loss_scale is None else rounded_scale(min_loss_scale)
        high = rounded_scale(max_loss_scale)
        return {"init_scale": min(max(2.0**16, low), high), "min_scale": low, "max_scale": high}
    value = rounded_scale(loss_scale)
    return {"init_scale": value, "min_scale": value, "max_scale": value, "hysteresis": _NEVER_SHRINKS}


def rounded_scale(value: Any) -> float:
    """A loss scale rounded down to a power of two, with a warning where that changes it. Raises `ConfigError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"loss scale is {value!r}; give 'dynamic' or a positive number")
    if is_power_of_two(number):
        return number
    rounded = 2.0 ** math.floor(math.log2(number))
    warnings.warn(f"loss scale {number:g} is taken as {rounded:g}, a power of two, which rounds nothing", stacklevel=3)
    return float(rounded)
