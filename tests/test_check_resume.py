"""`lowprec check-resume`: SIGKILL at drawn moments, and a network whose state is not where it should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec.errors import ConfigError, LowprecError
from lowprec.train import Trainer, parse_config
from lowprec.train.resume_check import check_resume, differences

SMALL = ["run.device=cpu", "model.args.width=4", "model.args.blocks=1", "data.batch_size=64", "run.epochs=2"]
NETS = """
import time
import torch
from torch import nn

class Clock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, image):
        return self.fc(image.flatten(1)) * (1 + time.time() % 1 / 100)

class Counting(Clock):
    calls = 0
    def forward(self, image):
        self.calls += 1
        return self.fc(image.flatten(1)) * (1 + self.calls / 100)
"""


def test_three_kills_at_drawn_moments_end_in_the_same_bits() -> None:
    chosen = parse_config("", [*SMALL, "precision.mode=fp16-kahan", "optim.ema=0.9", "optim.name=adamw"])
    seen: list[tuple[int, int]] = []
    found = check_resume(chosen, steps=30, kills=3, seed=1, progress=lambda done, total: seen.append((done, total)))
    assert found.different == []
    assert found.sentence.startswith("the same bits: 30 steps, killed with the newest checkpoint at ")
    assert len(found.killed_after) == 3
    assert found.killed_after == sorted(found.killed_after)
    assert seen[-1] == (5, 5)


@pytest.mark.parametrize("network", ["Clock", "Counting"])
def test_state_that_no_checkpoint_holds_is_found(network: str, tmp_path: Path) -> None:
    (tmp_path / "resume_nets.py").write_text(NETS)
    (tmp_path / "config.toml").write_text(f'[model]\nfactory = "resume_nets:{network}"\n[run]\ndevice = "cpu"\n')
    command = [sys.executable, "-m", "lowprec", "check-resume", "config.toml", "--steps", "8", "--kills", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    assert not found["same"]
    assert any("fc.weight" in name for name in found["different"])


def test_every_bit_of_the_checkpoints_is_compared(tmp_path: Path) -> None:
    chosen = parse_config("", [*SMALL, "run.checkpoint_every_steps=5"])
    for name in ("a", "b"):
        Trainer(chosen).fit(tmp_path / name, stop_after_steps=10)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    from safetensors.torch import load_file, save_file

    state = tmp_path / "b" / "checkpoints" / "step-00000010" / "state.safetensors"
    tensors = load_file(state)
    tensors["masters.stem.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    save_file(tensors, state)
    assert differences(tmp_path / "a", tmp_path / "b") == ["masters.stem.weight"]
    values = state.parent / "state.json"
    values.write_text(values.read_text().replace('"scale": 65536.0', '"scale": 32768.0'))
    assert differences(tmp_path / "a", tmp_path / "b") == ["masters.stem.weight", "the value 'precision'"]


def test_what_cannot_be_checked_is_one_line() -> None:
    with pytest.raises(ConfigError, match="3 steps cannot be interrupted 3 times"):
        check_resume(parse_config("", SMALL), steps=3, kills=3)
    with pytest.raises(LowprecError, match="there is no module 'not_there'"):
        check_resume(parse_config("", [*SMALL, "model.factory=not_there:net"]), steps=4, kills=1)
