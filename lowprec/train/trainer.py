"""The thin trainer: a classification loop over the same parts that a user's own loop would use.

Thin on purpose. What it adds to a hand-written loop is that it can stop anywhere and continue in the same bits; the
loop itself is `lowprec.train.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowprec.train import run
from lowprec.train.checkpoint import checkpoints, load_checkpoint
from lowprec.train.config import Config, config_from, load_config
from lowprec.train.log import Note
from lowprec.train.loop import Loop, Transform
from lowprec.train.network import seeded
from lowprec.train.processes import Processes, joined


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        model: as trained, in the run's precision, in evaluation mode; with `optim.ema` the average.
        accuracy: on the test samples after the last epoch; NaN if the run is not finished.
        losses: mean training loss per finished epoch, over steps that landed.
        accuracies: accuracy per epoch with an evaluation, on the validation samples, where there are none on the test
            samples.
        steps: attempted.
        landed: steps whose update was applied.
        skipped: steps that overflowed.
        final_scale: the loss scale at the end.
        finished: whether all epochs are done (not when stopped early).
        resumed_at: attempted steps that an earlier call had done; all of them where there was nothing left to do.
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
    resumed_at: int
    run_folder: Path | None

    def to_json(self) -> dict[str, Any]:
        """All but the model as plain data; what is not finite is None."""
        values = {name: value for name, value in vars(self).items() if name != "model"}
        values["accuracy"] = None if math.isnan(self.accuracy) else self.accuracy
        values["losses"] = [None if math.isnan(loss) else loss for loss in self.losses]
        values["run_folder"] = None if self.run_folder is None else str(self.run_folder)
        return values


class Trainer:
    """Trains the classifier that a config describes, in one process or in those that torchrun started.

    Args:
        config: a `Config`, the path of a TOML file, or nested plain data.
        progress: called with (steps done, steps planned).
        transform: called with each batch before its step; see `lowprec.train.loop.Transform`.
        note: called with one line when a step is skipped or a layer comes near the edge of the half range.

    Raises:
        ConfigError: the config is wrong.
    """

    def __init__(
        self,
        config: Config | str | Path | Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
        transform: Transform | None = None,
        note: Note | None = None,
    ) -> None:
        if isinstance(config, (str, Path)):
            config = load_config(config)
        self.config = config if isinstance(config, Config) else config_from(config)
        self._progress = progress
        self._transform = transform
        self._note = note

    def fit(
        self,
        run_folder: str | Path | None = None,
        resume: bool = False,
        stop_after_steps: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TrainResult:
        """Trains, and writes the run folder if one is given.

        Two runs of one config on one machine write the same bytes. The caller's random generators are left as they
        were.

        Args:
            run_folder: a new or empty folder; or with `resume` that of a run of this very config.
            resume: continue from the newest checkpoint, if there is one. A finished run is left as it is.
            stop_after_steps: save a checkpoint after so many steps in total and stop there.
            stop: asked before each step; when it says true, save a checkpoint and stop there.

        Raises:
            ConfigError, DataError, ArtifactError: an input cannot be used, or another process trains into the folder.
            ScaleFloorError: the loss scale reached its floor; the last checkpoint stays.
        """
        folder = None if run_folder is None else Path(run_folder)
        with joined(self.config.run.device) as processes, seeded(self.config.run.seed):
            loop = Loop(self.config, processes, folder, self._transform)
            if folder is not None and processes.writes:
                run.open_run(folder, self.config, resume)
            processes.wait()
            with run.locked(folder) if folder is not None and processes.writes else nullcontext():
                return self._run(loop, folder, resume, _stopper(stop_after_steps, stop), processes)

    def _run(
        self, loop: Loop, folder: Path | None, resume: bool, stop: Callable[[int], bool], processes: Processes
    ) -> TrainResult:
        saved = checkpoints(folder / run.CHECKPOINTS) if folder is not None and resume else []
        if saved:
            loop.restore(load_checkpoint(saved[-1]), saved[-1])
        processes.wait()
        begun, finished = loop.counts.step, loop.finished
        if not finished:
            finished = loop.train(stop, self._progress, self._note)
        return _result(loop, finished, begun)


def _stopper(after_steps: int | None, stop: Callable[[], bool] | None) -> Callable[[int], bool]:
    def asked(step: int) -> bool:
        return (after_steps is not None and step >= after_steps) or (stop is not None and stop())

    return asked


def _result(loop: Loop, finished: bool, begun: int) -> TrainResult:
    counts, history = loop.counts, loop.counts.history
    watched = "test_accuracy" if loop.validation is None else "validation_accuracy"
    return TrainResult(
        model=loop.model.eval(),
        accuracy=history[-1]["test_accuracy"] if finished else math.nan,
        losses=[math.nan if row["train_loss"] is None else row["train_loss"] for row in history],
        accuracies=[row[watched] for row in history if watched in row],
        steps=counts.step,
        landed=counts.landed,
        skipped=counts.step - counts.landed,
        final_scale=loop.precision.scale,
        finished=finished,
        resumed_at=begun,
        run_folder=loop.folder,
    )
