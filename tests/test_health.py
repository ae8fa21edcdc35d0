"""What a measured step says of each layer, against plain numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.precision import MODES, Precision


def prepared(mode: str, every: int = 1, lr: float = 1e-3) -> tuple[nn.Sequential, Precision]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    precision = Precision(mode, init_scale=2.0**8, health_every=every)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    return model, precision


def step(model: nn.Module, precision: Precision, x: Tensor | None = None) -> object:
    with precision.forward():
        loss = model(torch.ones(3, 6) if x is None else x).sum()
    return precision.step(loss)


def facts(values: Tensor) -> tuple[float, float, float]:
    """Headroom, zeros, subnormals, in numpy."""
    magnitudes = np.abs(values.detach().double().numpy()).ravel()
    zeros = np.mean(magnitudes == 0)
    with np.errstate(divide="ignore"):
        bits = float(np.log2(65504.0) - np.log2(magnitudes.max()))
    return bits, float(zeros), float(np.mean((magnitudes > 0) & (magnitudes < 2.0**-14)))


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_has_its_row_in_every_mode(mode: str) -> None:
    model, precision = prepared(mode)
    assert precision.health is None
    step(model, precision)
    rows = [(row.name, row.layer, row.kind) for row in precision.health.rows]
    outputs = [("0", "Linear", "output"), ("1", "ReLU", "output"), ("2", "Linear", "output")]
    assert rows[:3] == outputs
    parameters = {(name, "Linear", kind) for name, _ in model.named_parameters() for kind in ("gradient", "weight")}
    assert set(rows[3:]) == parameters
    assert len(rows) == 3 + 2 * 4


def test_the_figures_are_those_of_the_tensors() -> None:
    model, precision = prepared("fp16-master")
    seen: dict[str, Tensor] = {}
    x = torch.ones(3, 6) * 1e-4
    with torch.no_grad():
        model[0].bias.zero_()
    for name, module in model.named_children():
        module.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output.detach()))
    weights = {name: value.clone() for name, value in precision.wide_weights().items()}
    step(model, precision, x)
    for row in precision.health.rows:
        if row.kind == "output" and row.name != "2":  # the last output is widened after it was measured
            assert (row.headroom_bits, row.zeros, row.subnormals) == pytest.approx(facts(seen[row.name]), rel=1e-6)
        if row.kind == "weight":
            after = precision.wide_weights()[row.name]
            assert (row.headroom_bits, row.zeros, row.subnormals) == pytest.approx(facts(after), rel=1e-6)
            moved = (after != weights[row.name]) & (after.half() == weights[row.name].half())
            assert row.stalled == pytest.approx(moved.double().mean().item(), rel=1e-6)
    outputs = {row.name: row for row in precision.health.rows if row.kind == "output"}
    assert outputs["0"].subnormals > 0
    assert outputs["1"].zeros > 0


def test_gradients_are_measured_scaled_as_they_are_in_half() -> None:
    for scale in (2.0**4, 2.0**8):
        model = nn.Linear(2, 1, bias=False)
        precision = Precision("fp16-master", init_scale=scale, health_every=1)
        precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        step(model, precision, torch.tensor([[0.5, 0.0]]))
        (row,) = (row for row in precision.health.rows if row.kind == "gradient")
        assert row.headroom_bits == pytest.approx(math.log2(65504 / (0.5 * scale)))
        assert (row.zeros, row.subnormals) == (0.5, 0.0)
        assert precision.health.scale == scale


@pytest.mark.parametrize("mode", ["fp16-master", "fp16-pure", "fp16-kahan", "fp16-stochastic"])
def test_updates_that_half_weights_cannot_show_are_counted(mode: str) -> None:
    for lr, share in ((1e-6, 1.0), (0.1, 0.0)):
        model = nn.Linear(64, 1, bias=False)
        nn.init.ones_(model.weight)
        precision = Precision(mode, init_scale=2.0**8, health_every=1)
        precision.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
        step(model, precision, torch.ones(1, 64))
        (row,) = (row for row in precision.health.rows if row.kind == "weight")
        assert row.stalled == share


def test_one_step_in_so_many_is_measured_and_the_count_is_resumed() -> None:
    model, precision = prepared("fp16-master", every=3)
    measured = []
    for _ in range(7):
        step(model, precision)
        measured.append(precision.health.step)
    assert measured == [0, 0, 0, 3, 3, 3, 6]
    other, resumed = prepared("fp16-master", every=3)
    resumed.load_state_dict(precision.state_dict())
    step(other, resumed)
    step(other, resumed)
    assert resumed.health is None
    step(other, resumed)
    assert resumed.health.step == 9
    never_model, never = prepared("fp16-master", every=0)
    step(never_model, never)
    assert never.health is None


def test_measuring_changes_no_bit() -> None:
    results = []
    for every in (0, 1):
        model, precision = prepared("fp16-stochastic", every=every)
        torch.manual_seed(5)
        for _ in range(3):
            step(model, precision)
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*results)


def test_a_layer_near_the_edge_and_one_beyond_it_are_problems_the_worst_first() -> None:
    model, precision = prepared("fp16-master")
    step(model, precision)
    assert precision.health.problems == []
    with torch.no_grad():
        model[0].bias.fill_(40_000.0)
        model[2].weight.fill_(2.0)
    step(model, precision)
    first, second = precision.health.problems[:2]
    assert first == "the output of '2' (Linear) is not finite"
    assert second.startswith("the output of '0' (Linear) is 0.7 bits below the largest fp16 number")


def test_json_has_no_number_that_json_lacks() -> None:
    model, precision = prepared("fp16-master")
    step(model, precision, torch.zeros(3, 6))
    text = json.dumps(precision.health.to_json(), allow_nan=False)
    assert json.loads(text)["layers"][0]["stalled"] is None


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_an_interval_must_be_a_number_of_steps(value: object) -> None:
    with pytest.raises(ConfigError, match=r"health_every is .*; give a whole number of steps, or 0 for never"):
        Precision(health_every=value)
