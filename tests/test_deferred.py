"""Steps that ask the device nothing: the same bits as those that do, no number read back, errors that come later.

The device is the CPU here: `synchronise=False` takes the way of a GPU, and a dispatch mode sees every read of a number.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec.errors import ScaleFloorError
from lowprec.norm import L1BatchNorm1d
from lowprec.precision import MODES, Precision
from lowprec.precision.scaling import LATE

SCALED = [mode.name for mode in MODES.values() if mode.scaled]
OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "plain": (torch.optim.SGD, {"lr": 0.1}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}


class Reads(TorchDispatchMode):
    """Counts reads of device numbers by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def prepared(mode: str, optimizer: str, synchronise: bool, **options: Any) -> tuple[nn.Module, Precision, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), L1BatchNorm1d(8), nn.Linear(8, 2))
    kind, settings = OPTIMIZERS[optimizer]
    made = kind(model.parameters(), **settings)
    precision = Precision(mode, health_every=0, synchronise=synchronise, **{"growth_interval": 3, **options})
    precision.prepare(model, made)
    return model, precision, made


def step(model: nn.Module, precision: Precision, factor: float = 1.0) -> Any:
    torch.manual_seed(1)
    x, y = torch.randn(16, 4), torch.arange(16) % 2
    with precision.forward():
        loss = nn.functional.cross_entropy(model(x), y) * factor
    return precision.step(loss, clip_norm=1.0)


def everything(model: nn.Module, precision: Precision, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*model.state_dict().values(), *precision.wide_weights().values(), *state, torch.tensor(precision.scale)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", SCALED)
def test_both_ways_take_the_same_steps_to_the_bit(mode: str, optimizer: str) -> None:
    ends = []
    for synchronise in (True, False):
        model, precision, made = prepared(mode, optimizer, synchronise)
        landed = []
        for factor in (math.inf, 1.0, 1.0, math.inf, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0):
            result = step(model, precision, factor)
            assert isinstance(result, bool if synchronise else Tensor)
            landed.append(bool(result))
        assert landed == [False, True, True, False, False, True, True, True, True, False, True]
        ends.append(everything(model, precision, made))
    if mode != "fp16-stochastic":  # draws less where it does not round
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(value.isfinite().all() for end in ends for value in end)


@pytest.mark.parametrize("optimizer", ["momentum", "plain", "fused"])
@pytest.mark.parametrize("mode", SCALED)
def test_no_number_is_read_back_once_the_optimizer_has_its_state(mode: str, optimizer: str) -> None:
    model, precision, _ = prepared(mode, optimizer, synchronise=False)
    for _ in range(2):
        step(model, precision)
    with Reads() as reads:
        for factor in (1.0, math.inf, 1.0, 1.0):
            step(model, precision, factor)
    assert reads.count == 0
    model, precision, _ = prepared(mode, optimizer, synchronise=True)
    with Reads() as reads:
        step(model, precision)
    assert reads.count > 0  # the counter sees what there is to see


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hooks_on_the_optimizer_see_the_steps_that_land_only(optimizer: str) -> None:
    model, precision, made = prepared("fp16-master", optimizer, synchronise=False)
    calls: list[str] = []
    made.register_step_post_hook(lambda *_: calls.append("after"))
    landed = [bool(step(model, precision, factor)) for factor in (1.0, math.inf, 1.0, math.inf, 1.0)]
    assert (landed, len(calls)) == ([True, False, True, False, True], 3)


def test_the_layer_is_named_and_the_floor_raises_so_many_steps_later() -> None:
    model, precision, made = prepared("fp16-master", "momentum", synchronise=False, init_scale=1.0, min_scale=0.5)
    step(model, precision)
    before = everything(model, precision, made)[:-1]
    caught = None
    for attempt in range(2 * LATE + 4):
        try:
            step(model, precision, math.inf)
        except ScaleFloorError as error:
            caught = caught or (attempt, str(error))
    assert caught is not None
    attempt, text = caught
    assert attempt <= 1 + LATE + 1  # the first overflow halves the scale, the second finds it at its floor
    assert "at its floor of 0.5 and gradients still overflow, first in the gradient of '4.bias' (Linear)" in text
    assert precision.last_overflow.startswith("the gradient of '4.bias' (Linear)")
    assert precision.scale == 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, precision, made)[:-1], strict=True))


def test_the_state_is_that_of_the_other_way() -> None:
    model, precision, _ = prepared("fp16-master", "momentum", synchronise=False)
    for factor in (1.0, math.inf, 1.0, 1.0):
        step(model, precision, factor)
    state = precision.state_dict()
    other_model, other, _ = prepared("fp16-master", "momentum", synchronise=True)
    for factor in (1.0, math.inf, 1.0, 1.0):
        step(other_model, other, factor)
    assert {k: v for k, v in state.items() if k != "masters"} == {
        k: v for k, v in other.state_dict().items() if k != "masters"
    }
    third_model, third, _ = prepared("fp16-master", "momentum", synchronise=False)
    third.load_state_dict(state)
    assert third.scale == precision.scale
    step(third_model, third)
    assert third.scale == 2 * precision.scale  # the third landed step in a row


def test_an_optimizer_with_hooks_is_asked_about_so_that_they_see_landed_steps_only() -> None:
    model, precision, made = prepared("fp16-master", "momentum", synchronise=False)
    seen: list[bool] = []
    made.register_step_post_hook(lambda *_: seen.append(True))
    for factor in (1.0, math.inf, 1.0):
        step(model, precision, factor)
    assert len(seen) == 2
