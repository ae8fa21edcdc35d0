"""The precision plugin in a real Fabric loop."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from lowprec.errors import UnsupportedError
from lowprec.precision import MODES, Precision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of its own at import
    fabric_module = pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")

from lowprec.compat.fabric import LowprecPrecision

pytestmark = pytest.mark.filterwarnings("ignore:::lightning_fabric", "ignore::DeprecationWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, 8, generator=generator), torch.randint(0, 2, (32,), generator=generator)


def fitted(mode: str) -> tuple[nn.Module, torch.optim.Optimizer, LowprecPrecision, object]:
    plugin = LowprecPrecision(mode, init_scale=2.0**10)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plugin.prepare(model, optimizer)
    model, optimizer = fabric.setup(model, optimizer)
    return model, optimizer, plugin, fabric


@pytest.mark.parametrize("mode", MODES)
def test_a_fabric_loop_takes_the_steps_of_the_engine(mode: str) -> None:
    model, optimizer, plugin, fabric = fitted(mode)
    plain, precision = network(), Precision(mode, init_scale=2.0**10)
    precision.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    for step in range(4):
        x, y = batch(step)
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert plugin.landed is True
        torch.manual_seed(step)
        with precision.forward():
            loss = nn.functional.cross_entropy(plain(x), y)
        precision.step(loss, clip_norm=0.5)
    ours, theirs = plugin.engine.wide_weights(), precision.wide_weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(model.module[1].running_var, plain[1].running_var)


def test_a_step_that_overflows_is_skipped_and_known() -> None:
    model, optimizer, plugin, fabric = fitted("fp16-master")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    fabric.backward(model(batch(0)[0]).sum() * math.inf)
    optimizer.step()
    assert plugin.landed is False
    assert plugin.engine.scale == 2.0**9
    torch.testing.assert_close(model.module.state_dict(), before, rtol=0, atol=0)


def test_the_state_travels_with_fabrics_checkpoints() -> None:
    _, _, plugin, _ = fitted("fp16-kahan")
    state = plugin.state_dict()
    assert set(state["kahan_terms"]) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    _, _, other, _ = fitted("fp16-kahan")
    other.load_state_dict({**state, "scale": 2.0**5})
    assert other.engine.scale == 2.0**5


def test_what_was_not_prepared_and_what_cannot_be_skipped_is_refused() -> None:
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=LowprecPrecision())
    model = network()
    with pytest.raises(UnsupportedError, match=r"call plugin.prepare\(model, optimizer\) before fabric.setup"):
        fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _, optimizer, _, _ = fitted("fp16-master")
    with pytest.raises(UnsupportedError, match="a step with a closure cannot be skipped"):
        optimizer.step(closure=lambda: None)
