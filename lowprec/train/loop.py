"""One run in progress: steps, epochs, checkpoints.

Data order, learning rate and all random numbers are pure functions of counts, and a checkpoint holds everything else,
so that a run can stop after any step and continue in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lowprec.data import Samples, load_data, part_of
from lowprec.errors import ArtifactError, ConfigError, DataError
from lowprec.methods import attach
from lowprec.precision import Precision
from lowprec.precision.updates import KEPT
from lowprec.train import run
from lowprec.train.checkpoint import (
    State,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from lowprec.train.config import Config
from lowprec.train.ema import MovingAverage, averaged_values
from lowprec.train.evaluation import evaluate
from lowprec.train.log import Note, RunLog
from lowprec.train.network import (
    batch_of,
    batches_of_epoch,
    build_network,
    build_optimizer,
    check_inputs,
    check_labels,
    logits_of,
    seed_generators,
)
from lowprec.train.processes import Processes
from lowprec.train.schedule import learning_rate_factor

Inputs = dict[str | None, Tensor]
Transform = Callable[[Inputs, Tensor], tuple[Inputs, Tensor]]
"""transform(inputs, labels): what is done to a batch before its step, with the generators seeded for that step.

It may change the number of samples, and give labels as probabilities (N, classes).
"""

_STEP, _EVALUATION = 1, 2  # what random numbers are for
_EVALUATED = 8  # batches evaluated at once: without a backward pass they take less memory than one trained


@dataclass
class Counts:
    """Where a run is; stored in checkpoints as it stands."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    landed: int = 0
    loss_sum: float = 0.0
    loss_samples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """One run in progress.

    Args:
        config: what to train.
        processes: the processes that take part.
        folder: of the run, or None.
        transform: see `Transform`.
    """

    def __init__(self, config: Config, processes: Processes, folder: Path | None, transform: Transform | None) -> None:
        self.config = config
        self.processes = processes
        self.folder = folder
        self.transform = transform
        self._load_samples(config)
        synchronised = processes.count > 1 and config.run.statistics == "sync"
        self.model = build_network(config, synchronised).to(processes.device)
        check_inputs(self.model, self.data)
        if config.run.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(config.optim, self.model)
        attach(self.model, self.optimizer)
        self.precision = Precision(**asdict(config.precision), synchronise=True)  # the rate waits for `landed` anyway
        self.precision.prepare(self.model, self.optimizer)
        if config.run.compile:
            self.precision.compile()
        self.called: nn.Module = self.precision.data_parallel() if processes.count > 1 else self.model
        decay = config.optim.ema
        self.ema = MovingAverage(decay, self._values()) if decay else None
        self.counts = Counts()
        self.steps_per_epoch = len(self._batches(0))
        self.total = self.steps_per_epoch * config.run.epochs
        self.log: RunLog | None = None
        self._check_batches()

    def _load_samples(self, config: Config) -> None:
        data = config.data
        samples = load_data(data.source, what="data.source", test_fraction=data.test_fraction)
        self.data = part_of(samples, "train", data.test_fraction)
        self.test = part_of(samples, "test", data.test_fraction)
        self.validation: Samples | None = None
        if data.validation_fraction:
            self.validation = part_of(self.data, "test", data.validation_fraction)
            self.data = part_of(self.data, "train", data.validation_fraction)

    def _check_batches(self) -> None:
        parts, smallest = self.processes.count * self.config.optim.accumulate, len(self.data) // self.steps_per_epoch
        if smallest < parts:
            raise ConfigError(
                f"batches of {smallest} samples cannot be cut into {parts} parts (processes times optim.accumulate); "
                "raise data.batch_size"
            )

    def train(
        self,
        stop: Callable[[int], bool],
        progress: Callable[[int, int], None] | None,
        note: Note | None,
    ) -> bool:
        """Runs to the end; or until `stop`, asked with the number of steps before each, is true. Says which.

        A run that was stopped has a checkpoint of where it is.
        """
        counts, every = self.counts, self.config.run.checkpoint_every_steps
        writes = self.folder if self.processes.writes else None
        self.log = RunLog(writes, counts.step, self.config.run.tensorboard, note if self.processes.writes else None)
        try:
            while counts.epoch < self.config.run.epochs:
                batches = self._batches(counts.epoch)
                self.model.train()
                while counts.batch < len(batches):
                    if stop(counts.step):
                        self.save()
                        return False
                    self._step(batches[counts.batch])
                    counts.batch += 1
                    counts.step += 1
                    if progress is not None and self.processes.writes:
                        progress(counts.step, self.total)
                    if every and counts.step % every == 0:
                        self.save()
                self._finish_epoch()
        finally:
            self.log.close()
        self._finish(writes)
        return True

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        done = self.counts.epoch == self.config.run.epochs
        return done and (self.folder is None or (self.folder / run.MODEL).is_file())

    def _finish(self, folder: Path | None) -> None:
        if self.config.run.compile:
            del self.model.forward  # the compiled one, which stood before the class's own
        if self.ema is not None:
            self.ema.put_into(self.model)
        if folder is not None:
            run.write_model(folder, self.model)
        self.processes.wait()  # nobody leaves before it is there

    def restore(self, state: State, path: Path) -> None:
        """Continues from a checkpoint. Raises `ArtifactError` if it is not of this network or these samples."""
        values = state.values
        if values.get("data") != self.data.fingerprint:
            raise DataError(f"{path} was made with other training samples than {self.data.source} holds now")
        if values.get("processes") != self.processes.count:
            found, here = values.get("processes"), self.processes.count
            raise ConfigError(f"{path} is of a run of {found} processes, here are {here}; start as many")
        try:
            self.model.load_state_dict(state.group("model"))
            kept = {kind: state.group(kind) for kind in KEPT}
            self.precision.load_state_dict(values["precision"] | kept)
            load_optimizer_state(self.optimizer, state.group("optimizer"), values["optimizer"])
            if self.ema is not None:
                self.ema.load(state.group("ema"))
            self.counts = Counts(**values["counts"])
            self.counts.loss_sum, samples = state.tensors[f"process.{self.processes.rank}.losses"].tolist()
            self.counts.loss_samples = int(samples)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{path} does not fit this run: {reason}; remove it to use an older one") from None

    def save(self) -> None:
        """Writes a checkpoint, and the lines of the log that belong to it."""
        if self.folder is None:
            return
        losses = torch.tensor([self.counts.loss_sum, self.counts.loss_samples], dtype=torch.float64)
        processes = self.processes.gathered({"losses": losses})
        if not self.processes.writes:
            return
        precision = self.precision.state_dict()
        kept = {kind: precision.pop(kind) for kind in KEPT}
        optimizer_tensors, optimizer_values = optimizer_state(self.optimizer)
        groups: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            **kept,
            "optimizer": optimizer_tensors,
            "ema": self.ema.average if self.ema else {},
            "process": processes,
        }
        tensors = {f"{prefix}.{name}": tensor for prefix, group in groups.items() for name, tensor in group.items()}
        values = {
            "precision": precision,
            "optimizer": optimizer_values,
            "counts": asdict(self.counts),
            "processes": self.processes.count,
            "data": self.data.fingerprint,
        }
        if self.log is not None:
            self.log.save()
        folder = self.folder / run.CHECKPOINTS
        save_checkpoint(folder, self.counts.step, State(tensors, values), self.config.run.keep)

    def _values(self) -> dict[str, Tensor]:
        return averaged_values(self.model, self.precision.wide_weights())

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        run_config, data = self.config.run, self.config.data
        return batches_of_epoch(len(self.data), data.batch_size, run_config.seed, epoch)

    def _step(self, index: NDArray[np.int64]) -> None:
        optim, counts, precision = self.config.optim, self.counts, self.precision
        seed_generators(self.config.run.seed, _STEP, counts.step, self.processes.rank)
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mine = self.processes.part(index)
        loss_sum = 0.0
        for part in np.array_split(mine, optim.accumulate) if optim.accumulate > 1 else (mine,):
            loss, share = self._loss(part), len(part) * self.processes.count / len(index)
            precision.backward(loss if share == 1 else loss * share)
            loss_sum += loss.item() * len(part)
        before, measured = precision.scale, precision.health
        landed = bool(precision.step(clip_norm=optim.clip_norm or None, clip_value=optim.clip_value or None))
        if landed:
            counts.landed += 1
            counts.loss_sum += loss_sum
            counts.loss_samples += len(mine)
            if self.config.run.statistics == "reduce":
                self.processes.average_statistics(self.model)
            if self.ema is not None:
                self.ema.update(self._values(), counts.landed)
        elif self.log is not None:
            self.log.skipped(counts.step, before, str(precision.last_overflow))
        if self.log is not None and precision.health is not None and precision.health is not measured:
            self.log.health(precision.health)

    def _loss(self, index: NDArray[np.int64]) -> Tensor:
        inputs, labels = batch_of(self.data, index, self.processes.device, self.config.run.channels_last)
        if self.transform is not None:
            inputs, labels = self.transform(inputs, labels)
        with self.precision.forward():
            logits = logits_of(self.called, inputs, labels)
            if self.counts.step == 0:
                for samples in filter(None, (self.data, self.test, self.validation)):
                    check_labels(samples, logits.shape[1])
            return F.cross_entropy(logits, labels)

    def _learning_rate(self) -> float:
        optim = self.config.optim
        return optim.lr * learning_rate_factor(
            optim.schedule,
            self.counts.step if optim.schedule_on_skip else self.counts.landed,
            self.total,
            optim.warmup,
            optim.step_epochs * self.steps_per_epoch,
            optim.gamma,
        )

    def _finish_epoch(self) -> None:
        counts = self.counts
        loss_sum, samples = self.processes.total(counts.loss_sum, counts.loss_samples)
        row = {
            "epoch": counts.epoch + 1,
            "steps": counts.step,
            "landed": counts.landed,
            "skipped": counts.step - counts.landed,
            "lr": self._learning_rate(),
            "scale": self.precision.scale,
            "train_loss": loss_sum / samples if samples else math.nan,
        }
        last = counts.epoch + 1 == self.config.run.epochs
        every = self.config.run.evaluate_every
        asked = last or (every > 0 and (counts.epoch + 1) % every == 0)
        if self.validation is not None and asked:
            row |= self._evaluated("validation", self.validation)
        if last or (self.validation is None and asked):
            row |= self._evaluated("test", self.test)
        counts.history.append({name: value if math.isfinite(value) else None for name, value in row.items()})
        counts.epoch += 1
        counts.batch, counts.loss_sum, counts.loss_samples = 0, 0.0, 0
        if self.log is not None:
            self.log.epoch(counts.history)
        if self.config.run.checkpoint_every_steps == 0 or last:
            self.save()

    def _evaluated(self, part: str, samples: Samples) -> dict[str, float]:
        seed_generators(self.config.run.seed, _EVALUATION, self.counts.step)
        with self.ema.applied(self.model) if self.ema else nullcontext():
            loss, accuracy = evaluate(
                self.model, samples, _EVALUATED * self.config.data.batch_size, self.processes.device
            )
        return {f"{part}_loss": loss, f"{part}_accuracy": accuracy}
