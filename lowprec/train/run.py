"""The folder of a run: `config.toml`, `model.safetensors`, `checkpoints/`, `metrics.jsonl`, `health.jsonl`.

It grows while training goes on, so it is not renamed into place like a bundle; every file in it is.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.artifacts import check_replaceable, write_bytes, write_text
from lowprec.errors import ArtifactError, ConfigError
from lowprec.train.checkpoint import read_safetensors, safetensors_bytes
from lowprec.train.config import Config, load_config
from lowprec.train.network import build_network, seeded

CONFIG = "config.toml"
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run, finished or not."""
    return (path / CONFIG).is_file() and ((path / CHECKPOINTS).is_dir() or (path / MODEL).is_file())


def open_run(path: Path, config: Config, resume: bool) -> None:
    """Makes the folder of a run, or opens the existing one to resume it.

    Raises:
        ArtifactError: the folder holds something else, or a run and `resume` is not set.
        ConfigError: the run that is there was made with another config.
    """
    check_replaceable(path, "a run", is_run)
    if is_run(path):
        if not resume:
            raise ArtifactError(f"{path} holds a run already; continue it with --resume, or choose another folder")
        check_same(load_config(path / CONFIG), config, path)
        return
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {path}: {error.strerror or error}") from None
    write_text(path / CONFIG, config.to_toml())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from training into `path`; the lock of a process that died is gone with it.

    Raises:
        ArtifactError: another process is at it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (path / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ArtifactError(f"{path} is being trained by process {file.read().strip() or 'unknown'}") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            (path / LOCK).unlink(missing_ok=True)


def check_same(stored: Config, config: Config, path: Path) -> None:
    """Raises `ConfigError` that names the first value in which two configs differ."""
    there, here = _flat(asdict(stored)), _flat(asdict(config))
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            raise ConfigError(
                f"{path} was made with another config: {name} is {there.get(name)!r} there, {here.get(name)!r} here; "
                "resume with the same config, or choose another folder"
            )


def write_model(path: Path, model: nn.Module) -> None:
    """Writes the weights and buffers as evaluation uses them; equal values give equal bytes."""
    write_bytes(path / MODEL, safetensors_bytes(model.state_dict()))


def load_run(path: str | Path) -> tuple[nn.Module, Config]:
    """The trained model of a run, float32 and in evaluation mode, and its config.

    Half values are float32 values exactly, so nothing is rounded: the model computes in float32 with the weights that
    evaluation used.

    Raises:
        ArtifactError: the folder is not a finished run, or its weights do not belong to its config.
        ConfigError: its config or factory cannot be used here.
    """
    path = Path(path)
    if not is_run(path):
        raise ArtifactError(f"{path} is not a run: it has no {CONFIG} with {MODEL} or {CHECKPOINTS}/")
    config = load_config(path / CONFIG)
    if not (path / MODEL).is_file():
        raise ArtifactError(f"{path} has no {MODEL}: training has not finished; continue it with --resume")
    tensors = read_safetensors(path / MODEL, "the model")
    with seeded(config.run.seed):
        model = build_network(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{path / MODEL} does not fit the model of {CONFIG}: {reason}") from None
    return model.to(torch.float32).eval(), config


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
