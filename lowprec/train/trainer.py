"""The thin trainer: a classification loop over the same parts that a user's own loop would use.

Thin on purpose. What it adds to a hand-written loop is that it can stop anywhere and continue in the same bits: data
order and learning rate are pure functions of counts, and a checkpoint holds everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from lowprec.data import load_data, part_of
from lowprec.errors import ArtifactError, DataError, MissingDependencyError
from lowprec.methods import attach
from lowprec.precision import Precision
from lowprec.precision.updates import KEPT
from lowprec.train import run
from lowprec.train.checkpoint import (
    State,
    checkpoints,
    load_checkpoint,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
    save_checkpoint,
)
from lowprec.train.config import Config, config_from, load_config
from lowprec.train.evaluation import evaluate
from lowprec.train.network import (
    batch_of,
    batches_of_epoch,
    build_network,
    build_optimizer,
    check_inputs,
    check_labels,
    logits_of,
    seeded,
)
from lowprec.train.schedule import learning_rate_factor


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        model: as trained, in the run's precision, in evaluation mode.
        accuracy: on the held-out samples after the last epoch; NaN if no epoch was finished.
        losses: mean training loss per finished epoch, over steps that landed.
        accuracies: held-out accuracy per finished epoch.
        steps: attempted.
        landed: steps whose update was applied.
        skipped: steps that overflowed.
        final_scale: the loss scale at the end.
        finished: whether all epochs are done (not when stopped early).
        run_folder: where it was written, or None.
    """

    model: nn.Module
    accuracy: float
    losses: list[float]
    accuracies: list[float]
    steps: int
    landed: int
    skipped: int
    final_scale: float
    finished: bool
    run_folder: Path | None


@dataclass
class _Counts:
    """Where a run is; stored in checkpoints as it stands."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    landed: int = 0
    loss_sum: float = 0.0
    loss_samples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains the classifier that a config describes.

    Args:
        config: a `Config`, the path of a TOML file, or nested plain data.
        progress: called with (steps done, steps planned).

    Raises:
        ConfigError: the config is wrong.
    """

    def __init__(
        self, config: Config | str | Path | Mapping[str, Any], progress: Callable[[int, int], None] | None = None
    ) -> None:
        if isinstance(config, (str, Path)):
            config = load_config(config)
        self.config = config if isinstance(config, Config) else config_from(config)
        self._progress = progress

    def fit(
        self, run_folder: str | Path | None = None, resume: bool = False, stop_after_steps: int | None = None
    ) -> TrainResult:
        """Trains, and writes the run folder if one is given.

        Two runs of one config on one machine write the same bytes. The caller's random generators are left as they
        were.

        Args:
            run_folder: a new or empty folder; or with `resume` that of a run of this very config.
            resume: continue from the newest checkpoint, if there is one.
            stop_after_steps: save a checkpoint after so many steps in total and stop there.

        Raises:
            ConfigError, DataError, ArtifactError: an input cannot be used.
            ScaleFloorError: the loss scale reached its floor; the last checkpoint stays.
        """
        folder = None if run_folder is None else Path(run_folder)
        precision = Precision(**asdict(self.config.precision))
        with seeded(self.config.run.seed):
            loop = _Loop(self.config, precision, folder, self._progress)
            if folder is not None:
                run.open_run(folder, self.config, resume)
                if resume and (saved := checkpoints(folder / run.CHECKPOINTS)):
                    loop.restore(load_checkpoint(saved[-1]), saved[-1])
            return loop.train(stop_after_steps)


class _Loop:
    """One run in progress."""

    def __init__(
        self, config: Config, precision: Precision, folder: Path | None, progress: Callable[[int, int], None] | None
    ) -> None:
        samples = load_data(config.data.source, what="data.source", test_fraction=config.data.test_fraction)
        self.data = part_of(samples, "train", config.data.test_fraction)
        self.held_out = part_of(samples, "test", config.data.test_fraction)
        self.config = config
        self.precision = precision
        self.folder = folder
        self.progress = progress
        self.device = _device(config.run.device)
        self.model = build_network(config).to(self.device)
        check_inputs(self.model, self.data)
        self.optimizer = build_optimizer(config.optim, self.model)
        attach(self.model, self.optimizer)
        precision.prepare(self.model, self.optimizer)
        self.counts = _Counts()
        self.steps_per_epoch = len(self._batches(0))
        self.total = self.steps_per_epoch * config.run.epochs

    def train(self, stop_after_steps: int | None) -> TrainResult:
        """Runs to the end, or to `stop_after_steps`."""
        counts = self.counts
        while counts.epoch < self.config.run.epochs:
            batches = self._batches(counts.epoch)
            self.model.train()
            while counts.batch < len(batches):
                if stop_after_steps is not None and counts.step >= stop_after_steps:
                    self._save()
                    return self._result(finished=False)
                self._step(batches[counts.batch])
                counts.batch += 1
                counts.step += 1
                if self.progress is not None:
                    self.progress(counts.step, self.total)
                every = self.config.run.checkpoint_every_steps
                if every and counts.step % every == 0:
                    self._save()
            self._finish_epoch()
        if self.folder is not None:
            run.write_metrics(self.folder, counts.history)
            run.write_model(self.folder, self.model)
        return self._result(finished=True)

    def restore(self, state: State, path: Path) -> None:
        """Continues from a checkpoint. Raises `ArtifactError` if it is not of this network or these samples."""
        values = state.values
        if values.get("data") != self.data.fingerprint:
            raise DataError(f"{path} was made with other training samples than {self.data.source} holds now")
        try:
            self.model.load_state_dict(state.group("model"))
            self.precision.load_state_dict(values["precision"] | {kind: state.group(kind) for kind in KEPT})
            load_optimizer_state(self.optimizer, state.group("optimizer"), values["optimizer"])
            self.counts = _Counts(**values["counts"])
            load_random_state(State(state.group("random"), values["random"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{path} does not fit this run: {reason}; remove it to use an older one") from None

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        run_config, data = self.config.run, self.config.data
        return batches_of_epoch(len(self.data), data.batch_size, run_config.seed, epoch)

    def _step(self, index: NDArray[np.int64]) -> None:
        optim, counts = self.config.optim, self.counts
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        inputs, labels = batch_of(self.data, index, self.device)
        with self.precision.forward():
            logits = logits_of(self.model, inputs, labels)
            if counts.step == 0:
                check_labels(self.data, logits.shape[1])
                check_labels(self.held_out, logits.shape[1])
            loss = F.cross_entropy(logits, labels)
        if bool(self.precision.step(loss, clip_norm=optim.clip_norm or None)):
            counts.landed += 1
            counts.loss_sum += loss.item() * len(labels)
            counts.loss_samples += len(labels)

    def _learning_rate(self) -> float:
        optim = self.config.optim
        return optim.lr * learning_rate_factor(
            optim.schedule,
            self.counts.landed,
            self.total,
            optim.warmup,
            optim.step_epochs * self.steps_per_epoch,
            optim.gamma,
        )

    def _finish_epoch(self) -> None:
        counts = self.counts
        test_loss, accuracy = evaluate(self.model, self.held_out, self.config.data.batch_size, self.device)
        train_loss = counts.loss_sum / counts.loss_samples if counts.loss_samples else math.nan
        counts.history.append(
            {
                "epoch": counts.epoch + 1,
                "steps": counts.step,
                "landed": counts.landed,
                "skipped": counts.step - counts.landed,
                "lr": self._learning_rate(),
                "scale": self.precision.scale,
                "train_loss": _finite_or_none(train_loss),
                "test_loss": _finite_or_none(test_loss),
                "test_accuracy": accuracy,
            }
        )
        counts.epoch += 1
        counts.batch, counts.loss_sum, counts.loss_samples = 0, 0.0, 0
        if self.folder is not None:
            run.write_metrics(self.folder, counts.history)
        if self.config.run.checkpoint_every_steps == 0 or counts.epoch == self.config.run.epochs:
            self._save()

    def _save(self) -> None:
        if self.folder is None:
            return
        precision = self.precision.state_dict()
        optimizer_tensors, optimizer_values = optimizer_state(self.optimizer)
        generators = random_state()
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, group in (
                ("model", self.model.state_dict()),
                *((kind, precision.pop(kind)) for kind in KEPT),
                ("optimizer", optimizer_tensors),
                ("random", generators.tensors),
            )
            for name, tensor in group.items()
        }
        values = {
            "precision": precision,
            "optimizer": optimizer_values,
            "counts": asdict(self.counts),
            "random": generators.values,
            "data": self.data.fingerprint,
        }
        folder = self.folder / run.CHECKPOINTS
        save_checkpoint(folder, self.counts.step, State(tensors, values), self.config.run.keep)

    def _result(self, finished: bool) -> TrainResult:
        counts, history = self.counts, self.counts.history
        return TrainResult(
            model=self.model.eval(),
            accuracy=history[-1]["test_accuracy"] if history else math.nan,
            losses=[math.nan if row["train_loss"] is None else row["train_loss"] for row in history],
            accuracies=[row["test_accuracy"] for row in history],
            steps=counts.step,
            landed=counts.landed,
            skipped=counts.step - counts.landed,
            final_scale=self.precision.scale,
            finished=finished,
            run_folder=self.folder,
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError("run.device is 'cuda', but torch finds no GPU here; set run.device to 'auto'")
    return torch.device(name)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
