"""Unusable input: one clear line, exit 2, no traceback, nothing half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lowprec.cli import COMMANDS

NETWORK = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 10)
        def forward(self, image):
            return self.fc(torch.relu(self.norm(self.conv(image))).mean((2, 3)))

    class Branching(Net):
        def forward(self, image):
            return super().forward(image) if image.sum() > 0 else image

    def build():
        torch.manual_seed(0)
        return Net(), torch.rand(4, 1, 8, 8)

    def without_inputs():
        return Net()

    def branching():
        return Branching(), torch.rand(4, 1, 8, 8)

    def raises():
        raise RuntimeError("no weights here")

    def returns_text():
        return "a model"

    not_callable = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_net.py").write_text(textwrap.dedent(NETWORK))
    (tmp_path / "ok.toml").write_text("[run]\nepochs = 1\n")
    return tmp_path


def refused(done, *words):
    assert done.status == 2, (done.status, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("lowprec")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_every_command_has_help(command, tmp_path):
    for name in COMMANDS:
        done = command(name, "--help", cwd=tmp_path)
        assert done.status == 0, done.stderr
        assert COMMANDS[name][1:20] in done.stdout


def test_doctor_says_what_computes_the_norms(command, tmp_path, monkeypatch):
    from lowprec.kernels import native

    for found in native.instruction_sets()[-1:]:
        assert f"norm kernels: CPU, compiled for {found}" in command("doctor", cwd=tmp_path).stdout
    monkeypatch.setattr(native, "_load", lambda: "the CPU kernels were not built")
    done = command("doctor", cwd=tmp_path)
    assert done.stdout.count("norm kernels: the CPU kernels were not built; until then torch computes them") == 1


def test_help_needs_no_torch(process, tmp_path):
    done = process("--help", cwd=tmp_path, before="import sys; sys.modules['torch'] = None")
    assert done.status == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[optim]\nlearning_rate = 1\n", ["unknown key 'learning_rate' in [optim]"]),
        ("[optim]\nmomentun = 0.5\n", ["unknown key 'momentun'", "did you mean 'momentum'?"]),
        ("[optimm]\nlr = 1\n", ["unknown section [optimm]", "did you mean 'optim'?"]),
        ("[optim]\nlr = 'fast'\n", ["optim.lr is a string", "must be a number"]),
        ("[optim\n", ["is not valid TOML"]),
        ("[method]\nname = 'l7'\n", ["'l7'", "l1"]),
        ("[model]\nfactory = 'nowhere:build'\n", ["nowhere"]),
        ("[data]\nsource = 'absent.npz'\n", ["absent.npz"]),
    ],
)
def test_a_config_that_cannot_be_used(folder, command, config, words):
    (folder / "bad.toml").write_text(config)
    refused(command("train", "bad.toml", "-o", "run", cwd=folder), *words)
    assert not (folder / "run").exists()


def test_train_refuses_a_folder_that_holds_something_else(folder, command):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("years of work")
    refused(command("train", "ok.toml", "-o", "run", cwd=folder), "run")
    assert [p.name for p in (folder / "run").iterdir()] == ["thesis.tex"]


def test_train_without_a_folder_or_a_config(folder, command):
    refused(command("train", "ok.toml", cwd=folder), "-o RUN")
    refused(command("train", "absent.toml", "-o", "run", cwd=folder), "absent.toml")


def test_a_dry_run_prints_the_config_and_writes_nothing(folder, command):
    before = sorted(p.name for p in folder.iterdir())
    done = command("train", "ok.toml", "--set", "optim.lr=0.25", "method.name=l1", "--dry-run", cwd=folder)
    assert done.status == 0
    assert "lr = 0.25" in done.stdout
    assert 'name = "l1"' in done.stdout
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", ["nothing of that name"]),
        ("ok.toml", ["give a run folder, MODULE:FACTORY or MODEL.onnx"]),
        ("my_net:bild", ["no 'bild'", "did you mean 'build'?"]),
        ("my_nett:build", ["no module 'my_nett'"]),
        ("my_net:not_callable", ["must be a function"]),
        ("my_net:raises", ["RuntimeError: no weights here"]),
        ("my_net:returns_text", ["returned str"]),
        ("my_net:without_inputs", ["says nothing about its inputs"]),
        ("my_net:branching", ["control flow depends on the values"]),
    ],
)
def test_a_model_that_cannot_be_exported(folder, command, model, words):
    before = sorted(p.name for p in folder.iterdir())
    refused(command("export", model, "-o", "bundle", cwd=folder), *words)
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before


def test_export_refuses_unknown_words_and_an_occupied_folder(folder, command):
    refused(command("export", "my_net:build", "-o", "b", "--precision", "fp12", cwd=folder), "fp12", "fp16")
    refused(command("export", "my_net:build", "-o", "b", "--target", "tensorflow", cwd=folder), "tensorflow", "onnx")
    (folder / "b").mkdir()
    (folder / "b" / "mine.txt").write_text("mine")
    refused(command("export", "my_net:build", "-o", "b", cwd=folder), "holds something else")
    assert (folder / "b" / "mine.txt").read_text() == "mine"
    refused(command("export", "my_net:build", "-o", "my_net.py", cwd=folder), "my_net.py")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.full((4, 1, 8, 8), np.nan, np.float32)}, ["not finite"]),
        ({"image": np.zeros((4, 2, 8, 8), np.float32)}, ["2"]),
        ({"picture": np.zeros((4, 1, 8, 8), np.float32)}, ["image", "picture"]),
        ({"image": np.zeros((0, 1, 8, 8), np.float32)}, []),
        ({"image": np.zeros((4, 1, 8, 8), np.float32), "labels": np.zeros(3, np.int64)}, ["labels"]),
    ],
)
def test_calibration_data_that_does_not_fit(folder, command, arrays, words):
    np.savez(folder / "d.npz", **arrays)
    refused(command("export", "my_net:build", "-o", "b", "--calibration", "d.npz", cwd=folder), *words)
    assert not (folder / "b").exists()


def test_a_model_of_the_users_own_goes_all_the_way(folder, command):
    np.savez(folder / "d.npz", image=np.random.default_rng(0).random((50, 1, 8, 8), np.float32))
    done = command("export", "my_net:build", "-o", "b", "--calibration", "d.npz", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    done = command(
        "export", "my_net:build", "-o", "b", "--precision", "fp32", cwd=folder
    )  # an earlier bundle gives way
    assert done.status == 0, done.stdout + done.stderr
    assert not (folder / "b" / "model.fp16.onnx").exists()
    done = command("compare", "my_net:build", "b/model.onnx", "--data", "d.npz", "--json", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["facts"]["precision"] == "fp32"
    done = command("inspect", "b", "--json", cwd=folder)
    assert [row["place"] for row in json.loads(done.stdout)["folded"]] == ["norm"]
    assert command("inspect", "b/model.onnx", cwd=folder).status == 0
    assert command("inspect", "d.npz", cwd=folder).status == 0


def test_inspect_and_compare_say_what_they_cannot_use(folder, command):
    refused(command("inspect", "absent", cwd=folder), "absent")
    refused(command("inspect", "my_net.py", cwd=folder), "my_net.py")
    refused(command("inspect", ".", cwd=folder), "neither a bundle")
    (folder / "broken.onnx").write_bytes(b"\x08\x07garbage")
    refused(command("inspect", "broken.onnx", cwd=folder), "broken.onnx")
    refused(command("compare", "broken.onnx", "broken.onnx", "--data", "digits", cwd=folder), "broken.onnx")
    refused(command("compare", "absent.onnx", "broken.onnx", "--data", "digits", cwd=folder), "absent.onnx")


def test_a_full_disk_leaves_nothing(folder, process, demo):
    """A limit on the size of files stands for a disk that fills up while the bundle is written."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    run = shutil.copytree(demo[0] / "l1" / "run", folder / "run")
    done = process("export", run, "-o", "b", "--target", "onnx", cwd=folder, before=limit)
    refused(done, "File too large")
    assert sorted(p.name for p in folder.iterdir()) == ["my_net.py", "ok.toml", "run"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_bundle(folder, demo, how):
    run = shutil.copytree(demo[0] / "l1" / "run", folder / "run")
    code = "import sys; from lowprec.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "export", str(run), "-o", "b", "--target", "onnx", "tensorrt-rtx"],
        cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell starts background jobs with Ctrl-C ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob(".b.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -how)
    assert "Traceback" not in errors
    assert not (folder / "b").exists()
    if how == signal.SIGINT:
        assert "interrupted" in errors
        assert not list(folder.glob(".b.*"))
