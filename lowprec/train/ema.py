"""A float32 moving average of a model, for evaluation.

In float32 because in half it stands still: with a decay of 0.9998 each step adds 1/5000 of a difference, less than half
an ulp. Of the values that the optimizer knows, masters and Kahan terms included, and of the running statistics, which
would not fit averaged weights otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- d * average + (1 - d) * value after each landed step.

    After n steps d = min(decay, (1 + n) / (10 + n)). Integer buffers are copied.

    Args:
        decay: its largest value, 0 to below 1.
        values: what is averaged, by name in the model's state_dict.
    """

    def __init__(self, decay: float, values: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.average = {name: _wide(value) for name, value in values.items()}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], landed: int) -> None:
        """Takes in the values after the `landed`-th landed step, the first being 1."""
        decay = min(self.decay, (1 + landed) / (10 + landed))
        for name, average in self.average.items():
            value = values[name]
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), 1 - decay)
            else:
                average.copy_(value)

    def put_into(self, model: nn.Module) -> dict[str, Tensor]:
        """Gives the model the average, rounded to the types of its parameters and buffers; returns what it held."""
        tensors = self._tensors(model)
        own = {name: tensor.data for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.data = self.average[name].to(tensor.dtype, copy=True)
        return own

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the average."""
        own = self.put_into(model)
        try:
            yield
        finally:
            for name, tensor in self._tensors(model).items():
                tensor.data = own[name]

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        found = [*model.named_parameters(), *model.named_buffers()]  # shared ones once
        return {name: tensor for name, tensor in found if name in self.average}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores `average`. Raises `KeyError` if a name is missing."""
        for name, average in self.average.items():
            average.copy_(state[name])


def averaged_values(model: nn.Module, wide_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is averaged of a model: parameters as the optimizer knows them, and the buffers that are saved."""
    state = model.state_dict()
    return {name: wide_weights.get(name, value) for name, value in state.items() if isinstance(value, Tensor)}


def _wide(value: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.detach().to(wide, copy=True)
