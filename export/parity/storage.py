"""How an artefact stores its values: what the rounding-noise floor perturbs them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.formats import FP16, FP32, FloatFormat, format_named, round_to

PRECISION_FORMATS = {"mixed": FP16, "int8": FP32}
"""The floating format of the precisions that are no format themselves: of what is narrow, and of what is not int8."""


@dataclass(frozen=True, eq=False)
class Storage:
    """One format for most values, float32 for some, whole multiples of a step for quantised ones.

    Args:
        name: of the precision, as reports show it.
        format: of every value that nothing else is said of.
        wide: names of values that are stored in float32.
        steps: by name of a quantised value, the distance of neighbouring stored values, in a shape that broadcasts
            against it.
    """

    name: str
    format: FloatFormat
    wide: frozenset[str] = frozenset()
    steps: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: FloatFormat | Storage) -> Storage:
        """A storage, or the one in which every value is of the format."""
        return stored if isinstance(stored, Storage) else cls(stored.name, stored)

    def format_of(self, name: str) -> FloatFormat:
        """The floating format of a value."""
        return FP32 if name in self.wide else self.format

    def holds(self, name: str, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of the values are stored as they are."""
        step = self.steps.get(name)
        if step is None:
            return np.asarray(round_to(values, self.format_of(name)) == values)
        return np.asarray(np.rint(values / step) * step == values)


def format_of_precision(name: str) -> FloatFormat:
    """The floating format of a precision; raises `ConfigError` for an unknown one."""
    return PRECISION_FORMATS.get(name) or format_named(name)
