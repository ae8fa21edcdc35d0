"""The method `norm_schedule`: weight norms that grow on a schedule, instead of a learning rate that falls.

Behind a norm a channel's direction turns by lr / ||w||^2 per step, so norms that are sqrt(10) times as long do what a
learning rate divided by 10 does. After every step each channel is put on the norm of its schedule; the direction is
left to the optimizer. Without a record the norms of the start are scheduled, and they are not stored: the norm before
the step is the schedule's already, so only the ratio of two factors is needed.

Exact for plain SGD. The momentum buffer holds gradients of the old norm, so with momentum a drop takes about
1 / (1 - momentum) steps to have its full effect. The running statistics of the norm behind a layer follow the longer
weights as they follow anything, over about 1 / momentum batches: an evaluation sooner after a growth uses old ones.

Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.methods.channel_norms import norm_correction
from lowprec.methods.method import Handle
from lowprec.methods.norm_record import NormRecord
from lowprec.methods.recording import RecordedNorms
from lowprec.methods.stepping import Layer, StepCount, around_step, held_by, split_layers

# What divides the effective step by 10, as in the authors' code.
_FACTOR = math.sqrt(10)


def attach_norm_schedule(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    every: int | None = None,
    factor: float | Callable[[int], float] = _FACTOR,
    norms: str | Path | NormRecord | None = None,
    skip: Sequence[str] | None = None,
) -> Handle:
    """Puts every output channel on its scheduled norm after every step: norm(t + 1) * factor^floor(t / every).

    t counts the landed steps before it, as in the authors' code: norms grow with the first step of a new period, so
    that an evaluation at the end of the old one finds settled running statistics. Acts on the float32 masters where
    there are any. Keep the learning rate constant, or the two schedules multiply.

    Args:
        model: the network.
        optimizer: made from its parameters.
        every: steps between two growths; needed unless `factor` is a function.
        factor: what the norms grow by, or a function from t to the whole factor (positive; 1 at 0).
        norms: a record of norms, or its file (see `record_norms`); None for those of the start.
        skip: module paths of layers that are left alone; None for the last registered one, the classifier.

    Raises:
        ConfigError: there is no schedule, or the optimizer is of other parameters.
        DataError: the record is of another network.
        ArtifactError: the file cannot be read.
    """
    schedule = _schedule(every, factor)
    acted_on, _ = split_layers(model, skip)
    layers = held_by(optimizer, acted_on, "attach('norm_schedule')")
    if norms is None:
        return _Schedule(optimizer, layers, schedule, None)
    record = norms if isinstance(norms, NormRecord) else NormRecord.load(norms)
    return _Schedule(optimizer, layers, schedule, RecordedNorms(record, layers))


def _schedule(every: int | None, factor: float | Callable[[int], float]) -> Callable[[int], float]:
    if callable(factor):
        if every is not None:
            raise ConfigError("norm_schedule: factor is a function of the step already; leave out every")
        return factor
    if every is None or every < 1 or not 0 < factor < math.inf:
        raise ConfigError(
            f"norm_schedule multiplies the norms by factor = {factor:g} after every = {every} steps; "
            "give both a positive number"
        )
    growth, period = float(factor), every
    return lambda step: float(growth ** (step // period))


class _Schedule(Handle):
    """The hooks of a schedule: norms are read before the step and set after it."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[Layer],
        schedule: Callable[[int], float],
        recorded: RecordedNorms | None,
    ) -> None:
        self._layers = layers
        self._factor = schedule
        self._recorded = recorded
        self._norms: list[Tensor] = []
        self._count = StepCount(optimizer, "norm_schedule.steps")
        super().__init__([self._count.remove, *around_step(optimizer, self._read, self._set)])

    def _read(self) -> None:
        if self._recorded is None:
            self._norms = [layer.norms(layer.weight) for layer in self._layers]

    def _set(self) -> None:
        factor, before = self._factor(self._count.value), self._factor(max(self._count.value - 1, 0))
        self._count.value += 1
        for index, layer in enumerate(self._layers):
            weight, norm_C = layer.weight, layer.norms(layer.weight)
            if self._recorded is None:
                target_C = self._norms[index] * (factor / before)
            else:
                target_C = self._recorded.of(layer, self._count.value, norm_C) * factor
            weight.copy_(layer.scaled(weight, norm_correction(norm_C, target_C)))
