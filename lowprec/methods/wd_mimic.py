"""The method `wd_mimic`: a run without weight decay whose steps are corrected to those of a run with it.

Behind a norm weight decay only sets the effective step lr / ||w||^2, so its work can be done by the learning rate
alone: multiply each channel's update by (||w|| / ||w_WD||)^2, the norms w_WD taken from a recorded run. The update is
taken as the difference of the weights before and after the step, as the authors do (momentum included), so it works on
any optimizer; per-channel learning rates would need one of our own. The difference carries the rounding of the weights,
which the correction multiplies: an error of (||w|| / ||w_WD||)^2 units of float32 rounding per step.

Exact for plain SGD up to the factor 1 / (1 - lr wd) that decay itself puts on the step. The momentum buffer holds
gradients of the norms that were, so with momentum it is exact only while the ratio of the norms stands.

Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018, and the authors' code (normmatters_wd).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.methods.channel_norms import step_correction
from lowprec.methods.method import Handle
from lowprec.methods.norm_record import NormRecord
from lowprec.methods.recording import RecordedNorms, record_norms
from lowprec.methods.stepping import Layer, StepCount, around_step, held_by, split_layers


def attach_wd_mimic(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    norms: str | Path | NormRecord | None = None,
    record_to: str | Path | None = None,
    every: int | None = None,
    skip: Sequence[str] | None = None,
    skip_decay: float | None = None,
    exponent: float = 2.0,
) -> Handle:
    """Replays the norms of a run with weight decay in one without; or, with `record_to`, records them.

    Args:
        model: the network.
        optimizer: made from its parameters, without weight decay on the weights that are corrected. A learning-rate
            scheduler of torch comes after this, if `skip_decay` is given.
        norms: a record, or its file.
        record_to: a new file; the run is recorded and otherwise left alone, see `record_norms`.
        every: with `record_to`, landed steps between two rows.
        skip: module paths of layers that are not corrected; None for the last registered one, the classifier.
        skip_decay: weight decay of the layers left out, in parameter groups of their own; the authors keep 5e-4 on the
            last layer. None leaves the optimizer's groups alone.
        exponent: 2 for SGD, 1 for optimizers that divide the gradient by its size; see `step_correction`.

    Raises:
        ConfigError: options that exclude each other, weight decay on a corrected weight, or an optimizer of other
            parameters.
        DataError: the record is of another network.
        ArtifactError: the file cannot be read.
    """
    if (norms is None) == (record_to is None):
        raise ConfigError(
            "wd_mimic replays the norms of a run with weight decay: give norms = its record, "
            "or record_to = a file to make one from this run"
        )
    if record_to is not None:
        if skip is not None or skip_decay is not None:
            raise ConfigError("wd_mimic: record_to records all layers and changes none; leave out skip and skip_decay")
        return record_norms(model, optimizer, 1 if every is None else every, record_to)
    if every is not None:
        raise ConfigError("wd_mimic: every goes with record_to; a replay follows the rows of its record")
    acted_on, left_out = split_layers(model, skip)
    layers = held_by(optimizer, acted_on, "attach('wd_mimic')")
    assert norms is not None
    targets = RecordedNorms(norms if isinstance(norms, NormRecord) else NormRecord.load(norms), layers)
    regroup = _decay_apart(optimizer, left_out, skip_decay)
    try:
        _check_decay(optimizer, layers)
    except ConfigError:
        regroup()
        raise
    return _Replay(optimizer, layers, targets, exponent, regroup)


class _Replay(Handle):
    """The hooks of a replay: weights are kept before the step, and the difference is multiplied after it."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[Layer],
        targets: RecordedNorms,
        exponent: float,
        regroup: Callable[[], None],
    ) -> None:
        self._layers = layers
        self._targets = targets
        self._exponent = exponent
        self._before: list[Tensor] = []
        self._count = StepCount(optimizer, "wd_mimic.steps")
        super().__init__([regroup, self._count.remove, *around_step(optimizer, self._keep, self._correct)])

    def _keep(self) -> None:
        self._before = [layer.weight.clone() for layer in self._layers]

    def _correct(self) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            weight, norm_C = layer.weight, layer.norms(before)
            recorded_C = self._targets.of(layer, self._count.value, norm_C)
            factor_C = step_correction(norm_C, recorded_C, self._exponent)
            weight.copy_(before + layer.scaled(weight - before, factor_C))
        self._before = []
        self._count.value += 1


def _check_decay(optimizer: torch.optim.Optimizer, layers: Sequence[Layer]) -> None:
    names = {id(weight): layer.name for layer in layers for weight in (layer.module.weight, layer.weight)}
    for group in optimizer.param_groups:
        decayed = [names[id(param)] for param in group["params"] if id(param) in names]
        if decayed and group.get("weight_decay", 0):
            raise ConfigError(
                f"attach('wd_mimic') stands in for weight decay, but the optimizer decays {decayed[0]!r} by "
                f"{group['weight_decay']:g}; set weight_decay = 0, and skip_decay for the last layer's own"
            )


def _decay_apart(optimizer: torch.optim.Optimizer, layers: Sequence[Layer], decay: float | None) -> Callable[[], None]:
    """Moves the parameters of `layers` into groups with weight decay `decay`; returns what moves them back."""
    if decay is None:
        return lambda: None
    if not decay >= 0 or "weight_decay" not in optimizer.defaults:
        kind = type(optimizer).__name__
        raise ConfigError(f"wd_mimic: skip_decay is {decay}; it must be at least 0, and {kind} must have weight_decay")
    mine = {id(param) for layer in layers for param in layer.parameters}
    moved: list[tuple[dict[str, Any], dict[str, Any], list[int]]] = []
    for group in list(optimizer.param_groups):
        places = [index for index, param in enumerate(group["params"]) if id(param) in mine]
        if places:
            params = [group["params"][index] for index in places]
            group["params"][:] = [param for param in group["params"] if id(param) not in mine]
            optimizer.add_param_group({**group, "params": params, "weight_decay": decay})
            moved.append((group, optimizer.param_groups[-1], places))
    if layers and not moved:
        raise ConfigError("wd_mimic: skip_decay was given, but the optimizer holds none of the layers left out")

    def move_back() -> None:
        for group, apart, places in moved:
            optimizer.param_groups[:] = [other for other in optimizer.param_groups if other is not apart]
            for index, param in zip(places, apart["params"], strict=True):
                group["params"].insert(index, param)

    return move_back
