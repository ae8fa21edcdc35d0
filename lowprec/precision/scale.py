"""The dynamic loss scale as a value that is updated, never mutated.

Unlike `torch.amp.GradScaler` it has a floor and a ceiling: a scale that halves without end reaches zero, and the next
finite step then divides by it and writes NaN into the weights. All scales are powers of two, so scaling and unscaling
change exponents only and round nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowprec.errors import ConfigError


@dataclass(frozen=True)
class ScalePolicy:
    """How a loss scale moves.

    Args:
        init_scale: where it starts.
        growth_factor: multiplied in after `growth_interval` landed steps in a row.
        backoff_factor: multiplied in at an overflow.
        growth_interval: landed steps in a row before it grows.
        min_scale: the floor; an overflow there is an error, not a smaller scale.
        max_scale: the ceiling.
        hysteresis: overflows before it shrinks; growth refills the count (2 is Megatron's value, 1 is torch's).

    Raises:
        ConfigError: a factor or scale is not a power of two, or the values contradict each other.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 2.0**-2
    max_scale: float = 2.0**24
    hysteresis: int = 1

    def __post_init__(self) -> None:
        for name in ("init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
            if not is_power_of_two(value := getattr(self, name)):
                raise ConfigError(f"{name} is {value}; give a power of two, so that scaling is exact")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise ConfigError(
                f"init_scale {self.init_scale} is outside min_scale {self.min_scale} to max_scale {self.max_scale}"
            )
        if self.growth_factor <= 1 or self.backoff_factor >= 1:
            raise ConfigError(
                f"growth_factor {self.growth_factor} must be above 1 and backoff_factor {self.backoff_factor} below 1"
            )
        for name in ("growth_interval", "hysteresis"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1")


def is_power_of_two(value: object) -> bool:
    """Whether `value` is a finite positive number 2^k."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return bool(math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5)


@dataclass(frozen=True)
class LossScale:
    """A loss scale and what it remembers.

    Args:
        policy: how it moves.
        value: the scale now.
        landed_in_a_row: steps since the last overflow or growth.
        overflows_left: overflows until it shrinks.
    """

    policy: ScalePolicy
    value: float
    landed_in_a_row: int
    overflows_left: int

    @classmethod
    def start(cls, policy: ScalePolicy) -> LossScale:
        """The scale before the first step."""
        return cls(policy, float(policy.init_scale), 0, policy.hysteresis)

    @property
    def exhausted(self) -> bool:
        """Whether one more overflow finds no smaller scale to go to."""
        return self.value <= self.policy.min_scale and self.overflows_left <= 1

    def update(self, landed: bool) -> LossScale:
        """The scale after a step that landed or overflowed.

        Landed: the count rises; at `growth_interval` the scale grows, up to the ceiling. Overflow: the count is zero;
        once the hysteresis is used up the scale shrinks, down to the floor, at this and each further overflow until
        it has grown again.
        """
        if not landed:
            left = self.overflows_left - 1
            if left > 0:
                return replace(self, landed_in_a_row=0, overflows_left=left)
            value = max(self.value * self.policy.backoff_factor, self.policy.min_scale)
            return replace(self, value=float(value), landed_in_a_row=0, overflows_left=1)
        count = self.landed_in_a_row + 1
        if count < self.policy.growth_interval:
            return replace(self, landed_in_a_row=count)
        value = min(self.value * self.policy.growth_factor, self.policy.max_scale)
        return replace(self, value=float(value), landed_in_a_row=0, overflows_left=self.policy.hysteresis)
