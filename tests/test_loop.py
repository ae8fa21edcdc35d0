"""The trainer's loop: average, validation, accumulation, transforms, schedules, logs, locks, compiled forwards."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowprec.data import load_data
from lowprec.errors import ArtifactError, ConfigError, MissingDependencyError, UnsupportedError
from lowprec.packages import is_installed
from lowprec.precision import Precision
from lowprec.statistics import CopiedStatistics, HeldStatistics
from lowprec.train import Config, Trainer, load_run, parse_config
from lowprec.train.ema import MovingAverage
from lowprec.train.loop import Loop
from lowprec.train.network import build_network
from lowprec.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def config(*overrides: str, epochs: int = 1) -> Config:
    small = ["data.batch_size=128", "run.device=cpu", "model.args.width=4", "model.args.blocks=1"]
    return parse_config("", [*small, f"run.epochs={epochs}", *overrides])


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the moving average ----------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula_in_float32_whatever_the_weights_are() -> None:
    torch.manual_seed(0)
    values = [torch.randn(5).half() for _ in range(30)]
    average = MovingAverage(0.9, {"w": values[0], "n": torch.tensor(0)})
    expected = values[0].double()
    for landed, value in enumerate(values, 1):
        average.update({"w": value, "n": torch.tensor(landed)}, landed)
        decay = min(0.9, (1 + landed) / (10 + landed))
        expected = decay * expected + (1 - decay) * value.double()
    assert average.average["w"].dtype == torch.float32
    # one lerp of three float32 operations per step on values up to 4, damped by the decay: ten steps' worth
    assert (average.average["w"].double() - expected).abs().max() <= 10 * 3 * 4 * 2.0**-24
    assert int(average.average["n"]) == 30


def test_an_average_with_a_decay_near_one_moves_where_half_would_stand_still() -> None:
    average = MovingAverage(0.9998, {"w": torch.ones(1).half()})
    for _ in range(1000):
        average.update({"w": torch.full((1,), 1.001, dtype=torch.float16)}, 10**6)
    target = torch.tensor(1.001).half().item()
    assert average.average["w"].item() == pytest.approx(1 + (target - 1) * (1 - 0.9998**1000), rel=1e-4)


def test_evaluation_and_the_written_model_use_the_average_and_training_does_not(tmp_path: Path) -> None:
    plain = Trainer(config("precision.mode=fp16-master", epochs=2)).fit()
    averaged = Trainer(config("precision.mode=fp16-master", "optim.ema=0.5", epochs=2)).fit(tmp_path / "run")
    assert averaged.losses == plain.losses
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    stored = load_file(newest / "state.safetensors")
    model = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in model.items():
        assert torch.equal(value, stored[f"ema.{name}"].to(value.dtype)), name
        assert torch.equal(value, averaged.model.state_dict()[name])
    weights = [name for name in model if name.endswith("conv1.weight")]
    assert any(not torch.equal(model[name], plain.model.state_dict()[name]) for name in weights)
    assert stored[f"ema.{weights[0]}"].dtype == torch.float32
    loaded, _ = load_run(tmp_path / "run")
    assert all(param.dtype == torch.float32 for param in loaded.parameters())


def test_the_average_moves_with_landed_steps_only() -> None:
    loop = Loop(config("optim.ema=0.5", "precision.init_scale=16777216"), ALONE, None, None)
    before = copy.deepcopy(loop.ema.average)
    loop._step(loop._batches(0)[0])
    assert (loop.counts.landed, loop.precision.scale) == (0, 2.0**23)
    assert all(torch.equal(value, loop.ema.average[name]) for name, value in before.items())


# --- validation, accumulation, transforms ----------------------------------------------------------------------------


def test_validation_samples_are_neither_trained_on_nor_those_of_the_test(tmp_path: Path) -> None:
    chosen = config("data.validation_fraction=0.25", epochs=2)
    loop = Loop(chosen, ALONE, None, None)
    total = len(load_data("digits"))
    assert len(loop.data) + len(loop.validation) + len(loop.test) == total
    parts = [{x.tobytes() for x in part.inputs[None]} for part in (loop.data, loop.validation, loop.test)]
    assert not parts[0] & parts[1]
    assert not parts[1] & parts[2]
    assert not parts[0] & parts[2]
    result = Trainer(chosen).fit(tmp_path / "run")
    first, last = rows(tmp_path / "run" / "metrics.jsonl")
    assert "test_accuracy" not in first
    assert last["test_accuracy"] == result.accuracy
    assert result.accuracies == [first["validation_accuracy"], last["validation_accuracy"]]


@pytest.mark.parametrize("mode", ["fp32", "fp16-master", "fp16-pure"])
def test_micro_batches_give_the_gradient_of_the_batch(mode: str, tmp_path: Path, monkeypatch) -> None:
    """Without batch statistics the split changes nothing but the order of sums."""
    (tmp_path / "loop_nets.py").write_text(
        "from torch import nn\n"
        "def plain():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    chosen = []
    for parts in (1, 4):
        torch.manual_seed(0)
        overrides = (f"precision.mode={mode}", f"optim.accumulate={parts}", "data.batch_size=90")
        chosen.append(Loop(config(*overrides, "model.factory=loop_nets:plain", "model.args={}"), ALONE, None, None))
    moved = []
    for loop in chosen:
        seen: list[Tensor] = []
        loop.optimizer.register_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.extend(
                p.grad.double().flatten() for group in optimizer.param_groups for p in group["params"]
            )
        )
        loop._step(loop._batches(0)[0])
        moved.append(torch.cat(seen))
    whole, parts = moved
    rounding = 2.0**-24 if mode == "fp32" else 2.0**-11
    # what is rounded in one and not in the other: sums of 90 terms, in two layers
    assert (whole - parts).norm() <= 2 * 90**0.5 * rounding * whole.norm()


def test_batches_smaller_than_their_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batches of 3 samples cannot be cut into 8 parts .*raise data.batch_size"):
        Loop(config("data.batch_size=4", "optim.accumulate=8"), ALONE, None, None)


def test_a_transform_gets_each_batch_and_draws_the_same_after_a_resume(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def mix(inputs, labels):
        share = torch.rand(()).item()
        seen.append((len(labels), share))
        flipped = {name: torch.cat([x, x.flip(3)]) for name, x in inputs.items()}
        soft = nn.functional.one_hot(labels, 10).float() * 0.9 + 0.01
        return flipped, torch.cat([soft, soft])

    chosen = config("run.checkpoint_every_steps=2")
    whole = Trainer(chosen, transform=mix).fit(tmp_path / "whole")
    first = list(seen)
    assert len(first) == whole.steps
    assert len({share for _, share in first}) == len(first)
    seen.clear()
    Trainer(chosen, transform=mix).fit(tmp_path / "parts", stop_after_steps=5)
    resumed = Trainer(chosen, transform=mix).fit(tmp_path / "parts", resume=True)
    assert seen == first
    assert resumed.losses == whole.losses
    assert whole.losses[0] != Trainer(chosen).fit().losses[0]


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_skip", "counted"), [("false", "landed"), ("true", "step")])
def test_a_schedule_counts_landed_steps_or_all_of_them(on_skip: str, counted: str) -> None:
    loop = Loop(
        config("precision.init_scale=16777216", f"optim.schedule_on_skip={on_skip}", epochs=3), ALONE, None, None
    )
    for index in loop._batches(0):
        loop._step(index)
        loop.counts.step += 1
    assert 0 < loop.counts.landed < loop.counts.step
    count = getattr(loop.counts, counted)
    expected = loop.config.optim.lr * 0.5 * (1 + np.cos(np.pi * count / loop.total))
    assert loop._learning_rate() == pytest.approx(expected, rel=1e-12)


# --- memory format and compiled forwards -----------------------------------------------------------------------------


def test_channels_last_reaches_weights_and_inputs() -> None:
    seen: list[bool] = []
    loop = Loop(config("run.channels_last=true", "model.args.in_channels=1"), ALONE, None, None)
    convs = [module for module in loop.model.modules() if isinstance(module, nn.Conv2d)]
    convs[-1].register_forward_hook(
        lambda module, args, output: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    loop._step(loop._batches(0)[0])
    assert seen == [True]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)


def test_a_compiled_forward_gives_the_numbers_of_the_plain_one_and_is_gone_at_the_end() -> None:
    pytest.importorskip("torch._dynamo")
    model, other = (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    results = []
    for each, compiled in ((model, True), (other, False)):
        precision = Precision("fp16-master", init_scale=2.0**8, health_every=0)
        precision.prepare(each, torch.optim.SGD(each.parameters(), lr=0.1))
        if compiled:
            precision.compile(backend="aot_eager")
        torch.manual_seed(0)
        x = torch.randn(16, 4)
        for factor in (1.0, 1.0, float("inf"), 1.0):
            with precision.forward():
                loss = each(x).sum() * factor
            assert precision.step(loss) is (factor == 1.0)
        results.append([value.clone() for value in each.state_dict().values()])
    for a, b in zip(*results, strict=True):  # running statistics are lerped by another kernel: an ulp or two
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-26)


def test_compiling_narrowed_weights_on_a_cpu_is_refused_with_what_works() -> None:
    model, precision = nn.Linear(2, 2), Precision("fp16-autocast")
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UnsupportedError, match=r"crashes on a CPU in torch .*; use fp16-master, or no compiler"):
        precision.compile()


@pytest.mark.parametrize("kind", [HeldStatistics, CopiedStatistics])
def test_both_ways_to_keep_statistics_back_do_the_same_for_one_forward(kind: type) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    plain = copy.deepcopy(norm)
    held, x = kind(norm), torch.randn(8, 3)
    before = copy.deepcopy(norm.state_dict())
    for landed in (False, True):
        with held.forward():
            norm(x)
        with held.recomputation():
            norm(x * 100)
        held.commit(landed)
        expected = before
        if landed:
            plain(x)
            expected = plain.state_dict()
        torch.testing.assert_close(norm.state_dict(), expected, rtol=2.0**-22, atol=0)
    with held.forward():
        norm(x)
    held.discard()
    torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=2.0**-22, atol=0)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_skipped_steps_and_health_go_to_json_lines_and_notes_and_survive_a_resume(tmp_path: Path) -> None:
    chosen = config("precision.init_scale=16777216", "precision.health_every=4", epochs=2)
    notes: list[str] = []
    whole = Trainer(chosen, note=notes.append).fit(tmp_path / "whole")
    lines = rows(tmp_path / "whole" / "health.jsonl")
    overflows = [line for line in lines if "overflow" in line]
    assert len(overflows) == whole.skipped > 0
    assert overflows[0]["scale"] == 2.0**24
    assert notes[0] == f"step 0 skipped at scale 1.67772e+07: overflow in {overflows[0]['overflow']}"
    assert [line["step"] for line in lines if "layers" in line] == list(range(0, whole.steps, 4))
    Trainer(chosen).fit(tmp_path / "parts", stop_after_steps=7)
    Trainer(chosen).fit(tmp_path / "parts", stop_after_steps=14, resume=True)
    Trainer(chosen).fit(tmp_path / "parts", resume=True)
    for name in ("health.jsonl", "metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_tensorboard_is_written_where_it_is_installed_and_named_where_not(tmp_path: Path) -> None:
    chosen = config("run.tensorboard=true", "precision.health_every=5")
    if not is_installed("tensorboard"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'lowprec\[log\]'"):
            Trainer(chosen).fit(tmp_path / "run")
        return
    Trainer(chosen).fit(tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "test_accuracy" in tags
    assert "health/output/stem/headroom_bits" in tags
    assert "health/weight/stem.weight/stalled" in tags


# --- locks and signals -----------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_trains_into_is_refused_and_a_dead_ones_lock_is_not(tmp_path: Path) -> None:
    Trainer(config()).fit(tmp_path / "run", stop_after_steps=2)
    assert not (tmp_path / "run" / ".lock").exists()
    with (tmp_path / "run" / ".lock").open("w") as held:
        held.write("4711 on elsewhere\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="is being trained by process 4711 on elsewhere"):
            Trainer(config()).fit(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ".lock").exists()  # as a killed process leaves it
    assert Trainer(config()).fit(tmp_path / "run", resume=True).finished
    assert not (tmp_path / "run" / ".lock").exists()


LONG = """
[model]
args = { width = 4, blocks = 1 }
[data]
batch_size = 16
[run]
epochs = 400
device = "cpu"
"""


def train(folder: Path, *more: str) -> subprocess.Popen[str]:
    (folder / "long.toml").write_text(LONG)
    command = [sys.executable, "-m", "lowprec", "train", "long.toml", "-o", "run", *more]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 120
    while not list(folder.glob("run/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_a_clear_line(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = train(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, (out, err)
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    step = int(newest.removeprefix("step-"))
    assert f"stopped by {number.name} after step {step}; a checkpoint is saved, go on with --resume" in err
    assert "Traceback" not in err


def test_resuming_a_finished_run_says_so_and_touches_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowprec.cli import main

    (tmp_path / "short.toml").write_text(LONG.replace("400", "1"))
    arguments = ["train", str(tmp_path / "short.toml"), "-o", str(tmp_path / "run"), "--resume"]
    assert main([*arguments, "--json"]) == 0  # --resume without a checkpoint starts from the beginning
    told = json.loads(capsys.readouterr().out)
    assert (told["finished"], told["steps"], told["run_folder"]) == (True, 90, str(tmp_path / "run"))
    assert told["accuracy"] == told["accuracies"][-1] > 0.1  # better than chance, after one epoch
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "run").rglob("*")}
    done = subprocess.run([sys.executable, "-m", "lowprec", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "is finished already, after 90 steps; nothing was changed" in done.stdout
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "run").rglob("*")}
    assert {path: value for path, value in after.items() if path.is_file()} == {
        path: value for path, value in before.items() if path.is_file()
    }


def test_methods_may_follow_one_another():
    model = build_network(config("method.name=scaled_ws", "method.also.agc.clip=0.5", "method.also.bnp.rho=0.9"))
    assert [record["name"] for record in model.lowprec_methods] == ["scaled_ws", "agc", "bnp"]
    assert model.lowprec_methods[1]["args"] == {"clip": 0.5}
    with pytest.raises(ConfigError, match=r"method.also.agc is a whole number \(1\); it must be a table of arguments"):
        config("method.also.agc=1")
    with pytest.raises(ConfigError, match="no method is called 'agx'"):
        build_network(config("method.also.agx={}"))
