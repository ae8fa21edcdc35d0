"""An optimizer step that happens if a number on the device says so, without asking the device.

Torch's fused optimizers take such a number. For the others parameters and state are copied before the step and chosen
from afterwards, which is exact for whatever computes on the device; what also keeps numbers on the host (the step count
of an Adam that is neither fused nor capturable), or has hooks that do, is asked about and waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


class ConditionalStep:
    """`optimizer.step()` under a condition.

    Args:
        optimizer: any.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known: set[tuple[int, str]] | None = None

    def __call__(self, landed: bool | Tensor) -> None:
        """Steps if `landed`; a bool is decided on the spot."""
        if isinstance(landed, bool):
            if landed:
                self._optimizer.step()
        elif self._is_fused():
            self._optimizer.found_inf = (~landed).float()  # type: ignore[attr-defined]
            try:
                self._optimizer.step()
            finally:
                del self._optimizer.found_inf  # type: ignore[attr-defined]
        elif self._known is None or self._known != self._state_names() or self._keeps_more(landed.device):
            if bool(landed):
                self._optimizer.step()
                self._known = self._state_names()
        else:
            self._step_and_choose(landed)

    def _is_fused(self) -> bool:
        fused = all(group.get("fused") for group in self._optimizer.param_groups)
        supported = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return fused and bool(supported) and not self._is_hooked()

    def _is_hooked(self) -> bool:
        """Whether something of the user's or of a method's counts on being called for steps that land only."""
        return bool(self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks)

    def _state_names(self) -> set[tuple[int, str]]:
        return {(id(param), key) for param, state in self._optimizer.state.items() for key in state}

    def _keeps_more(self, device: torch.device) -> bool:
        """Whether something moves with a step that is no tensor on the device."""
        values = [value for state in self._optimizer.state.values() for value in state.values() if value is not None]
        elsewhere = any(not isinstance(value, Tensor) or value.device.type != device.type for value in values)
        return elsewhere or self._is_hooked()

    @torch.no_grad()
    def _step_and_choose(self, landed: Tensor) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [tensor for tensor in (*params, *states) if isinstance(tensor, Tensor)]
        before = [tensor.detach().clone() for tensor in tensors]
        with torch.enable_grad():
            self._optimizer.step()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(landed.to(tensor.device), tensor, old))
