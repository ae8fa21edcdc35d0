"""Trains a config for some steps twice, once alone and once killed and resumed, and compares every bit.

Each stretch runs in a process of its own, and is ended by SIGKILL, so that nothing is carried over but what is on disk.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from lowprec.artifacts import write_text
from lowprec.errors import ConfigError, LowprecError
from lowprec.train import run
from lowprec.train.checkpoint import checkpoints, load_checkpoint
from lowprec.train.config import Config

_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class ResumeCheck:
    """What was found.

    Args:
        steps: of either run.
        killed_after: the newest checkpoint at each kill; 0 before the first one.
        different: what differs, empty when nothing does.
    """

    steps: int
    killed_after: list[int]
    different: list[str]

    @property
    def same(self) -> bool:
        """Whether both runs ended in the same bits."""
        return not self.different

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        how = f"{self.steps} steps, killed with the newest checkpoint at {', '.join(map(str, self.killed_after))}"
        if self.same:
            return f"the same bits: {how}, and the checkpoint at the end is that of the run left alone"
        more = f" and {len(self.different) - 1} more" if len(self.different) > 1 else ""
        return (
            f"NOT the same: {how}; {self.different[0]} differs{more}. Something reads a clock, draws from a generator "
            "that is not saved, or keeps state outside of the model's buffers"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "same": self.same}


def check_resume(
    config: Config,
    steps: int = 12,
    kills: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ResumeCheck:
    """Compares a run of `steps` steps with one that is killed `kills` times on the way.

    Args:
        config: what to train; a checkpoint is written every step or as often as it says.
        steps: more than `kills`.
        kills: at moments drawn with `seed`: after a drawn number of steps, a drawn part of a step later.
        seed: of these moments.
        progress: called with (runs done, runs in all).

    Raises:
        ConfigError: fewer steps than kills.
        LowprecError: the config cannot be trained at all; the message is the trainer's.
    """
    if not 0 < kills < steps:
        raise ConfigError(f"{steps} steps cannot be interrupted {kills} times; give more steps than kills, and a kill")
    every = config.run.checkpoint_every_steps or 1
    config = replace(config, run=replace(config.run, checkpoint_every_steps=min(every, steps), keep=steps))
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lowprec-resume-") as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        config_file = Path(folder) / "config.toml"
        write_text(config_file, config.to_toml())
        _finish(_start(config_file, alone, steps))
        per_step = _seconds_per_step(alone)
        _tell(progress, 1, kills + 2)
        killed_after = []
        for index, target in enumerate(sorted(draws.sample(range(steps), kills))):
            killed_after.append(
                _kill_after(_start(config_file, killed, steps), killed, target, draws.random() * per_step)
            )
            _tell(progress, index + 2, kills + 2)
        _finish(_start(config_file, killed, steps))
        _tell(progress, kills + 2, kills + 2)
        return ResumeCheck(steps, killed_after, differences(alone, killed))


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same, bit for bit, in the newest checkpoints and the models of two runs."""
    paths = [checkpoints(folder / run.CHECKPOINTS)[-1:] for folder in (first, second)]
    if [[path.name for path in found] for found in paths] != [[path.name for path in paths[0]]] * 2 or not paths[0]:
        return ["the step of the newest checkpoint"]
    one, other = (load_checkpoint(found[0]) for found in paths)
    found = [name for name in sorted(one.tensors.keys() | other.tensors.keys()) if not _equal(one, other, name)]
    found += [f"the value {name!r}" for name in one.values if one.values[name] != other.values.get(name)]
    models = [(folder / run.MODEL).read_bytes() for folder in (first, second) if (folder / run.MODEL).is_file()]
    return found + ([run.MODEL] if len(models) == 1 or models[:1] != models[1:] else [])


def _equal(one: Any, other: Any, name: str) -> bool:
    if name not in one.tensors or name not in other.tensors:
        return False
    a, b = one.tensors[name], other.tensors[name]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)  # NaN equals itself


_WORKER = """
import json, sys
from lowprec.errors import LowprecError
from lowprec.train import Trainer
try:
    Trainer(sys.argv[1]).fit(sys.argv[2], resume=True, stop_after_steps=int(sys.argv[3]))
except LowprecError as error:
    print(json.dumps([str(error), error.exit_code]))
    sys.exit(9)
"""


def _start(config: Path, folder: Path, steps: int) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", _WORKER, str(config), str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate()
    if process.returncode == 9:
        _raise(out)
    if process.returncode:
        raise LowprecError(f"the training process ended with status {process.returncode}; see above")


def _raise(out: str) -> NoReturn:
    message, status = json.loads(out.splitlines()[-1])
    error = LowprecError(message)
    error.exit_code = status
    raise error


def _kill_after(process: subprocess.Popen[str], folder: Path, step: int, delay: float) -> int:
    """Kills `process` `delay` seconds after the checkpoint of `step`, and says what the newest checkpoint then was."""
    while process.poll() is None and _newest(folder) < step:
        time.sleep(_POLL_SECONDS)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    if process.returncode == 9:
        _raise(out)
    return _newest(folder)


def _seconds_per_step(folder: Path) -> float:
    """From the times of the checkpoints of a run, which are one step apart or more."""
    times = [path.stat().st_mtime for path in checkpoints(folder / run.CHECKPOINTS)]
    return (times[-1] - times[0]) / max(len(times) - 1, 1)


def _newest(folder: Path) -> int:
    found = checkpoints(folder / run.CHECKPOINTS)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
