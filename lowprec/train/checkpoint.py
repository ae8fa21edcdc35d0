"""Checkpoints: everything that the next step depends on, without pickle, whole or not at all.

A checkpoint is a folder of two files, tensors in safetensors and the rest in JSON, that appears by a rename. JSON
keeps Python floats exactly, so sums and counts resume bit for bit.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowprec.artifacts import new_folder, read_json, write_bytes, write_json
from lowprec.errors import ArtifactError

TENSORS = "state.safetensors"
VALUES = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Args:
        tensors: by flat name (`model.stem.weight`, `masters.stem.weight`, `optimizer.3.exp_avg`).
        values: plain data for JSON.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        start = f"{prefix}."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Serialises tensors to safetensors; equal values give equal bytes.

    Every name gets its own contiguous CPU copy: tied weights are stored once per name, so that a file needs no other
    knowledge to be read.
    """
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={"format": "pt"})  # one key: the order of several is not fixed


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises `ArtifactError`."""
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{what} is missing: no file {path}") from None
    except OSError as error:
        raise ArtifactError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{what} {path} is truncated or damaged ({error})") from None


def save_checkpoint(folder: Path, step: int, state: State, keep: int) -> Path:
    """Writes `folder/step-<step>` atomically and removes all but the newest `keep` checkpoints."""
    final = folder / f"step-{step:08d}"
    with new_folder(final, "a checkpoint", lambda path: (path / VALUES).is_file()) as work:
        write_bytes(work / TENSORS, safetensors_bytes(state.tensors))
        write_json(work / VALUES, state.values)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> State:
    """Reads one checkpoint. Raises `ArtifactError`."""
    values = read_json(path / VALUES, "the checkpoint's state")
    if not isinstance(values, dict):
        raise ArtifactError(f"the checkpoint's state {path / VALUES} is not a JSON object")
    return State(read_safetensors(path / TENSORS, "the checkpoint"), values)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's per-parameter state as flat tensors (`<index>.<key>`) and plain values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[f"{index}.{key}"] = value
    return tensors, values


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Restores what `optimizer_state` gave; hyper-parameters stay those of `optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **values}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
