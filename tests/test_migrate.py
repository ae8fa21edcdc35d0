"""`lowprec migrate`: the edited script runs and trains, what is not edited is named, and nothing is ever run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.cli import main
from lowprec.compat.migrate import migrate
from lowprec.errors import DataError

HEAD = """\
import torch
import torch.nn as nn
{imports}

# Größe der Daten: ein Umlaut verschiebt Spalten
torch.manual_seed(0)
x, y = torch.randn(256, 8), torch.arange(256) % 2
x[:, 0] += 2 * y
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # as before
"""
TAIL = """\
model.eval()
print((model(x).argmax(1) == y).float().mean().item())
"""
SCRIPTS = {
    "short": HEAD.format(imports="from torch.cuda.amp import GradScaler, autocast") + """\
scaler = GradScaler(init_scale=2.0**12)
for step in range(30):
    optimizer.zero_grad()
    with autocast():
        loss = nn.functional.cross_entropy(model(x), y)  # größer
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""" + TAIL,
    "clipped": HEAD.format(imports="from torch.amp import GradScaler, autocast, custom_fwd") + """\
scaler = GradScaler("cpu", growth_interval=100)
for step in range(30):
    with autocast("cpu", dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""" + TAIL,
    "accumulating": HEAD.format(imports="") + """\
scaler = torch.amp.GradScaler("cpu")
for step in range(60):
    with torch.autocast("cpu", torch.float16):
        half = slice(step % 2 * 128, step % 2 * 128 + 128)
        loss = nn.functional.cross_entropy(model(x[half]), y[half]) / 2
    scaler.scale(loss).backward()
    if step % 2:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        print("scale", scaler.get_scale())
""" + TAIL,
    "apex": HEAD.format(imports="from apex import amp") + """\
model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
for step in range(30):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    with amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
""" + TAIL,
}  # fmt: skip


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_migrated_script_trains(kind: str, tmp_path: Path) -> None:
    found = migrate(SCRIPTS[kind])
    assert found.left == []
    assert "GradScaler" not in found.after
    assert "autocast(" not in found.after
    assert "# Größe der Daten: ein Umlaut verschiebt Spalten" in found.after
    (tmp_path / "script.py").write_text(found.after, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr + found.after
    assert float(done.stdout.split()[-1]) > 0.85
    assert migrate(found.after).after == found.after  # nothing is left to do


def test_the_edits_are_those_a_person_would_make() -> None:
    assert "    precision.step(loss)\n" in migrate(SCRIPTS["short"]).after
    short = migrate(SCRIPTS["short"]).after
    assert 'precision = lowprec.Precision("fp16-autocast", init_scale=2.0**12)\n' in short
    assert "\nmodel, optimizer = precision.prepare(model, optimizer)\n" in short
    assert "import lowprec\n" in short
    assert "loss = nn.functional.cross_entropy(model(x), y)  # größer" in short
    clipped = migrate(SCRIPTS["clipped"]).after
    assert "    precision.step(loss, clip_norm=1.0)\n    optimizer.zero_grad()\n" in clipped
    assert "import lowprec\nfrom torch.amp import custom_fwd\n" in clipped
    accumulating = migrate(SCRIPTS["accumulating"]).after
    assert "    precision.backward(loss)\n" in accumulating
    assert "        precision.unscale()\n" in accumulating
    assert '        precision.step()\n        print("scale", precision.scale)\n' in accumulating
    assert "from lowprec.compat import amp\n" in migrate(SCRIPTS["apex"]).after


def test_a_bfloat16_script_becomes_bf16() -> None:
    text = SCRIPTS["clipped"].replace("torch.float16", "torch.bfloat16")
    assert 'lowprec.Precision("bf16", growth_interval=100)' in migrate(text).after


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("from apex.parallel import DistributedDataParallel as DDP\n", 1, "make it with precision.data_parallel()"),
        ("\nfrom apex.fp16_utils import FP16_Optimizer\n", 2, "Precision('fp16-master') with the plain optimizer"),
        ("import apex\napex.amp.initialize(1, 2)\n", 1, "write 'from lowprec.compat import amp'"),
        ("import torch\nwith torch.autocast('cpu'):\n    pass\n", 2, "autocast without a GradScaler"),
        (
            "import torch\ns = torch.amp.GradScaler('cpu')\nt = torch.amp.GradScaler('cpu')\n", 3, "2 GradScalers",
        ),
        (SCRIPTS["short"].replace("GradScaler(", "GradScaler(enabled=fast, "), 11, "enabled=fast: choose the mode"),
        (SCRIPTS["short"] + "scaler.load_state_dict({})\n", 21, "start its scale afresh"),
        (SCRIPTS["short"] + "scaler.set_growth_factor(4)\n", 21, "scaler.set_growth_factor has no counterpart"),
        (SCRIPTS["short"] + "@autocast()\ndef f(): pass\n", 21, "autocast as a decorator"),
        (SCRIPTS["short"].replace("AdamW(model.parameters()", "AdamW(groups()"), 11, "where all three are there"),
    ],
)  # fmt: skip
def test_what_is_left_is_named_with_its_line(text: str, line: int, message: str) -> None:
    left = migrate(text).left
    assert [item.line for item in left] == [line]
    assert message in left[0].what


def test_a_script_is_read_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = "import os\nos.mkdir('run')\nfrom apex import amp\nraise SystemExit(5)\n"
    (tmp_path / "script.py").write_text(hostile)
    assert main(["migrate", "script.py"]) == 0
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "script.py").read_text() == hostile
    assert main(["migrate", "script.py", "--write"]) == 0
    assert (tmp_path / "script.py").read_text() == hostile.replace("from apex", "from lowprec.compat")


def test_the_command_shows_a_diff_and_exits_by_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPTS["short"], encoding="utf-8")
    assert main(["migrate", str(tmp_path / "script.py")]) == 0
    out = capsys.readouterr().out
    assert "--- a/script.py" in out
    assert "+    precision.step(loss)" in out
    assert "\033[" not in out
    (tmp_path / "plain.py").write_text("print(1)\n")
    assert main(["migrate", str(tmp_path / "plain.py")]) == 0
    assert "there is nothing to do" in capsys.readouterr().out
    (tmp_path / "hand.py").write_text("import apex\n")
    assert main(["migrate", str(tmp_path / "hand.py")]) == 1
    assert "hand.py:1: write 'from lowprec.compat import amp'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def f(:\n", "is not Python that can be read in line 1"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"x = 1\0", "is not Python that can be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unusable_input_is_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script.py"
    if content is not None:
        path.write_bytes(content)
    assert main(["migrate", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_text_that_is_not_python_names_the_script() -> None:
    with pytest.raises(DataError, match=r"my.py is not Python"):
        migrate("1 +", "my.py")
