"""The methods that act around an optimizer step: recorded norms, their replay, and their schedule."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn
from torch.nn import functional as F

from lowprec import Trainer
from lowprec.errors import ArtifactError, ConfigError, DataError, UnsupportedError
from lowprec.formats import FP32, FP64
from lowprec.methods import METHODS, NormRecord, Recorder, attach, convert, record_norms
from lowprec.methods.channel_norms import channel_norms, norm_correction, scale_channels, step_correction
from lowprec.methods.norm_record import NormRow
from lowprec.methods.stepping import layers_of, split_layers
from lowprec.precision import Precision, master_of

STEP_METHODS = [name for name, method in METHODS.items() if method.kind == "step"]
LAYOUTS = [
    (nn.Linear(5, 4), 1, False),
    (nn.Conv1d(4, 6, 3), 1, False),
    (nn.Conv2d(4, 6, 3, groups=2), 1, False),
    (nn.Conv3d(2, 3, 2), 1, False),
    (nn.ConvTranspose1d(4, 6, 3), 1, True),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), 2, True),
    (nn.ConvTranspose3d(4, 4, 2, groups=4), 4, True),
]


class Invariant(nn.Module):
    """A network whose loss does not change when a channel of `first` or `second` is scaled: norms without eps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x)
            x = torch.relu((x - x.mean(0)) / x.std(0))
        return self.head(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network():
    torch.manual_seed(0)
    return Invariant().double()


X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 3


def run(model, optimizer, steps=1, before=lambda step: None):
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(next(model.parameters()).dtype)), LABELS).backward()
        optimizer.step()


def direction(weight):
    rows = weight.detach().double().numpy()
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def turned(model, other, layers=("first", "second")):
    """The largest difference of two networks' weight directions."""
    return max(
        np.abs(direction(getattr(model, name).weight) - direction(getattr(other, name).weight)).max() for name in layers
    )


def recorded(model, optimizer, steps, every=1):
    recorder = record_norms(model, optimizer, every)
    run(model, optimizer, steps)
    recorder.remove()
    return recorder.record


def record_of(model, steps=(0,)):
    """A record that says the weights have the norms that `model` has now."""
    norms = {layer.name: layer.norms(layer.weight.detach()).double().numpy() for layer in layers_of(model)}
    return NormRecord(tuple(NormRow(step, norms) for step in steps))


STEP_CASES = {
    "wd_mimic": lambda model: {"norms": record_of(model)},
    "norm_schedule": lambda model: {"every": 2},
    "agc": lambda model: {"clip": 1e-4},
}
over_step_methods = pytest.mark.parametrize("name", STEP_METHODS)


def test_every_step_method_has_a_case():
    assert set(STEP_CASES) == set(STEP_METHODS)
    assert STEP_METHODS


@over_step_methods
def test_step_methods_leave_the_network_and_come_off_again(name):
    model = network()
    options = STEP_CASES[name](model)
    converted, report = convert(model, name, **options)
    assert repr(converted) == repr(model)
    assert "attach" in report.changed[0].reason
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    twin = copy.deepcopy(converted)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    handle = attach(converted, optimizer)
    run(converted, optimizer, 3)
    handle.remove()
    handle.remove()
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    state_hooks = ("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks")
    assert not any(getattr(optimizer, hook) for hook in hooks + state_hooks)
    twin.load_state_dict(converted.state_dict())
    run(converted, optimizer)
    run(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), twin.parameters(), strict=True))


@over_step_methods
def test_the_last_layer_is_left_out_and_so_is_what_skip_names(name):
    for skip, untouched in ((None, {"head"}), (["first"], {"first"}), (["first", "head"], {"first", "head"})):
        model = network()
        options = STEP_CASES[name](model)
        with torch.no_grad():
            for layer in (model.first, model.second, model.head):
                layer.weight *= 2  # off the record, so that a replay corrects
        plain = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        attach(model, optimizer, name, skip=skip, **options)
        run(model, optimizer)
        run(plain, torch.optim.SGD(plain.parameters(), lr=0.5))
        same = {layer for layer in ("first", "second", "head") if torch.equal(
            getattr(model, layer).weight, getattr(plain, layer).weight)}  # fmt: skip
        assert same == untouched
    with pytest.raises(ConfigError, match=r"skip names 'haed', which is not a module of the.*did you mean 'head'"):
        attach(model, optimizer, name, skip=["haed"], **options)
    with pytest.raises(ConfigError, match=r"skip is a list of module paths; write skip = \['head'\]"):
        attach(model, optimizer, name, skip="head", **options)


@over_step_methods
def test_step_methods_refuse_what_they_cannot_act_on(name):
    model = network()
    options = STEP_CASES[name](model)
    with pytest.raises(ConfigError, match=f"attach\\('{name}'\\): the optimizer holds none of the \\d "):
        attach(model, torch.optim.SGD(network().parameters()), name, **options)
    alone = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"found no .* to act on; see its option skip"):
        attach(alone, torch.optim.SGD(alone.parameters()), name, **options)


def one_skipped_and_one_landed_step(model, name=None, order="", **options):
    """The float32 master of `first` after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    precision = Precision("fp16-master", init_scale=2.0**8)
    if order == "attach first":
        attach(model, optimizer, name, **options)
    precision.prepare(model, optimizer)
    if order == "prepare first":
        attach(model, optimizer, name, **options)
    start = master_of(model.first.weight).detach().clone()
    for factor in (math.inf, 1.0):
        with precision.forward():
            loss = F.cross_entropy(model(X.float()), LABELS) * factor
        assert precision.step(loss) == (factor == 1)
        assert torch.equal(master_of(model.first.weight), start) == (factor != 1)
    master = master_of(model.first.weight).detach()
    assert torch.equal(model.first.weight, master.half())
    return master.double()


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
def test_step_methods_act_on_the_masters_of_landed_steps_only(order):
    model = network().float()
    record = record_of(model)
    with torch.no_grad():
        model.first.weight *= 1.5
    start = model.first.weight.detach().double()
    plain = one_skipped_and_one_landed_step(copy.deepcopy(model))
    bound = reference.rounding_bound(FP32, 6, 20) * start.abs().max().item() * 4
    replayed = one_skipped_and_one_landed_step(copy.deepcopy(model), "wd_mimic", order, norms=record)
    torch.testing.assert_close(replayed, start + 2.25 * (plain - start), rtol=0, atol=bound)
    scheduled = one_skipped_and_one_landed_step(copy.deepcopy(model), "norm_schedule", order, every=1)
    want = plain * (start.norm(dim=1) / plain.norm(dim=1))[:, None]  # no growth before a period is over
    torch.testing.assert_close(scheduled, want, rtol=0, atol=bound)


@pytest.mark.parametrize(("layer", "groups", "transposed"), LAYOUTS)
def test_channel_norms_and_scaling_follow_the_layout(layer, groups, transposed):
    weight = layer.weight.detach().double()
    rows = reference.rows(weight.numpy(), groups, transposed)
    want = [math.sqrt(math.fsum(value * value for value in row)) for row in rows]
    bound = reference.rounding_bound(FP64, max(len(row) for row in rows))
    np.testing.assert_allclose(channel_norms(weight, groups, transposed), want, rtol=bound)
    factor = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    scaled = reference.rows(scale_channels(weight, factor, groups, transposed).numpy(), groups, transposed)
    for row, new, value in zip(rows, scaled, factor, strict=True):
        np.testing.assert_array_equal(new, row * value.item())


def test_half_weights_get_wide_norms():
    weight = torch.full((2, 25), 2.0**-13).half()  # squares of 2^-26 vanish in half
    norms = channel_norms(weight)
    assert norms.dtype == torch.float32
    assert norms.tolist() == [5 * 2.0**-13] * 2
    assert scale_channels(weight, torch.tensor([2.0, 4.0])).dtype == torch.float16


def test_corrections_are_one_where_a_norm_is_zero():
    norm, other = torch.tensor([0.0, 2.0, 6.0]), torch.tensor([3.0, 0.0, 3.0])
    assert step_correction(norm, other).tolist() == [1, 1, 4]
    assert step_correction(norm, other, 1.0).tolist() == [1, 1, 2]
    assert norm_correction(norm, other).tolist() == [1, 1, 0.5]


@pytest.mark.parametrize(
    ("make", "exponent"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.3), 2.0),
        (lambda params: torch.optim.Adam(params, lr=0.01, eps=0), 1.0),
    ],
)
def test_one_step_from_a_longer_weight_turns_it_as_the_recorded_one(make, exponent):
    model = network()
    twin = copy.deepcopy(model)
    optimizer = make(twin.parameters())
    factors = torch.linspace(0.3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        twin.first.weight *= factors[:, None]
        twin.second.weight *= 3
    attach(twin, optimizer, "wd_mimic", norms=record_of(model), exponent=exponent)
    uncorrected = copy.deepcopy(twin)
    run(uncorrected, make(uncorrected.parameters()))
    run(twin, optimizer)
    run(model, make(model.parameters()))
    # Two layers and their gradients of length 40 by 8, with cancellation in the norms.
    assert turned(twin, model) < reference.rounding_bound(FP64, 40 * 8) * 16 < 1e-12
    assert turned(uncorrected, model) > 1e-3


def test_a_replay_follows_a_run_with_weight_decay_exactly():
    # Decay leaves w (1 - lr wd) - lr g, which points as a step of lr / (1 - lr wd) does: 0.5 for 0.5 / (1 + 0.5 wd).
    decay, steps = 0.02, 60
    model, replay, without = network(), network(), network()
    head = {"params": model.head.parameters(), "weight_decay": 0.0, "lr": 0.5}
    body = [model.first.weight, model.second.weight]
    optimizer = torch.optim.SGD([{"params": body}, head], lr=0.5 / (1 + 0.5 * decay), weight_decay=decay)
    record = recorded(model, optimizer, steps)
    other = torch.optim.SGD(replay.parameters(), lr=0.5)
    attach(replay, other, "wd_mimic", norms=record)
    run(replay, other, steps)
    run(without, torch.optim.SGD(without.parameters(), lr=0.5), steps)
    # Sixty steps, each amplifying what rounding left of the last by at most 1.5.
    assert turned(replay, model) < 1e-9 < 1e-2 < turned(without, model)
    norms = [np.linalg.norm(net.first.weight.detach().numpy()) for net in (model, replay)]
    assert norms[0] < 0.8 * norms[1]  # the same path at other norms


def test_a_replay_with_momentum_is_far_nearer_than_no_decay():
    model, replay, without = network(), network(), network()
    options = {"lr": 0.1, "momentum": 0.9}
    record = recorded(model, torch.optim.SGD(model.parameters(), weight_decay=0.02, **options), 40, every=5)
    other = torch.optim.SGD(replay.parameters(), **options)
    attach(replay, other, "wd_mimic", norms=record, skip_decay=0.02)
    run(replay, other, 40)
    run(without, torch.optim.SGD(without.parameters(), **options), 40)
    assert turned(replay, model) < 0.25 * turned(without, model)


def test_a_norm_schedule_is_a_learning_rate_schedule():
    model, twin = network(), network()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    attach(model, optimizer, "norm_schedule", every=10, factor=2.0)
    # The head is not scheduled: one network drops its rate too, by hand.
    optimizer.param_groups[0]["params"] = [model.first.weight, model.second.weight]
    optimizer.add_param_group({"params": list(model.head.parameters())})
    attach(twin, other, "norm_schedule", factor=lambda step: 1.0)

    def head_only(step):
        optimizer.param_groups[1]["lr"] = 0.5 / 4 ** (max(step - 1, 0) // 10)  # the first step of a period grows

    def all_of_it(step):
        other.param_groups[0]["lr"] = 0.5 / 4 ** (max(step - 1, 0) // 10)

    start = channel_norms(model.first.weight.detach())
    run(model, optimizer, 30, head_only)
    run(twin, other, 30, all_of_it)
    assert turned(model, twin) < 1e-10  # thirty steps, each amplifying the last's rounding by at most 1.5
    # A norm of 6 inputs is within about 10 units of float64 rounding; thirty steps add theirs up: 300 u = 3.4e-14.
    torch.testing.assert_close(channel_norms(model.first.weight.detach()), start * 4, rtol=1e-13, atol=0)
    run(model, optimizer)
    torch.testing.assert_close(channel_norms(model.first.weight.detach()), start * 8, rtol=1e-13, atol=0)


def test_a_norm_schedule_can_follow_a_record():
    model, twin = network(), network()
    record = recorded(model, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1), 6, every=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    handle = attach(twin, optimizer, "norm_schedule", norms=record, factor=lambda step: 1 + step)
    for step in range(1, 8):
        run(twin, optimizer)
        want = record.at(step).norms["first.weight"] * step
        # set anew at every step: about 10 roundings each for the norm and for the weights that are scaled to it
        np.testing.assert_allclose(channel_norms(twin.first.weight.detach()), want, rtol=1e-14)
    assert record.at(7).step == 6
    handle.remove()


def test_channels_of_zeros_are_left_to_the_optimizer():
    for name in ("wd_mimic", "norm_schedule"):
        model = network()
        options = STEP_CASES[name](model)
        with torch.no_grad():
            model.first.weight[0] = 0
            model.first.weight[1] = 0
        before = copy.deepcopy(model)
        model.first.weight.grad = torch.ones_like(model.first.weight)
        model.first.weight.grad[1] = 0
        optimizer = torch.optim.SGD([model.first.weight, model.second.weight], lr=0.1)
        attach(model, optimizer, name, **options)
        optimizer.step()
        assert model.first.weight[0].tolist() == [-0.1] * 6
        assert model.first.weight[1].tolist() == [0] * 6
        assert torch.equal(model.second.weight, before.second.weight)


def test_the_recorder_keeps_the_start_and_every_so_many_steps(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "norms.jsonl"
    recorder = attach(model, optimizer, "wd_mimic", record_to=path, every=3)
    assert isinstance(recorder, Recorder)
    with pytest.raises(DataError, match="holds no row"):
        _ = recorder.record
    start = channel_norms(model.first.weight.detach()).numpy()
    run(model, optimizer, 7)
    assert [row.step for row in recorder.record.rows] == [0, 3, 6]
    assert set(recorder.record.rows[0].norms) == {"first.weight", "second.weight", "head.weight"}
    np.testing.assert_array_equal(recorder.record.rows[0].norms["first.weight"], start)
    from_file = NormRecord.load(path)
    for row, read in zip(recorder.record.rows, from_file.rows, strict=True):
        assert row.step == read.step
        assert all(np.array_equal(values, read.norms[name]) for name, values in row.norms.items())
    from_file.save(tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == path.read_bytes()
    assert [from_file.at(step).step for step in (0, 2, 3, 5, 6, 100)] == [0, 0, 3, 3, 6, 6]


def test_a_resumed_run_goes_on_in_its_record(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"

    def start(file):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        attach(model, optimizer, "wd_mimic", record_to=file, every=2)
        return model, optimizer

    run(*start(whole), 9)
    model, optimizer = start(path)
    run(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 2)  # lost: the checkpoint is older than the file
    with path.open("a") as file:
        file.write('{"step": 8, "nor')  # and a row was being written
    model, optimizer = start(path)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, 4)
    assert path.read_bytes() == whole.read_bytes()
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


@over_step_methods
def test_a_resumed_step_method_goes_on_where_it_was(name):
    rising = tuple(NormRow(step, {key: value * (1 + step) for key, value in record_of(network()).at(0).norms.items()})
                   for step in range(8))  # fmt: skip
    options = {"wd_mimic": {"norms": NormRecord(rising)}, "norm_schedule": {"every": 3}, "agc": {}}[name]

    def start():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer, name, **options)
        return model, optimizer

    whole, optimizer = start()
    run(whole, optimizer, 7)
    model, optimizer = start()
    run(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_wd_mimic_wants_a_run_without_decay_and_can_keep_that_of_the_last_layer():
    model = network()
    record = record_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    match = r"stands in for weight decay, but the optimizer decays 'first.weight' by 0.0005; set weight_decay = 0"
    with pytest.raises(ConfigError, match=match):
        attach(model, optimizer, "wd_mimic", norms=record, skip_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer, "wd_mimic", norms=record, skip_decay=5e-4)
    groups = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(2, 0), (2, 5e-4)]
    assert optimizer.param_groups[1]["params"][0] is model.head.weight
    handle.remove()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match="skip_decay is -1"):
        attach(model, optimizer, "wd_mimic", norms=record, skip_decay=-1)
    body = torch.optim.SGD([model.first.weight], lr=0.1)
    with pytest.raises(ConfigError, match="holds none of the layers left out"):
        attach(model, body, "wd_mimic", norms=record, skip_decay=0.1)


def test_options_that_exclude_each_other_are_refused(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    record = record_of(model)
    for options, match in (
        ({}, "give norms = its record"),
        ({"norms": record, "record_to": "x"}, "give norms = its record"),
        ({"record_to": tmp_path / "x", "skip": []}, "leave out skip"),
        ({"record_to": tmp_path / "x", "every": 0}, "every is 0"),
        ({"norms": record, "every": 2}, "every goes with record_to"),
    ):
        with pytest.raises(ConfigError, match=match):
            attach(model, optimizer, "wd_mimic", **options)
    for options in ({}, {"every": 0}, {"every": 2, "factor": 0.0}, {"every": 2, "factor": math.nan}):
        with pytest.raises(ConfigError, match="give both a positive number"):
            attach(model, optimizer, "norm_schedule", **options)
    with pytest.raises(ConfigError, match="leave out every"):
        attach(model, optimizer, "norm_schedule", factor=float, every=2)


def test_records_of_other_networks_and_of_diverged_runs_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    norms = dict(record_of(model).at(0).norms)
    missing = NormRecord((NormRow(0, {"first.weight": norms["first.weight"]}),))
    with pytest.raises(DataError, match=r"'second.weight' has 7 channels here and the record has no such weight"):
        attach(model, optimizer, "wd_mimic", norms=missing)
    other = NormRecord((NormRow(0, {**norms, "first.weight": np.ones(3)}),))
    with pytest.raises(DataError, match=r"'first.weight' has 8 channels here and the record has 3 channels"):
        attach(model, optimizer, "norm_schedule", norms=other, every=1)
    diverged = NormRecord((NormRow(0, norms), NormRow(4, {**norms, "first.weight": np.full(8, np.nan)})))
    with pytest.raises(DataError, match=r"diverged: 'first.weight' is not finite at step 4"):
        attach(model, optimizer, "wd_mimic", norms=diverged)
    with pytest.raises(DataError, match="step 0 after step 0"):
        record_of(model, (0, 0))
    with pytest.raises(DataError, match="other weights at step 1"):
        NormRecord((NormRow(0, norms), NormRow(1, {})))


def test_a_diverged_run_is_recorded_as_it_was(tmp_path):
    row = NormRow(3, {"a": np.array([1.0, np.inf, np.nan])})
    NormRecord((row,)).save(tmp_path / "norms.jsonl")
    read = NormRecord.load(tmp_path / "norms.jsonl").rows[0]
    np.testing.assert_array_equal(read.norms["a"], [1.0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is not a record of norms"),
        ("{}\n", "is not a record of norms"),
        ('HEADER\n{"step": 0}\n', "damaged in line 2"),
        ('HEADER\n{"step": 0, "norms": {"a": [1]}}\nnonsense\n', "damaged in line 3"),
        ('HEADER\n{"step": -1, "norms": {"a": [1]}}\n', "damaged in line 2"),
        ('HEADER\n{"step": true, "norms": {"a": [1]}}\n', "damaged in line 2"),
        ('HEADER\n{"step": 0, "norms": {"a": [-1]}}\n', "damaged in line 2"),
        ('HEADER\n{"step": 0, "norms": {"a": [[1]]}}\n', "damaged in line 2"),
        ('HEADER\n{"step": 0, "norms": {"a": ["x"]}}\n', "damaged in line 2"),
    ],
)
def test_damaged_records_are_refused_in_one_line(tmp_path, content, match):
    path = tmp_path / "norms.jsonl"
    record_of(network()).save(path)
    header = path.read_text().splitlines()[0]
    assert json.loads(header)["schema"] == 1
    path.write_text(content.replace("HEADER", header))
    with pytest.raises(ArtifactError, match=match):
        NormRecord.load(path)


def test_missing_and_unwritable_records_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is missing: no file"):
        NormRecord.load(tmp_path / "none.jsonl")
    with pytest.raises(ArtifactError, match="cannot be read"):
        NormRecord.load(tmp_path)
    with pytest.raises(ArtifactError, match="cannot write the record of norms"):
        record_of(network()).save(tmp_path / "none" / "norms.jsonl")


def test_parametrised_and_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model, _ = convert(model, "bounded_weight_norm", skip=["0", "1", "3"])
    assert [layer.name for layer in layers_of(model)] == ["0.weight", "3.weight"]

    def acted_on(model, skip):
        return [layer.name for layer in split_layers(model, skip)[0]]

    assert acted_on(model, None) == ["0.weight"]
    assert acted_on(model, ["1"]) == ["3.weight"]
    inside = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2))
    assert acted_on(inside, ["0"]) == ["1.weight", "2.weight"]
    bounded, _ = convert(inside, "bounded_weight_norm", skip=["0", "1"])
    assert acted_on(bounded, None) == ["0.0.weight", "0.1.weight", "1.weight"]
    inside[2].weight = inside[0][0].weight = nn.Parameter(torch.ones(4, 4))
    assert acted_on(inside, None) == ["0.1.weight", "1.weight"]


def test_the_trainer_records_replays_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = {
        "model": {"factory": "lowprec.models:mlp", "args": {"hidden": [12]}},
        "data": {"batch_size": 300},
        "run": {"epochs": 2, "device": "cpu", "checkpoint_every_steps": 2},
        "precision": {"mode": "fp16-master", "init_scale": 2.0**10},
    }

    def config(method, decay, **optim):
        return {**shared, "method": method, "optim": {"weight_decay": decay, "schedule": "constant", **optim}}

    recording = {"name": "wd_mimic", "args": {"record_to": "norms.jsonl", "every": 5}}
    result = Trainer(config(recording, 0.01)).fit()
    record = NormRecord.load("norms.jsonl")
    assert [row.step for row in record.rows] == list(range(0, result.landed + 1, 5))
    written = (tmp_path / "norms.jsonl").read_bytes()
    Trainer(config(recording, 0.01)).fit("run", stop_after_steps=7)
    Trainer(config(recording, 0.01)).fit("run", resume=True)
    assert (tmp_path / "norms.jsonl").read_bytes() == written
    replay = {"name": "wd_mimic", "args": {"norms": "norms.jsonl", "skip_decay": 0.01}}
    whole = Trainer(config(replay, 0.0)).fit("whole")
    Trainer(config(replay, 0.0)).fit("parts", stop_after_steps=7)
    parts = Trainer(config(replay, 0.0)).fit("parts", resume=True)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
    assert parts.losses == whole.losses
    with pytest.raises(ConfigError, match=r"the optimizer decays '1.weight' by 0.01"):
        Trainer(config(replay, 0.01)).fit()
    Trainer(config({"name": "norm_schedule", "args": {"every": 5}}, 0.01)).fit()
