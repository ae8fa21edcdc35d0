"""Makes the runs of a study that are missing: in processes of one thread each, or shared among torchrun's ranks."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lowprec.artifacts import check_replaceable, write_text
from lowprec.data import load_data, part_of
from lowprec.errors import ConfigError, LowprecError, ScaleFloorError, UnsupportedError
from lowprec.study.cells import Cell, Outcome, Outcomes, Plan
from lowprec.study.config import Line, StudyConfig
from lowprec.train.config import config_from

CONFIG = "study.toml"
_POLL_SECONDS = 0.2
# What torchrun tells a process; the runs are not to take part in it.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

Progress = Callable[[int, int], None]


def run_study(
    study: StudyConfig,
    folder: str | Path,
    workers: int | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Outcome] | None:
    """Makes what is missing in `folder` and returns all outcomes, by `Plan.key`; None when it was stopped.

    Started by torchrun, each rank takes its share of the lines and batch sizes; all need the same folder.

    Args:
        study: the config.
        folder: new, empty, or of a study; runs that are there are not made again.
        workers: processes; the number of cores, or one per rank.
        progress: called with training steps done and planned by this rank, those that were there included.
        stop: asked now and then; when it says true, runs in progress are finished and no other is begun.

    Raises:
        ArtifactError: the folder holds something else, or another process works on it.
        ConfigError, DataError: the config cannot be used.
        UnsupportedError: a method cannot convert the network.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    workers = workers or (1 if ranks > 1 else os.cpu_count() or 1)
    path = Path(folder)
    work = _Work(study)
    if rank == 0:
        check_replaceable(path, "a study", lambda found: (found / CONFIG).is_file())
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG, study.to_toml())
    while not (path / CONFIG).is_file():  # another rank makes it
        time.sleep(_POLL_SECONDS)
    with Outcomes(path, rank) as outcomes:
        mine = list(work.plan.places())[rank::ranks]
        whole = _Scheduler(work, outcomes, mine, progress, stop).run(workers)
        while whole and work.missing(outcomes.known):
            time.sleep(_POLL_SECONDS)
            outcomes.refresh()
            whole = not stop()
        return outcomes.known if whole else None


class _Work:
    """A study, its plan, and how many steps its runs take; building it checks that every line can be trained."""

    def __init__(self, study: StudyConfig) -> None:
        data = config_from({"data": study.base.get("data", {})}).data
        samples = load_data(data.source, what="data.source", test_fraction=data.test_fraction)
        self.plan = Plan(study, samples.fingerprint)
        train = part_of(samples, "train", data.test_fraction)
        self._samples = {
            True: len(part_of(train, "train", study.grid.validation_fraction)),
            False: len(train),
        }
        for line in study.lines:
            self._check(line)

    def steps(self, cell: Cell) -> int:
        """Of a run."""
        epochs = config_from(self.plan.settings(cell)).run.epochs
        return epochs * math.ceil(self._samples[cell.choosing] / cell.batch)

    def missing(self, known: dict[str, Outcome]) -> bool:
        """Whether a run of the whole study has no outcome."""
        for line, batch in self.plan.places():
            rate = self.plan.chosen(line, batch, known)
            if rate is None or any(self.plan.key(cell) not in known for cell in self.plan.final(line, batch, rate)):
                return True
        return False

    def _check(self, line: Line) -> None:
        from lowprec.train.network import build_network

        cell = self.plan.choosing(line, max(self.plan.study.grid.batch_sizes))[0]
        try:
            build_network(config_from(self.plan.settings(cell)))
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"line {line.name!r}: {error}") from None


class _Scheduler:
    """Runs of one rank: first those that choose learning rates, then those that use them."""

    def __init__(
        self,
        work: _Work,
        outcomes: Outcomes,
        places: list[tuple[Line, int]],
        progress: Progress | None,
        stop: Callable[[], bool],
    ) -> None:
        self._work, self._plan, self._outcomes, self._places = work, work.plan, outcomes, places
        self._progress, self._stop = progress, stop
        # Until its rate is chosen a place's runs are planned with any: they take as many steps.
        planned = [cell for place in places for cell in [*self._plan.choosing(*place), *self._plan.final(*place, 1.0)]]
        self._total = sum(work.steps(cell) for cell in planned)
        self._done = 0
        self._begun: set[str] = set()

    def run(self, workers: int) -> bool:
        """Whether all were made."""
        waiting: dict[Future[dict[str, Any]], Cell] = {}
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_alone)
        try:
            self._submit(pool, waiting)
            while waiting and not self._stop():
                done, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(waiting.pop(future), future.result())
                if done:
                    self._submit(pool, waiting)
            stopped = [future for future in waiting if not future.cancel()]
            for future in stopped:
                self._finish(waiting[future], future.result())
            return not waiting
        except BrokenProcessPool:
            raise UnsupportedError(
                "a process of the study was killed, for want of memory as a rule; the same command goes on, "
                "with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()

    def _submit(self, pool: ProcessPoolExecutor, waiting: dict[Future[dict[str, Any]], Cell]) -> None:
        for place in self._places:
            rate = self._plan.chosen(*place, self._outcomes.known)
            for cell in self._plan.choosing(*place) if rate is None else self._plan.final(*place, rate):
                self._begin(cell, pool, waiting)

    def _begin(self, cell: Cell, pool: ProcessPoolExecutor, waiting: dict[Future[dict[str, Any]], Cell]) -> None:
        key = self._plan.key(cell)
        if key in self._begun:
            return
        self._begun.add(key)
        if key in self._outcomes.known:
            self._count(cell)
        else:
            waiting[pool.submit(train_once, self._plan.settings(cell))] = cell

    def _finish(self, cell: Cell, result: dict[str, Any]) -> None:
        self._outcomes.add(Outcome(key=self._plan.key(cell), **result))
        self._count(cell)

    def _count(self, cell: Cell) -> None:
        self._done += self._work.steps(cell)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _alone() -> None:
    """In a worker: one thread, no part in torchrun's group, and Ctrl-C left to the parent."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _TORCHRUN:
        os.environ.pop(name, None)
    torch.set_num_threads(1)


def train_once(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one run; returns the fields of its `Outcome` but the key."""
    from lowprec.train import Trainer

    started = time.monotonic()
    found: dict[str, Any] = {"accuracy": None, "refused": "", "diverged": False, "steps": 0, "skipped": 0}
    try:
        result = Trainer(settings).fit()
    except ScaleFloorError:
        found["diverged"] = True
    except LowprecError as error:
        found["refused"] = str(error)
    else:
        choosing = settings["data"]["validation_fraction"] > 0
        found["accuracy"] = float(result.accuracies[-1] if choosing else result.accuracy)
        found |= {"steps": result.steps, "skipped": result.skipped, "diverged": not math.isfinite(result.losses[-1])}
    return found | {"seconds": round(time.monotonic() - started, 3)}
