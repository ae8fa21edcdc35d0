"""Half weights and their updates: nothing is lost where it is promised, with every optimizer of torch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowprec.errors import ScaleFloorError
from lowprec.formats import FP32
from lowprec.methods import convert
from lowprec.precision import MODES, Precision
from lowprec.precision.stochastic import stochastic_round
from tests import reference_half as reference

SCALED = [mode.name for mode in MODES.values() if mode.scaled]
SCALE = 2.0**8  # the gradient of a sum is the scale itself, in half
IN_PLACE = [mode.name for mode in MODES.values() if mode.update not in (None, "master")]
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 1e-2, "fused": True},
    "AdamW": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9},
    "Rprop": {"lr": 1e-3},
    "ASGD": {"lr": 1e-2},
    "Adafactor": {"lr": 1e-2},
    "Muon": {"lr": 1e-2},
}


def weights_of_one(count: int, mode: str, **options: float) -> tuple[nn.Linear, Precision]:
    model = nn.Linear(count, 1, bias=False)
    nn.init.ones_(model.weight)
    precision = Precision(mode, init_scale=SCALE)
    precision.prepare(model, torch.optim.SGD(model.parameters(), **options))
    return model, precision


def run(model: nn.Module, precision: Precision, x: Tensor, steps: int, factor: float = 1.0) -> None:
    for _ in range(steps):
        with precision.forward():
            loss = model(x).sum() * factor
        assert precision.step(loss) is True


# --- updates below half an ulp ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_updates_below_half_an_ulp(mode: str) -> None:
    """Momentum 0.9, lr 1e-3, gradient 1e-3, weight 1.0: float32 moves by 0.00991; half an ulp below 1 is 2.4e-4."""
    count = 10_000 if mode == "fp16-stochastic" else 1
    torch.manual_seed(0)
    model, precision = weights_of_one(count, mode, lr=1e-3, momentum=0.9)
    run(model, precision, torch.full((1, count), 1e-3), 1000)
    expected = 1 - reference.sgd_momentum(1.0, [1e-3] * 1000, 1e-3, 0.9)
    assert expected == pytest.approx(0.00991, rel=1e-3)
    moved = 1 - precision.wide_weights()["weight"].double().mean().item()
    if mode == "fp16-pure":
        assert moved == 0.0  # what it is documented for
    else:
        assert moved == pytest.approx(expected, rel=0.02)


def test_a_kahan_term_is_exact_and_begins_with_what_narrowing_cut_off() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.mul_(torch.logspace(-5, 3, 64))
    before = model.weight.detach().clone()
    precision = Precision("fp16-kahan", init_scale=SCALE)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    wide = precision.wide_weights()["weight"]
    # 11 + 11 bits; below 2^-14 the grid is 2^-24, and the term's own grid 2^-35
    bound = torch.maximum(before.abs() * 2.0**-22, torch.tensor(2.0**-36))
    assert ((wide - before).abs() <= bound).all()
    term = precision.state_dict()["kahan_terms"]["weight"]
    exact = model.weight.detach().double() + term.double() * 2.0**-11
    assert torch.equal(wide.double(), exact)


def test_stochastic_weights_take_the_optimizers_values_on_average() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(50) * 10.0**power for power in range(-8, 5)]).clamp(-6e4, 6e4)
    draws = torch.stack([stochastic_round(values) for _ in range(4000)]).double()
    exact = values.double()
    toward = values.half().double()
    step = torch.maximum((toward.abs().float() * 2.0**-10).double(), torch.tensor(2.0**-24, dtype=torch.float64))
    # A mean of 4000 draws from two points at most a step apart: deviation at most step/2/sqrt(4000), times 5.
    assert ((draws.mean(0) - exact).abs() <= 5 * step / 2 / math.sqrt(4000)).all()
    assert all(len(torch.unique(draws[:, i])) <= 2 for i in range(draws.shape[1]))


def test_stochastic_rounding_goes_to_a_neighbour_and_leaves_half_values_alone() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    finite = halves[halves.isfinite()]
    torch.manual_seed(0)
    assert torch.equal(stochastic_round(finite).float(), finite)
    assert torch.equal(torch.signbit(stochastic_round(finite)), torch.signbit(finite))
    special = torch.tensor([math.inf, -math.inf, math.nan, 65519.99, -65519.99, 65520.0, 1e30])
    rounded = stochastic_round(special)
    assert rounded[2].isnan()
    assert rounded[[0, 1, 3, 4, 5, 6]].tolist() == [math.inf, -math.inf, 65504.0, -65504.0, math.inf, math.inf]
    between = torch.randn(20_000) * torch.logspace(-9, 4, 20_000)
    drawn = stochastic_round(between).numpy().astype(np.float64)
    exact = between.numpy().astype(np.float64)
    nearest = between.numpy().astype(np.float16)
    other = np.nextafter(nearest, np.where(nearest.astype(np.float64) < exact, np.inf, -np.inf).astype(np.float16))
    assert (np.equal(drawn, nearest) | np.equal(drawn, other.astype(np.float64))).all()


def test_a_generator_makes_stochastic_rounding_repeatable() -> None:
    x = torch.randn(1000)
    first, second, third = (stochastic_round(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# --- any optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", SCALED)
def test_any_optimizer_of_torch_moves_half_weights_as_it_moves_float32_ones(mode: str, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(model.weight.half())
    start = model.weight.detach().double()
    plain = copy.deepcopy(model)
    make = getattr(torch.optim, name)
    precision = Precision(mode, init_scale=SCALE)
    optimizer = make(model.parameters(), **OPTIMIZERS[name])
    precision.prepare(model, optimizer)
    expected = make(plain.parameters(), **OPTIMIZERS[name])
    x = torch.randn(3, 16).half().float()
    x[:, :4] = 0  # a weight without gradient: 0 / (0 + eps) must stay 0
    for _ in range(3):
        with precision.forward():
            loss = model(x).sum()  # its gradients are sums of halves, the same in float32 and in half to a rounding
        assert precision.step(loss) is True
        expected.zero_grad()
        plain(x).sum().backward()
        expected.step()
    found = precision.wide_weights()["weight"].double()
    wanted = plain.weight.detach().double()
    assert found.isfinite().all()
    # The gradient is rounded to half (2^-11 of it), so is the weight at each of 3 steps (to a full ulp at random).
    moved = (wanted - start).abs().max()
    rounding = 0.0 if mode in ("fp16-autocast", "fp16-master") else 3 * 2.0**-10 * wanted.abs().max()
    assert (found - wanted).abs().max() <= 8 * 2.0**-11 * moved + rounding + 3 * FP32.eps
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(state.dtype != torch.float16 for state in states)


@pytest.mark.parametrize("mode", IN_PLACE)
def test_parameters_stay_half_in_the_same_memory_and_the_optimizer_sees_float32_while_it_steps(mode: str) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    precision = Precision(mode, init_scale=SCALE)
    precision.prepare(model, optimizer)
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in model.parameters()]
    addresses = [param.data_ptr() for param in model.parameters()]
    seen: list[torch.dtype] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.dtype for p in optimizer.param_groups[0]["params"]))
    run(model, precision, torch.ones(1, 4), 2)
    assert seen == [torch.float32] * 4
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in model.parameters()]
    assert {id(param) for param in optimizer.state} == {id(param) for param in model.parameters()}
    assert model.weight.dtype == torch.float16
    assert [param.data_ptr() for param in model.parameters()] == addresses


@pytest.mark.parametrize("mode", IN_PLACE)
def test_an_optimizer_that_raises_leaves_half_weights_as_they_were(mode: str) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(mode, init_scale=SCALE)
    precision.prepare(model, optimizer)
    before = copy.deepcopy(model.state_dict())

    def fail(*_: object) -> None:
        raise RuntimeError("from the optimizer")

    handle = optimizer.register_step_post_hook(fail)
    with precision.forward():
        loss = model(torch.ones(1, 4)).sum()
    with pytest.raises(RuntimeError, match="from the optimizer"):
        precision.step(loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.weight.dtype == torch.float16
    handle.remove()


def test_weights_that_are_loaded_drop_the_kahan_terms_of_the_old_ones() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    precision = Precision("fp16-kahan", init_scale=SCALE)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.load_state_dict(other.state_dict())
    assert torch.equal(precision.wide_weights()["weight"], other.weight.detach().half().float())
    copied = copy.deepcopy(model)
    run(model, precision, torch.randn(1, 4), 1)
    before = precision.wide_weights()["weight"]
    copied.load_state_dict(other.state_dict())  # a copy's weights are no business of the original's terms
    assert torch.equal(precision.wide_weights()["weight"], before)
    assert not torch.equal(before, model.weight.detach().float())


# --- overflow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SCALED)
def test_two_hundred_overflows_in_a_row_corrupt_nothing(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    precision = Precision(mode)
    precision.prepare(model, optimizer)
    x = torch.randn(16, 4)
    run(model, precision, x, 2, factor=2.0**-8)
    before = copy.deepcopy((model.state_dict(), precision.wide_weights(), optimizer.state_dict()["state"]))
    floors = 0
    for _ in range(200):
        with precision.forward():
            loss = (model(x) * 3e30).sum()
        if precision.scale > 0.25:
            assert precision.step(loss) is False
        else:
            floors += 1
            with pytest.raises(ScaleFloorError, match=r"first in .* \(Linear\).*: lower the learning rate"):
                precision.step(loss)
        assert "(Linear)" in precision.last_overflow
    assert (floors, precision.scale) == (200 - 18, 0.25)  # 2^16 to 2^-2 is 18 halvings
    after = (model.state_dict(), precision.wide_weights(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    run(model, precision, x, 1, factor=2.0**-8)
    assert all(value.isfinite().all() for value in precision.wide_weights().values())


def test_a_layer_that_overflows_is_named_each_of_two_hundred_times() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[1][1].weight.fill_(6e4)
    precision = Precision("fp16-pure")
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    for _ in range(200):
        with precision.forward():
            loss = model(torch.full((2, 4), 100.0).abs()).sum()
        if precision.scale > 0.25:
            assert precision.step(loss) is False
        else:
            with pytest.raises(ScaleFloorError, match=r"first in the output of '1\.1' \(Linear\) in the forward"):
                precision.step(loss)
        assert precision.last_overflow == "the output of '1.1' (Linear) in the forward"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- unscale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradients_can_be_looked_at_and_changed_between_unscale_and_step(mode: str) -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(mode, init_scale=SCALE)
    precision.prepare(model, optimizer)
    with precision.forward():
        loss = model(torch.full((1, 4), 0.5)).sum()
    precision.backward(loss)
    precision.unscale()
    precision.unscale()  # once is enough, twice does no harm
    (held,) = optimizer.param_groups[0]["params"]
    assert held.grad.dtype == torch.float32
    assert held.grad.tolist() == [[0.5] * 4]
    held.grad.fill_(0.25)
    assert precision.step() is True
    assert precision.wide_weights()["weight"].tolist() == [[0.75] * 4]
    assert held.grad is None


# --- the silent zero -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "right"), [("l2_half", False), ("l1", True)])
def test_statistics_in_half_that_zero_the_evaluation_are_reported_and_l1_evaluates_right(
    method: str, right: bool
) -> None:
    """Activations of standard deviation 300: a variance of 90,000 is infinite in half, a deviation is not."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    with torch.no_grad():
        plain[0].weight.normal_(0, 300 / math.sqrt(8))
    model, _ = convert(plain, method)
    precision = Precision("fp16-pure", health_every=1)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    x = torch.randn(256, 8)
    for _ in range(60):
        with precision.forward():
            loss = model(x).square().mean()
        precision.step(loss)
    problems = precision.health.problems
    model.eval()
    normalised = model[1](model[0](x.half())).float()
    if right:
        assert problems == []
        assert abs(normalised.std().item() - 1) < 0.1
    else:
        assert problems[0].startswith("'1' has a running_var that is not finite: its evaluation is wrong (variances")
        assert normalised.std(0).max().item() == 0.0  # every sample gives the same
