"""The trainer: real small networks, exact resume, and what a run folder holds."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import nn

from lowprec import Trainer
from lowprec.data import load_data
from lowprec.errors import ArtifactError, ConfigError, DataError, MissingDependencyError, ScaleFloorError
from lowprec.formats import FP32
from lowprec.methods import METHODS
from lowprec.precision import MODES, master_of
from lowprec.train import Config, is_run, load_run, parse_config
from lowprec.train.config import OptimConfig
from lowprec.train.network import batches_of_epoch, build_optimizer

USER_NETS = """
import random
import numpy
import torch
from torch import nn


class Noisy(nn.Module):
    '''Draws from every generator in its forward.'''

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x):
        y = self.norm(self.first(x.flatten(1)))
        if self.training:
            y = nn.functional.dropout(y, 0.1) * (1 + 0.1 * random.random()) * (1 + 0.1 * numpy.random.rand())
        return self.last(y.relu())


def noisy():
    return Noisy()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, left, right, gain=1.0):
        return self.linear(torch.cat([left, right], 1)) * gain


def two():
    return Two(), (torch.ones(1, 2), torch.ones(1, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1)).relu()).relu())


def tied():
    return Tied()


def exploding():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10))
    nn.init.constant_(model[1].weight, 6e4)
    return model


def he_initialised():
    from lowprec.models import small_resnet
    model = small_resnet(width=8, blocks=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def shaped():
    return nn.Conv2d(1, 2, 3)


def nothing():
    return nn.Flatten()
"""


@pytest.fixture(autouse=True)
def _user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer_nets.py").write_text(USER_NETS)
    monkeypatch.chdir(tmp_path)


LEARNING = ("model.args.width=8", "model.args.blocks=2", "data.batch_size=32", "optim.lr=0.1", "optim.warmup=5")


def config(*overrides: str, epochs: int = 1) -> Config:
    small = ["data.batch_size=128", "run.device=cpu", f"run.epochs={epochs}"]
    if not any(override.startswith("model.factory") for override in overrides):
        small += ["model.args.width=4", "model.args.blocks=1"]
    return parse_config("", [*small, *overrides])


def user(name: str, *overrides: str, epochs: int = 1) -> Config:
    return config(f"model.factory=trainer_nets:{name}", *overrides, epochs=epochs)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - models may draw from it


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_the_digits(mode: str) -> None:
    trained = config(*LEARNING, f"precision.mode={mode}", epochs=2)
    seen: list[tuple[int, int]] = []
    result = Trainer(trained, progress=lambda done, total: seen.append((done, total))).fit()
    assert result.accuracy > 0.9
    assert result.losses[-1] < result.losses[0] / 2
    assert len(result.losses) == len(result.accuracies) == 2
    assert result.finished
    assert (result.steps, result.landed, result.skipped) == (90, 90, 0)
    assert seen == [(step, 90) for step in range(1, 91)]
    assert result.final_scale == (2.0**16 if MODES[mode].scaled else 1.0)
    assert not result.model.training


# What a method cannot do without. Mean-only batch norm leaves the scale of a layer to its weights, so these must start
# at one that keeps the signal, and take a smaller learning rate. Filter response norm and scaled weight standardisation
# take longer to begin with. Signs are trained as their authors do, with Adam.
NEEDED_OPTIONS = {
    "scaled_ws": ["run.epochs=3"],
    "bn_free_binary": ["run.epochs=3", "optim.name=adamw", "optim.lr=0.01"],
    "wd_mimic": ["method.args.record_to=norms.jsonl"],
    "norm_schedule": ["method.args.every=25"],
    "frn": ["run.epochs=3"],
    "agc": ["method.args.clip=0.1"],  # the default is for batches of thousands
    "mean_only": ["model.factory=trainer_nets:he_initialised", "model.args={}", "optim.lr=0.1", "run.epochs=3"],
}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind != "data"])
def test_every_method_trains_saves_and_loads(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = NEEDED_OPTIONS.get(method, [])
    result = Trainer(config(*LEARNING, f"method.name={method}", *options)).fit(tmp_path / "run")
    assert result.accuracy > 0.5
    model, loaded = load_run(tmp_path / "run")
    assert loaded.method.name == method
    x = torch.from_numpy(load_data("digits").inputs[None][:32])
    # A sign within rounding of zero may turn between half and float32, and moves the logits by more than rounding does.
    trained = copy.deepcopy(result.model).float() if method == "bn_free_binary" else result.model
    half, wide = trained(x), model(x)
    # the same weights, computed in half and in float32: a few roundings per layer, far below the logits' spread
    assert (half - wide).abs().max() < 0.05 * wide.std()


def test_the_trainer_attaches_what_a_method_needs_around_a_step() -> None:
    result = Trainer(config(*LEARNING, "method.name=mimic_norm")).fit()
    weights = [module.weight for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    centred = [master_of(weight).detach().double().flatten(1) for weight in weights if weight[0].numel() > 50]
    assert centred
    for weight_OI in centred:
        # a float32 mean of K weights, subtracted in float32: K + 1 roundings of values up to the largest weight
        bound = (weight_OI.shape[1] + 1) * FP32.unit_roundoff * weight_OI.abs().max()
        assert weight_OI.mean(1).abs().max() <= bound


def test_the_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch; the model draws from torch, numpy and Python."""
    trained = user("noisy", "run.checkpoint_every_steps=5", "run.keep=3", "precision.growth_interval=7", epochs=3)
    whole = Trainer(trained).fit(tmp_path / "whole")
    stopped = Trainer(trained).fit(tmp_path / "parts", stop_after_steps=17)
    assert not stopped.finished
    assert stopped.steps == 17
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    seed_all(99)
    resumed = Trainer(trained).fit(tmp_path / "parts", resume=True)
    assert resumed.accuracies == whole.accuracies
    assert resumed.losses == whole.losses
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert whole.final_scale > 2.0**16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_resume_keeps_every_optimizer_in_every_mode(mode: str, optimizer: str, tmp_path: Path) -> None:
    trained = config(f"precision.mode={mode}", f"optim.name={optimizer}", "optim.lr=0.01", "data.batch_size=512")
    whole = Trainer(trained).fit(tmp_path / "whole")
    Trainer(trained).fit(tmp_path / "parts", stop_after_steps=1)
    Trainer(trained).fit(tmp_path / "parts", stop_after_steps=2, resume=True)
    resumed = Trainer(trained).fit(tmp_path / "parts", resume=True)
    assert (whole.steps, resumed.losses) == (3, whole.losses)
    assert files(tmp_path / "parts")["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]


def test_skipped_steps_are_counted_resumed_and_move_no_schedule(tmp_path: Path) -> None:
    trained = config("precision.init_scale=16777216", "data.batch_size=256", "model.args.width=8", epochs=2)
    whole = Trainer(trained).fit(tmp_path / "whole")
    Trainer(trained).fit(tmp_path / "parts", stop_after_steps=2)
    Trainer(trained).fit(tmp_path / "parts", resume=True)
    assert whole.skipped > 0
    assert whole.landed + whole.skipped == whole.steps == 12
    assert whole.final_scale == 2.0 ** (24 - whole.skipped)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * row["landed"] / 12)))


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = Trainer(config()).fit(tmp_path / "run")
    before = files(tmp_path / "run")
    again = Trainer(config()).fit(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == before
    assert again.accuracy == first.accuracy


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    whole = Trainer(config()).fit(tmp_path / "whole", resume=True)
    Trainer(config()).fit(tmp_path / "parts", stop_after_steps=0)
    shutil.rmtree(tmp_path / "parts" / "checkpoints")
    (tmp_path / "parts" / "checkpoints").mkdir()
    assert Trainer(config()).fit(tmp_path / "parts", resume=True).losses == whole.losses


def test_a_run_folder_holds_what_evaluation_used(tmp_path: Path) -> None:
    result = Trainer(config("run.checkpoint_every_steps=4", "run.keep=2")).fit(tmp_path / "run")
    run = tmp_path / "run"
    written = {"config.toml", "model.safetensors", "checkpoints", "metrics.jsonl", "health.jsonl"}
    assert {path.name for path in run.iterdir()} == written
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    stored = load_file(run / "model.safetensors")
    state = result.model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert stored["stem.weight"].dtype == torch.float16
    assert stored["norm.running_var"].dtype == torch.float32
    with safe_open(run / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert row["test_accuracy"] == result.accuracy
    assert row["train_loss"] == result.losses[0]
    assert parse_config((run / "config.toml").read_text()) == config("run.checkpoint_every_steps=4", "run.keep=2")
    checkpoint = load_file(run / "checkpoints" / "step-00000012" / "state.safetensors")
    assert checkpoint["masters.stem.weight"].dtype == torch.float32
    assert torch.equal(checkpoint["masters.stem.weight"].half(), stored["stem.weight"])


def test_identical_runs_write_identical_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Trainer(config(f"run.seed={seed}")).fit(tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_the_callers_generators_are_left_alone() -> None:
    seed_all(5)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002
    seed_all(5)
    Trainer(user("noisy")).fit()
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_load_run_gives_the_stored_half_values_in_float32(tmp_path: Path) -> None:
    result = Trainer(user("tied")).fit(tmp_path / "run")
    before = torch.get_rng_state()
    model, loaded = load_run(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded == user("tied")
    assert not model.training
    assert model.a.weight is model.b.weight
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, result.model.state_dict()[name].float())


def test_data_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    batches = batches_of_epoch(101, 25, 3, 4)
    assert [len(batch) for batch in batches] == [21, 20, 20, 20, 20]
    assert sorted(np.concatenate(batches)) == list(range(101))
    again = [batches_of_epoch(101, 25, seed, epoch)[0].tolist() for seed, epoch in ((3, 4), (3, 5), (4, 4))]
    assert again[0] == batches[0].tolist()
    assert again[0] != again[1] != again[2] != again[0]


def test_several_named_inputs_are_passed_by_name(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(200, 2)), generator.normal(size=(200, 4))
    np.savez(tmp_path / "d.npz", right=right, left=left, labels=(left[:, 0] > 0).astype(int))
    result = Trainer(user("two", "data.source=d.npz", "optim.lr=0.5", "data.batch_size=16", epochs=5)).fit()
    assert result.accuracy > 0.9


def _npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "d.npz", **arrays)


IMAGES = np.zeros((20, 1, 8, 8), np.float32)
LABELS = np.arange(20) % 2
UNUSABLE: dict[str, tuple[Callable[[Path], None], list[str], type[Exception], str]] = {
    "no labels": (_npz(x=IMAGES), [], DataError, "has no labels; training needs an integer class"),
    "wrong name": (_npz(image=IMAGES, labels=LABELS), [], DataError, "holds image, but the model is called as forward"),
    "two inputs for one": (_npz(x=IMAGES, y=IMAGES, labels=LABELS), [], DataError, "holds x, y, but the model"),
    "label too large": (_npz(x=IMAGES, labels=LABELS * 10), [], DataError, "labels run from 0 to 10, the model has 10"),
    "label below zero": (_npz(x=IMAGES, labels=LABELS - 1), [], DataError, "labels run from -1 to 0"),
    "no logits": (
        _npz(input=IMAGES, labels=LABELS),
        ["model.factory=trainer_nets:shaped", "precision.mode=fp32"],
        ConfigError,
        r"the model returns \(16, 2, 6, 6\) for 16 samples; training needs logits",
    ),
    "no parameters": (
        _npz(input=IMAGES, labels=LABELS),
        ["model.factory=trainer_nets:nothing"],
        ConfigError,
        "has no parameters to train",
    ),
    "method without a name": (
        _npz(x=IMAGES, labels=LABELS),
        ["method.args={a=1}"],
        ConfigError,
        "has args but no name",
    ),
    "unknown method": (_npz(x=IMAGES, labels=LABELS), ["method.name=l3"], ConfigError, "'l3'"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_trained_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    write, overrides, error, message = UNUSABLE[case]
    write(tmp_path)
    with pytest.raises(error, match=message) as caught:
        Trainer(config("data.source=d.npz", *overrides)).fit(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(MissingDependencyError, match="torch finds no GPU here"):
        Trainer(config("run.device=cuda")).fit()


def test_the_scale_floor_stops_training_and_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(ScaleFloorError, match=r"at its floor of 0.25 .* the output of '1' \(Linear\) in the forward"):
        Trainer(user("exploding", "data.batch_size=16")).fit(tmp_path / "run")
    assert is_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"has no model.safetensors: training has not finished"):
        load_run(tmp_path / "run")


# --- run folders that cannot be used ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    Trainer(config()).fit(folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_that_holds_a_run_or_something_else_is_kept(run: Path, tmp_path: Path) -> None:
    before = files(run)
    with pytest.raises(ArtifactError, match="holds a run already; continue it with --resume"):
        Trainer(config()).fit(run)
    with pytest.raises(ConfigError, match=r"another config: optim.lr is 0.05 there, 0.1 here"):
        Trainer(config("optim.lr=0.1")).fit(run, resume=True)
    with pytest.raises(ConfigError, match=r"model.args.norm is None there, 'l1' here"):
        Trainer(config("model.args.norm=l1")).fit(run, resume=True)
    assert files(run) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="the folder holds something else"):
        Trainer(config()).fit(tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="a file of that name is there"):
        Trainer(config()).fit(tmp_path / "file")


def test_nothing_is_written_when_the_input_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        Trainer(config("model.factory=nowhere:net")).fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_damaged_and_foreign_checkpoints(run: Path) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    values = (newest / "state.json").read_text()
    tensors = (newest / "state.safetensors").read_bytes()
    (newest / "state.json").write_text(values.replace('"data": "', '"data": "0'))
    with pytest.raises(DataError, match="was made with other training samples"):
        Trainer(config()).fit(run, resume=True)
    (newest / "state.json").write_text(values[:-20])
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        Trainer(config()).fit(run, resume=True)
    (newest / "state.json").write_text(values)
    (newest / "state.safetensors").write_bytes(tensors[:-20])
    with pytest.raises(ArtifactError, match="is truncated or damaged"):
        Trainer(config()).fit(run, resume=True)
    (newest / "state.json").write_text(values.replace('"optimizer"', '"aptimizer"'))
    (newest / "state.safetensors").write_bytes(tensors)
    with pytest.raises(ArtifactError, match="does not fit this run: 'optimizer'; remove it to use an older one"):
        Trainer(config()).fit(run, resume=True)


def test_load_run_refuses_what_is_not_a_whole_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a run"):
        load_run(tmp_path)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("width = 4", "width = 8"))
    with pytest.raises(ArtifactError, match=r"does not fit the model of config\.toml: .*size mismatch") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    (run / "config.toml").write_text(text)
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"the model .* is truncated or damaged"):
        load_run(run)


def test_a_config_may_be_a_path_or_plain_data(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(config().to_toml())
    assert Trainer(tmp_path / "c.toml").config == config()
    assert Trainer({"run": {"epochs": 3}}).config.run.epochs == 3


def test_mixed_modes_resume_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision\.mode is 'fp16-master' there, 'fp32' here"):
        Trainer(config("precision.mode=fp32")).fit(run, resume=True)


@pytest.mark.parametrize(("name", "fused"), [("sgd", True), ("adamw", True), ("adam", False)])
def test_torchs_fused_kernels_can_be_asked_for(name: str, fused: bool) -> None:
    optimizer = build_optimizer(OptimConfig(name=name, fused=fused), torch.nn.Linear(2, 2))
    assert bool(optimizer.defaults["fused"]) is fused


def test_an_optimizer_of_apex_is_used_where_apex_is_and_named_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(MissingDependencyError, match=r"needs NVIDIA's apex, .* without 'apex-'"):
        build_optimizer(OptimConfig(name="apex-adamw"), model)

    class FusedAdam(torch.optim.Optimizer):  # apex itself needs a GPU
        def __init__(self, params: object, adam_w_mode: bool, **options: object) -> None:
            super().__init__(params, {"adam_w_mode": adam_w_mode, **options})

    stand_in = types.ModuleType("apex.optimizers")
    stand_in.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    optimizer = build_optimizer(OptimConfig(name="apex-adamw", lr=0.5), model)
    assert type(optimizer) is FusedAdam
    assert optimizer.defaults == {"adam_w_mode": True, "lr": 0.5, "weight_decay": 5e-4, "betas": (0.9, 0.999)}
