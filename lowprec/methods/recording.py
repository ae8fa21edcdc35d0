"""Recording the norms of a run's output channels, and giving a record out to a run that follows it.

A recorder hangs on the optimizer's step, not on epochs: an optimizer knows nothing of epochs, and a step that
overflowed and was skipped does not call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError, DataError
from lowprec.methods.method import Handle
from lowprec.methods.norm_record import NormRecord, NormRow, append_row, read_rows, start_file
from lowprec.methods.stepping import Layer, StepCount, around_step, held_by, layers_of


class Recorder(Handle):
    """Records the norms of a run; see `record_norms`. `remove()` ends the recording, what was recorded stays."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[Layer], every: int, path: Path | None) -> None:
        self._rows: list[NormRow] = []
        self._layers = layers
        self._every = every
        self._path = path
        self._count = StepCount(optimizer, "norm_record.steps")
        super().__init__([self._count.remove, *around_step(optimizer, self._begin, self._step)])

    @property
    def record(self) -> NormRecord:
        """What was recorded so far. Raises `DataError` before the first step."""
        return NormRecord(tuple(self._rows))

    def _begin(self) -> None:
        """Before the first step of this process: starts at 0, or goes on with the file of the run that is resumed."""
        landed = self._count.value
        if self._rows and self._rows[-1].step <= landed:
            return
        # A checkpoint may be older than the last row: what came after it is recorded again.
        kept = self._rows or (list(read_rows(self._path)) if self._path is not None and landed else [])
        self._rows = [row for row in kept if row.step <= landed]
        if self._path is not None:
            start_file(self._path)
            for row in self._rows:
                append_row(self._path, row)
        if not self._rows or (self._rows[-1].step < landed and landed % self._every == 0):
            self._add()

    def _step(self) -> None:
        self._count.value += 1
        if self._count.value % self._every == 0:
            self._add()

    def _add(self) -> None:
        norms = {layer.name: layer.norms(layer.weight).double().cpu().numpy() for layer in self._layers}
        self._rows.append(NormRow(self._count.value, norms))
        if self._path is not None:
            append_row(self._path, self._rows[-1])


def record_norms(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 1, path: str | Path | None = None
) -> Recorder:
    """Records the 2-norm of every output channel of the conv and linear weights, at the start and every `every` steps.

    Acts on the float32 masters where there are any; may come before or after `Precision.prepare`. Reads the weights
    back from the device once per row.

    Args:
        model: the network that is trained.
        optimizer: made from its parameters. Its `state_dict` carries the count of steps, so a resumed run goes on.
        every: landed steps between two rows; the steps of an epoch for a row per epoch.
        path: a file that gets each row as it is made, or None to keep them in `recorder.record` only.

    Raises:
        ConfigError: `every` is not positive, or the optimizer holds none of the weights.
    """
    if every < 1:
        raise ConfigError(f"record_norms: every is {every}; give a number of steps of at least 1")
    layers = held_by(optimizer, layers_of(model), "record_norms")
    return Recorder(optimizer, layers, every, None if path is None else Path(path))


class RecordedNorms:
    """A record, checked against the layers it is for, as tensors.

    Raises:
        DataError: a layer is missing in the record, has other channels there, or the record holds numbers that are not
            finite.
    """

    def __init__(self, record: NormRecord, layers: Sequence[Layer]) -> None:
        self._record = record
        self._step: int | None = None
        self._tensors: dict[str, Tensor] = {}
        for layer in layers:
            found = record.rows[0].norms.get(layer.name)
            channels = len(layer.norms(layer.weight))
            if found is None or len(found) != channels:
                what = "no such weight" if found is None else f"{len(found)} channels"
                raise DataError(
                    f"the record of norms is of another network: {layer.name!r} has {channels} channels here and the "
                    f"record has {what}"
                )
        for row in record.rows:
            for layer in layers:
                if not torch.from_numpy(row.norms[layer.name]).isfinite().all():
                    raise DataError(f"the recorded run diverged: {layer.name!r} is not finite at step {row.step}")

    def of(self, layer: Layer, step: int, like: Tensor) -> Tensor:
        """(C,) recorded norms of `layer` after `step` landed steps, with the dtype and device of `like`."""
        row = self._record.at(step)
        if row.step != self._step:
            self._step, self._tensors = row.step, {}
        if layer.name not in self._tensors:
            self._tensors[layer.name] = torch.from_numpy(row.norms[layer.name]).to(like.device, like.dtype)
        return self._tensors[layer.name]
