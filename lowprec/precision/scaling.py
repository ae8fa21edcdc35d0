"""The loss scale at work: what the loss is multiplied by, whether gradients are finite, what becomes of the scale.

Two ways with the same calls. On a CPU everything is known at once. On other devices asking would make the host wait for
the device in every step, so scale, counters and verdict stay there: `landed` is a tensor, every consequence a `where`,
and what a person should hear of comes up to `LATE` steps later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowprec.errors import ConfigError, ScaleFloorError
from lowprec.precision.averaging import whole
from lowprec.precision.overflow import OverflowWatch
from lowprec.precision.scale import LossScale, ScalePolicy, is_power_of_two

LATE = 16
"""Steps after which a verdict that stayed on the device is read at the latest."""


class Scaling(Protocol):
    """A loss scale for one model."""

    last_overflow: str | None

    @property
    def factor(self) -> float | Tensor:
        """What the loss is multiplied by."""

    @property
    def value(self) -> float:
        """The scale as a number."""

    def judge(self, names: Sequence[str], grads: Sequence[Tensor]) -> bool | Tensor:
        """Divides gradients by the scale, in place, and says whether all are finite."""

    def explain(self, landed: bool | Tensor) -> None:
        """After `judge`, while gradients are there: finds out where an overflow began."""

    def settle(self, landed: bool | Tensor) -> None:
        """After the step: moves the scale. Raises `ScaleFloorError`."""

    def state(self) -> dict[str, Any]:
        """Scale and counters."""

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state()`. Raises `ConfigError` if the scale is not one of the policy's."""


class HostScaling:
    """Everything is known at once.

    Args:
        policy: how the scale moves.
        watch: of the model.
    """

    def __init__(self, policy: ScalePolicy, watch: OverflowWatch) -> None:
        self.last_overflow: str | None = None
        self._scale = LossScale.start(policy)
        self._watch = watch

    @property
    def factor(self) -> float:
        """The scale."""
        return self._scale.value

    @property
    def value(self) -> float:
        """The scale."""
        return self._scale.value

    @torch.no_grad()
    def judge(self, names: Sequence[str], grads: Sequence[Tensor]) -> bool:
        """Reads one number back."""
        return bool(_unscaled(grads, 1.0 / self._scale.value).all())

    def explain(self, landed: bool | Tensor) -> None:
        """Runs the forward once more where the step is skipped."""
        if not landed:
            self.last_overflow = self._watch.explain(self._scale.value)

    def settle(self, landed: bool | Tensor) -> None:
        """One value after another."""
        if not landed and self._scale.exhausted:
            raise floor_error(self._scale.value, str(self.last_overflow))
        self._scale = self._scale.update(bool(landed))

    def state(self) -> dict[str, Any]:
        """Scale and counters."""
        scale = self._scale
        return {"scale": scale.value, "landed_in_a_row": scale.landed_in_a_row, "overflows_left": scale.overflows_left}

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state()`."""
        self._scale = loaded_scale(self._scale.policy, state)


@dataclass
class _Verdict:
    """What a step came to, on its way from the device."""

    numbers: Tensor  # landed, at the floor, scale, and for each gradient whether it was finite
    arrived: Any  # an event, or None
    names: list[str]
    order: list[str]


class DeviceScaling:
    """Nothing is asked of the device; see the module.

    Args:
        policy: how the scale moves.
        watch: of the model.
        device: where the model is.
    """

    def __init__(self, policy: ScalePolicy, watch: OverflowWatch, device: torch.device) -> None:
        self.last_overflow: str | None = None
        self._policy = policy
        self._watch = watch
        self._device = device
        self._flags: tuple[Sequence[str], Tensor] | None = None
        self._pending: deque[_Verdict] = deque()
        self._put(LossScale.start(policy))

    def _put(self, scale: LossScale) -> None:
        self._value = torch.tensor(scale.value, dtype=torch.float32, device=self._device)
        self._streak = torch.tensor(scale.landed_in_a_row, dtype=torch.int32, device=self._device)
        self._left = torch.tensor(scale.overflows_left, dtype=torch.int32, device=self._device)

    @property
    def factor(self) -> Tensor:
        """The scale, on the device."""
        return self._value

    @property
    def value(self) -> float:
        """The scale; waits for the device."""
        return float(self._value)

    @torch.no_grad()
    def judge(self, names: Sequence[str], grads: Sequence[Tensor]) -> Tensor:
        """A 0-d tensor."""
        flags = _unscaled(grads, self._value.reciprocal())
        self._flags = names, flags
        return flags.all()

    def explain(self, landed: bool | Tensor) -> None:
        """Comes later."""

    @torch.no_grad()
    def settle(self, landed: bool | Tensor) -> None:
        """`LossScale.update` in tensors; then reads what is `LATE` steps old."""
        policy = self._policy
        landed = torch.as_tensor(landed, device=self._device)
        floor = ~landed & (self._value <= policy.min_scale) & (self._left <= 1)
        names, flags = self._flags or ((), landed.new_ones(0))
        self._pending.append(self._sent(torch.cat([torch.stack([landed, floor, self._value]), flags.float()]), names))
        grown = landed & (self._streak + 1 >= policy.growth_interval)
        shrunk = ~landed & (self._left <= 1)
        factor = torch.where(grown, policy.growth_factor, torch.where(shrunk, policy.backoff_factor, 1.0))
        self._value = (self._value * factor).clamp(policy.min_scale, policy.max_scale)
        self._streak = torch.where(landed & ~grown, self._streak + 1, 0)
        self._left = torch.where(
            grown, policy.hysteresis, torch.where(landed, self._left, (self._left - 1).clamp(min=1))
        ).to(torch.int32)
        self._flags = None
        while len(self._pending) > LATE:
            self._read(self._pending.popleft())

    def _sent(self, numbers: Tensor, names: Sequence[str]) -> _Verdict:
        numbers, event = numbers.detach(), None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _Verdict(numbers, event, list(names), self._watch.order())

    def _read(self, verdict: _Verdict) -> None:
        if verdict.arrived is not None:
            verdict.arrived.synchronize()  # long done
        landed, floor, scale, *finite = verdict.numbers.tolist()
        if landed:
            return
        bad = {name for name, fine in zip(verdict.names, finite, strict=True) if not fine}
        first = next((name for name in verdict.order if name in bad), None)
        self.last_overflow = self._watch.gradient_phrase(first, scale)
        if floor:
            raise floor_error(scale, self.last_overflow)

    def state(self) -> dict[str, Any]:
        """Scale and counters; waits for the device."""
        return {
            "scale": self.value,
            "landed_in_a_row": int(self._streak),
            "overflows_left": int(self._left),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state()`; verdicts that are on their way are forgotten."""
        self._put(loaded_scale(self._policy, state))
        self._pending.clear()


def floor_error(scale: float, where: str) -> ScaleFloorError:
    """The error of an overflow for which there is no smaller scale."""
    return ScaleFloorError(
        f"the loss scale is at its floor of {scale:g} and gradients still overflow, first in {where}; weights and "
        "buffers are as before this step: lower the learning rate, normalise that layer, or keep it wide"
    )


def loaded_scale(policy: ScalePolicy, state: dict[str, Any]) -> LossScale:
    """A stored scale. Raises `ConfigError` if it is outside of the policy."""
    value = state["scale"]
    if not is_power_of_two(value) or not policy.min_scale <= value <= policy.max_scale:
        raise ConfigError(f"the stored loss scale {value} is outside {policy.min_scale} to {policy.max_scale}")
    return LossScale(policy, float(value), int(state["landed_in_a_row"]), int(state["overflows_left"]))


def _unscaled(grads: Sequence[Tensor], inverse: float | Tensor) -> Tensor:
    """Multiplies gradients in place; which of them are finite, as a bool tensor."""
    torch._foreach_mul_(list(grads), inverse)
    largest = torch._foreach_norm(list(grads), float("inf"))  # NaN and infinity survive a maximum
    return torch.stack([whole(value).to(largest[0].device) for value in largest]).isfinite()
