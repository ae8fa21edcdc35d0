"""The precision modes: masters, scale, transactions, overflow attribution."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import reference_half as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lowprec import Precision
from lowprec.errors import ConfigError, ScaleFloorError, UnsupportedError
from lowprec.formats import FP16, FP32
from lowprec.norm import L1BatchNorm2d
from lowprec.precision import MODES, master_of, without_half_hooks
from lowprec.precision.hooks import has_half_hooks
from lowprec.precision.scale import LossScale, ScalePolicy

HALF_MODES = tuple(mode.name for mode in MODES.values() if mode.scaled)
OVERFLOW = 2.0 * FP16.max  # a loss factor whose scaled gradient does not fit


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)
    )  # fmt: skip


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 3


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train_step(precision: Precision, model: nn.Module, factor: float = 1.0, **options: float) -> object:
    x, y = batch()
    with precision.forward():
        loss = nn.functional.cross_entropy(model(x), y) * factor
    return precision.step(loss, **options)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    values = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            values[f"param.{i}.{j}"] = param.detach().clone()
            values |= {f"state.{i}.{j}.{k}": v.clone() for k, v in optimizer.state[param].items() if v is not None}
    return values


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


# --- contract over MODES ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_with_the_same_calls(mode: str) -> None:
    model = network()
    optimizer = sgd(model)
    precision = Precision(mode)
    same_model, same_optimizer = precision.prepare(model, optimizer)
    assert same_model is model
    assert same_optimizer is optimizer
    losses = []
    for _ in range(12):
        x, y = batch()
        with precision.forward():
            output = model(x)
            loss = nn.functional.cross_entropy(output, y)
        assert output.dtype == torch.float32
        assert precision.step(loss, clip_norm=10.0) is True
        losses.append(loss.item())
        assert all(param.grad is None for param in model.parameters())
    assert losses[-1] < losses[0] / 2
    assert precision.last_overflow is None
    assert isinstance(precision.scale, float)
    model.eval()
    assert model(batch()[0]).dtype == torch.float32  # also outside of any context


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_resumes_every_mode_bit_for_bit(mode: str) -> None:
    runs = []
    for interrupted in (False, True):
        model, precision = network(), Precision(mode, growth_interval=3)
        optimizer = sgd(model)
        precision.prepare(model, optimizer)
        for step in range(6):
            if interrupted and step == 4:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.state_dict()))
                model, precision = network(), Precision(mode, growth_interval=3)
                optimizer = sgd(model)
                precision.prepare(model, optimizer)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                precision.load_state_dict(saved[2])
            train_step(precision, model)
        runs.append(snapshot(model, optimizer) | {"scale": torch.tensor(precision.scale)})
    assert_same(*runs)


def test_an_unknown_mode_is_refused_by_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'fp16-master'\? the modes are fp32, bf16"):
        Precision("fp16-mastr")


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_masters_are_the_exact_original_values_and_weights_their_rounding() -> None:
    model = network()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = sgd(model)
    Precision().prepare(model, optimizer)
    for name, param in model.named_parameters():
        assert torch.equal(master_of(param), before[name])
        narrow = not name.startswith("1.")
        assert param.dtype == (torch.float16 if narrow else torch.float32)
        assert (master_of(param) is not param) is narrow
        assert np.array_equal(param.detach().double().numpy(), reference.half(before[name].numpy())) or not narrow
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert [id(param) for param in held] == [id(master_of(param)) for param in model.parameters()]


def test_groups_hyperparameters_and_momentum_of_a_used_optimizer_are_kept() -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[4].parameters()}], lr=0.1, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    scheduler.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    Precision().prepare(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.010000000000000002]
    assert scheduler.optimizer is optimizer
    state = optimizer.state[master_of(model[0].weight)]["momentum_buffer"]
    assert torch.equal(state, momentum)
    assert state.dtype == torch.float32
    assert model[0].weight not in optimizer.state


def test_a_model_that_was_half_before_gets_float32_masters_and_float32_norms() -> None:
    model = network().half()
    optimizer = sgd(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    Precision().prepare(model, optimizer)
    assert all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())
    assert model[1].running_var.dtype == torch.float32


def test_tied_weights_stay_tied_and_share_one_master() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    model = Tied()
    optimizer = sgd(model)
    precision = Precision(init_scale=1.0)
    precision.prepare(model, optimizer)
    assert model.first.weight is model.second.weight
    assert len(optimizer.param_groups[0]["params"]) == 1
    with precision.forward():
        loss = model(torch.ones(2, 4)).square().mean()
    precision.backward(loss)
    expected = copy.deepcopy(model)
    without_half_hooks(expected).double()
    expected(torch.ones(2, 4).double()).square().mean().backward()
    found, exact = master_of(model.first.weight).grad, expected.first.weight.grad
    assert found is not None
    assert exact is not None
    # about ten half roundings between the weights and the gradient, each of unit roundoff
    assert (found - exact).abs().max() <= 10 * FP16.unit_roundoff * exact.abs().max()
    assert model.first.weight.grad is None


def test_parametrised_weights_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 8)), nn.ReLU(), nn.Linear(8, 3))
    precision = Precision()
    precision.prepare(model, sgd(model))
    originals = dict(model.named_parameters())
    assert originals["0.parametrizations.weight.original0"].dtype == torch.float16
    before = originals["0.parametrizations.weight.original1"].detach().clone()
    with precision.forward():
        loss = nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.arange(8) % 3)
    assert precision.step(loss)
    assert not torch.equal(before, originals["0.parametrizations.weight.original1"])


def test_wide_parameters_norms_integer_buffers_and_large_buffers_stay_wide() -> None:
    class Scaled(nn.Module):
        wide_parameters = ("scale", "table")

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.other = nn.Parameter(torch.ones(1))
            self.register_buffer("table", torch.ones(2))
            self.register_buffer("narrow", torch.ones(2))
            self.register_buffer("mask", torch.full((2,), -1e9))
            self.register_buffer("index", torch.arange(2))
            self.norm = L1BatchNorm2d(2)

    model = Scaled()
    Precision().prepare(model, sgd(model))
    types = {name: tensor.dtype for name, tensor in model.state_dict().items() if "." not in name}
    assert types == {
        "scale": torch.float32, "other": torch.float16, "table": torch.float32, "narrow": torch.float16,
        "mask": torch.float32, "index": torch.int64,
    }  # fmt: skip
    assert all(t.dtype in (torch.float32, torch.int64) for t in model.norm.state_dict().values())


def test_parameters_outside_the_optimizer_are_narrowed_and_their_gradients_dropped() -> None:
    model = network()
    precision = Precision()
    precision.prepare(model, sgd(model[4]))
    assert model[0].weight.dtype == torch.float16
    before = model[0].weight.detach().clone()
    train_step(precision, model)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_a_parameter_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = 1e6
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(UnsupportedError, match=r"parameter '4.weight' holds 1e\+06, which overflows float16"):
        Precision().prepare(model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert not has_half_hooks(model)


def test_misuse_is_refused_in_one_line() -> None:
    model, precision = network(), Precision()
    with pytest.raises(UnsupportedError, match="nothing is prepared"):
        precision.step()
    with pytest.raises(UnsupportedError, match="holds no parameter of this model"):
        precision.prepare(model, sgd(network()))
    with pytest.raises(UnsupportedError, match="LBFGS evaluates the loss several times"):
        precision.prepare(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UnsupportedError, match=r"parameter '0.weight' has no shape yet"):
        precision.prepare(lazy := nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), sgd(lazy))
    optimizer = sgd(model)
    precision.prepare(model, optimizer)
    with pytest.raises(UnsupportedError, match="one Precision per model"):
        precision.prepare(model, optimizer)
    with pytest.raises(UnsupportedError, match="was prepared already"):
        Precision().prepare(copied := copy.deepcopy(model), sgd(copied))
    with pytest.raises(UnsupportedError, match="step found no gradient"):
        precision.step()
    with pytest.raises(UnsupportedError, match=r"the loss has shape \(8, 3\)"):
        precision.step(model(batch()[0]))
    with pytest.raises(UnsupportedError, match="requires_grad=False; give one number"):
        precision.step(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="clip_norm is 0"):
        precision.step(clip_norm=0.0)
    model(batch()[0]).sum().backward()
    with pytest.raises(UnsupportedError, match=r"has a gradient that is not scaled: it came from loss.backward\(\)"):
        precision.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float16))]})
    model.zero_grad()
    with pytest.raises(UnsupportedError, match="a half parameter joined the optimizer after prepare"):
        train_step(precision, model)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    precision = Precision("fp16-autocast")
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with precision.forward():
        loss = model(torch.tensor([1, 2])).sum()
    with pytest.raises(UnsupportedError, match="a gradient is sparse"):
        precision.step(loss)


# --- the root hooks --------------------------------------------------------------------------------------------------


def test_floating_inputs_are_narrowed_wherever_they_are_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.seen: list[torch.dtype] = []

        def forward(self, a: Tensor, pair: tuple[Tensor, dict[str, Tensor]], *, index: Tensor) -> dict[str, Tensor]:
            self.seen = [a.dtype, pair[0].dtype, pair[1]["x"].dtype, index.dtype]
            return {"y": self.linear(a) + pair[0] + pair[1]["x"], "index": index}

    model = Nested()
    Precision().prepare(model, sgd(model))
    x = torch.ones(2, 4)
    out = model(x, (x, {"x": x.double()}), index=torch.arange(2))
    assert model.seen == [torch.float16, torch.float16, torch.float16, torch.int64]
    assert (out["y"].dtype, out["index"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("mode", HALF_MODES)
def test_a_forward_that_raises_closes_the_arithmetic(mode: str) -> None:
    model = network()
    Precision(mode).prepare(model, sgd(model))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.ones(2, 1, 5, 5))
    a = torch.ones(2, 2)
    assert (a @ a).dtype == torch.float32
    assert model(batch()[0]).isfinite().all()


def test_a_deep_copy_evaluates_alike_and_has_neither_masters_nor_optimizer() -> None:
    model = network()
    precision = Precision()
    precision.prepare(model, sgd(model))
    train_step(precision, model)
    copied = copy.deepcopy(model).eval()
    x = batch()[0]
    assert torch.equal(copied(x), model.eval()(x))
    assert all(master_of(param) is param for param in copied.parameters())
    saved = io.BytesIO()
    torch.save(copied, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), copied(x))


@pytest.mark.parametrize("mode", HALF_MODES)
def test_without_half_hooks_leaves_a_plain_module(mode: str) -> None:
    model = network().eval()
    Precision(mode).prepare(model, sgd(model))
    copied = copy.deepcopy(model)
    assert without_half_hooks(copied) is copied
    assert not has_half_hooks(copied)
    assert has_half_hooks(model)
    assert copied.double()(batch()[0].double()).dtype == torch.float64
    handle_maps = (copied._forward_hooks_always_called, copied._forward_pre_hooks_with_kwargs)
    assert not any(handle_maps)
    user_hook = model.register_forward_hook(lambda *_: None)
    without_half_hooks(model)
    assert list(model._forward_hooks) == [user_hook.id]


def test_weights_loaded_later_reach_the_masters_and_finer_masters_survive() -> None:
    model, other = network(), network()
    precision = Precision()
    precision.prepare(model, sgd(model))
    fine = master_of(model[0].weight).detach().clone()
    model.load_state_dict(model.state_dict())
    assert torch.equal(master_of(model[0].weight), fine)
    with torch.no_grad():
        other[0].weight.add_(1.0)
    model.load_state_dict(other.state_dict())
    assert torch.equal(master_of(model[0].weight), other[0].weight.detach().half().float())


# --- the step --------------------------------------------------------------------------------------------------------


def test_small_updates_reach_the_masters_that_half_weights_would_lose() -> None:
    """1000 steps of lr 1e-3 on a gradient of 1e-3: in half nothing moves."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    precision = Precision()
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    for _ in range(1000):
        with precision.forward():
            loss = model(torch.full((1, 1), 1e-3)).sum()
        precision.step(loss)
    gradient = float(torch.tensor(1e-3).half())
    expected = reference.sgd_momentum(1.0, [gradient] * 1000, 1e-3, 0.9)
    # each step rounds the weight (near 1) once in float32, half an ulp = FP32.unit_roundoff at most
    assert abs(master_of(model.weight).item() - expected) <= 1000 * FP32.unit_roundoff
    assert 0.009 < 1.0 - master_of(model.weight).item() < 0.011
    assert model.weight.item() == master_of(model.weight).half().item()


@pytest.mark.parametrize("mode", HALF_MODES)
def test_the_scale_is_exact(mode: str) -> None:
    """Two scales that neither overflow nor underflow give the same bits."""
    results = []
    for scale in (2.0**8, 2.0**12):
        model, precision = network(), Precision(mode, init_scale=scale)
        optimizer = sgd(model)
        precision.prepare(model, optimizer)
        x, y = batch()
        model[4].requires_grad_(True)
        with precision.forward():
            loss = nn.functional.cross_entropy(model(x), y)
        assert precision.step(loss)
        results.append(snapshot(model, optimizer)["param.0.0"])
    # gradients of 1e-3 and more are normal halves at both scales; a rare one below 2^-14 / 2^8 would round coarser
    assert torch.allclose(results[0], results[1], rtol=0, atol=0.1 * FP16.min_subnormal / 2**8 * 2**4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_clipping_bounds_the_unscaled_gradient(mode: str, fused: bool) -> None:
    for clip in ({}, {"clip_norm": 0.01}, {"clip_value": 1e-3}, {"clip_value": 1e-3, "clip_norm": 0.01}):
        model, precision = network(), Precision(mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        precision.prepare(model, optimizer)
        seen: list[Tensor] = []

        def look(optimizer: torch.optim.Optimizer, *_: object, seen: list[Tensor] = seen) -> None:
            seen += [param.grad.double().flatten() for group in optimizer.param_groups for param in group["params"]]

        optimizer.register_step_pre_hook(look)
        assert train_step(precision, model, **clip) is True
        found = torch.cat(seen)
        if not clip:
            unclipped = found
            continue
        expected = unclipped.clamp(-clip.get("clip_value", math.inf), clip.get("clip_value", math.inf))
        expected = expected * min(1.0, clip.get("clip_norm", math.inf) / expected.norm().item())
        # float32: the sum of ~1000 squares, its root, torch's 1e-6 beside the norm, one product
        assert (found - expected).norm() <= (1000 * FP32.unit_roundoff + 1e-6 / 0.01) * expected.norm()


@pytest.mark.parametrize("mode", HALF_MODES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, L1BatchNorm2d])
def test_a_step_that_overflows_changes_nothing_but_the_scale(mode: str, norm: Callable[[int], nn.Module]) -> None:
    model, precision = network(norm), Precision(mode)
    optimizer = sgd(model)
    precision.prepare(model, optimizer)
    train_step(precision, model)
    before = snapshot(model, optimizer)
    assert train_step(precision, model, factor=OVERFLOW) is False
    assert_same(snapshot(model, optimizer), before)
    assert precision.scale == 2.0**15
    assert precision.last_overflow is not None
    assert all(param.grad is None for param in [*model.parameters(), *optimizer.param_groups[0]["params"]])
    assert train_step(precision, model) is True
    assert int(model[1].num_batches_tracked) == 2


def test_micro_batches_add_up_and_move_statistics_once() -> None:
    x, y = batch()
    whole, parts = network(), network()
    for model, size in ((whole, 8), (parts, 4)):
        model[1].eval()  # the gradient of a batch norm in training is not the mean over micro-batches
        precision = Precision()
        precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for start in range(0, 8, size):
            with precision.forward():
                rows = slice(start, start + size)
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 8
            precision.backward(loss)
        assert precision.step() is True
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        gradient = (master_of(a) - master_of(b)).abs() / 0.1
        # the two half gradients of the parts, and that of the whole, are rounded once each; gradients are below 1
        assert gradient.max() <= 4 * FP16.unit_roundoff


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_two_micro_batches_merge_to_those_of_the_whole(mode: str) -> None:
    x, _ = batch()
    model = network()
    precision = Precision(mode)
    precision.prepare(model, sgd(model))
    conv = copy.deepcopy(model).eval()[:1]
    with precision.forward(), torch.no_grad():
        activations = conv(x.half() if mode == "fp16-master" else x).double()
    mean, var = activations.mean((0, 2, 3)), activations.var((0, 2, 3))
    for rows in (slice(0, 4), slice(4, 8)):
        with precision.forward():
            loss = model(x[rows]).mean()
        precision.backward(loss)
    precision.step()
    n = activations.numel() / 4
    tolerance = n * FP32.unit_roundoff  # a float32 sum of n terms
    assert torch.allclose(model[1].running_mean.double(), 0.1 * mean, rtol=tolerance, atol=tolerance)
    assert torch.allclose(model[1].running_var.double(), 0.9 + 0.1 * var, rtol=tolerance)
    assert int(model[1].num_batches_tracked) == 1


def test_a_block_that_raises_discards_its_statistics() -> None:
    model, precision = network(), Precision()
    precision.prepare(model, sgd(model))
    x, _ = batch()
    with contextlib.suppress(KeyError), precision.forward():
        model(x * 100)
        raise KeyError
    train_step(precision, model)
    alone, other = network(), Precision()
    other.prepare(alone, sgd(alone))
    train_step(other, alone)
    assert torch.equal(model[1].running_var, alone[1].running_var)
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize("mode", HALF_MODES)
def test_a_loss_in_half_costs_one_step_and_holds_the_scale_down(mode: str) -> None:
    """Its gradient is the scale, 2^16, which is infinite in half."""
    model, precision = network(), Precision(mode)
    precision.prepare(model, sgd(model))
    x, y = batch()
    landed = []
    for _ in range(2):
        with precision.forward():
            loss = nn.functional.cross_entropy(model(x), y)
        landed.append(precision.step(loss.half()))
    assert landed == [False, True]
    assert precision.scale == 2.0**15


def test_fp32_does_not_hide_a_gradient_that_is_not_finite() -> None:
    model, precision = network(), Precision("fp32")
    precision.prepare(model, sgd(model))
    assert precision.scale == 1.0
    assert train_step(precision, model, factor=math.nan) is True
    assert not model[0].weight.isfinite().all()


def test_plain_torch_and_fp32_mode_give_the_same_weights() -> None:
    ours, plain = network(), network()
    precision = Precision("fp32")
    precision.prepare(ours, sgd(ours))
    optimizer = sgd(plain)
    for _ in range(3):
        train_step(precision, ours)
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_recomputes_in_the_same_arithmetic() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, nn.Linear) else layer(x)
            return x

    results = []
    for cls in (nn.Sequential, Checkpointed):
        torch.manual_seed(0)
        model = cls(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        precision = Precision()
        precision.prepare(model, sgd(model))
        with precision.forward():
            loss = model(torch.ones(2, 8)).square().mean()
        assert precision.step(loss)
        results.append(model.state_dict())
    assert_same(*results)


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_a_checkpointed_norm_counts_its_batch_once_and_a_skipped_step_not_at_all(mode: str) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    statistics = []
    for cls in (nn.Sequential, Checkpointed):
        torch.manual_seed(0)
        model = cls(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        precision = Precision(mode)
        precision.prepare(model, sgd(model))
        losses = [1.0] if mode == "fp32" else [float("inf"), 1.0]  # fp32 skips nothing
        for factor in losses:
            with precision.forward():
                loss = model(torch.arange(32.0).reshape(4, 8) / 32).square().mean() * factor
            assert bool(precision.step(loss)) == (factor == 1.0)
            assert model[1].num_batches_tracked == (factor == 1.0)
        statistics.append(model[1].state_dict())
    assert_same(*statistics)


# --- overflow --------------------------------------------------------------------------------------------------------


def test_a_backward_overflow_is_named_by_the_gradient_nearest_the_loss() -> None:
    model, precision = network(), Precision(min_scale=2.0**16)
    optimizer = sgd(model)
    precision.prepare(model, optimizer)
    train_step(precision, model)
    before = snapshot(model, optimizer)
    with pytest.raises(ScaleFloorError, match=r"at its floor of 65536 .* the gradient of '4\.(weight|bias)'"):
        train_step(precision, model, factor=OVERFLOW)
    assert_same(snapshot(model, optimizer), before)
    assert precision.last_overflow is not None
    assert "'4." in precision.last_overflow


def test_an_overflow_that_begins_in_the_middle_is_named_there() -> None:
    class Blowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:  # type: ignore[override]
            return grads[0] * math.inf

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Blowing.apply(x)  # type: ignore[no-untyped-call]
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Layer(), nn.Linear(4, 4))
    precision = Precision(init_scale=1.0)
    precision.prepare(model, sgd(model))
    with precision.forward():
        loss = model(torch.ones(2, 4)).sum()
    assert precision.step(loss) is False
    assert precision.last_overflow is not None
    assert "the gradient of '1." in precision.last_overflow


def test_a_forward_overflow_is_named_by_the_innermost_layer() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))
    with torch.no_grad():
        inner[1].weight.fill_(6e4)
        inner[0].weight.fill_(10.0)
    precision = Precision(init_scale=1.0, min_scale=1.0)
    precision.prepare(model, sgd(model))
    with precision.forward():
        loss = model(torch.ones(2, 4)).sum()
    with pytest.raises(ScaleFloorError, match=r"first in the output of '1\.1' \(Linear\) in the forward"):
        precision.step(loss)


def test_an_input_that_overflows_half_is_named() -> None:
    model, precision = network(), Precision(init_scale=1.0, min_scale=1.0)
    precision.prepare(model, sgd(model))
    x, y = batch()
    with precision.forward():
        loss = nn.functional.cross_entropy(model(x * 1e6), y)
    with pytest.raises(ScaleFloorError, match="the model's input as it enters the first layer"):
        precision.step(loss)
    assert model[1].running_mean.isfinite().all()


def test_an_overflow_of_the_forward_is_named_at_the_first_skipped_step() -> None:
    model, precision = network(), Precision()
    precision.prepare(model, sgd(model))
    before = snapshot(model, sgd(model))
    model[4].register_forward_hook(lambda module, args, output: output * math.inf)
    assert train_step(precision, model) is False
    assert precision.last_overflow == "the output of '4' (Linear) in the forward"
    assert_same(before, snapshot(model, sgd(model)))  # the search moved nothing, running statistics included


def test_the_search_repeats_the_forward_with_the_same_random_numbers_and_gives_the_state_back() -> None:
    class Rare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            draws.append(torch.rand(()).item())
            return x * (math.inf if draws[-1] == draws[0] else 1.0)

    draws: list[float] = []
    model, precision = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), Rare(), nn.Linear(2, 1)), Precision()
    precision.prepare(model, sgd(model))
    with precision.forward():
        loss = model(torch.ones(1, 2)).sum()
    state = torch.get_rng_state()
    assert precision.step(loss) is False
    assert len(draws) == 2
    assert precision.last_overflow == "the output of '2' (Rare) in the forward"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_overflows_by_itself_is_named() -> None:
    model, precision = network(), Precision()
    precision.prepare(model, sgd(model))
    assert train_step(precision, model, factor=math.inf) is False
    assert precision.last_overflow == "the loss, which is inf before scaling, while every layer's output is finite"


def test_a_forward_that_never_steps_keeps_no_more_than_its_last_inputs() -> None:
    model, precision = nn.Sequential(nn.Linear(2, 1)), Precision()
    precision.prepare(model, sgd(model))
    inputs = [torch.ones(1, 2) for _ in range(100)]
    alive = [weakref.ref(x) for x in inputs]
    while inputs:
        with precision.forward():
            model(inputs.pop())
    assert sum(reference() is not None for reference in alive) <= 33  # one more is still the hook's argument


def test_the_scale_stops_at_its_floor_after_so_many_overflows() -> None:
    model, precision = network(), Precision()
    precision.prepare(model, sgd(model))
    for _ in range(18):  # 2^16 to 2^-2
        assert train_step(precision, model, factor=math.inf) is False
    assert precision.scale == 0.25
    with pytest.raises(ScaleFloorError, match=r"the loss scale is at its floor of 0.25"):
        train_step(precision, model, factor=math.inf)
    assert precision.scale == 0.25
    assert train_step(precision, model) is True


# --- the scale -------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_the_scale_is_a_power_of_two_in_its_bounds(landed: list[bool], interval: int, hysteresis: int) -> None:
    policy = ScalePolicy(init_scale=4.0, growth_interval=interval, min_scale=1.0, max_scale=32.0, hysteresis=hysteresis)
    scale = LossScale.start(policy)
    for step in landed:
        previous = scale
        scale = scale.update(step)
        assert policy.min_scale <= scale.value <= policy.max_scale
        assert math.frexp(scale.value)[0] == 0.5
        assert scale.landed_in_a_row < interval
        assert (scale.value >= previous.value) if step else (scale.value <= previous.value)


def test_growth_backoff_and_hysteresis_by_hand() -> None:
    scale = LossScale.start(ScalePolicy(init_scale=8.0, growth_interval=2, hysteresis=2))
    values = []
    for landed in (False, True, False, False, True, True, False, False):
        scale = scale.update(landed)
        values.append(scale.value)
    # first overflow tolerated; the second and third halve; two landed double and refill; one tolerated; halve
    assert values == [8.0, 8.0, 4.0, 2.0, 2.0, 4.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 1000.0}, "init_scale is 1000.0; give a power of two"),
        ({"init_scale": 0.0}, "give a power of two"),
        ({"growth_factor": 1.5}, "growth_factor is 1.5; give a power of two"),
        ({"growth_factor": 0.5}, "must be above 1"),
        ({"backoff_factor": 1.0}, "below 1"),
        ({"min_scale": 2.0**17}, "init_scale 65536.0 is outside min_scale 131072.0"),
        ({"max_scale": math.inf}, "max_scale is inf"),
        ({"growth_interval": 0}, "growth_interval is 0; give a whole number"),
        ({"hysteresis": 1.5}, "hysteresis is 1.5"),
    ],
)
def test_scale_arguments_are_checked_at_construction(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Precision("fp16-master", **arguments)  # type: ignore[arg-type]


def test_state_of_another_mode_or_model_is_refused() -> None:
    model, precision = network(), Precision()
    precision.prepare(model, sgd(model))
    state = precision.state_dict()
    other = Precision("fp16-autocast")
    other.prepare(copied := network(), sgd(copied))
    with pytest.raises(ConfigError, match="of mode 'fp16-master', this is 'fp16-autocast'"):
        other.load_state_dict(state)
    small = nn.Sequential(nn.Linear(2, 2))
    third = Precision()
    third.prepare(small, sgd(small))
    with pytest.raises(ConfigError, match=r"of another model: '0.weight' is \(4, 1, 3, 3\) there, \(2, 2\) here"):
        third.load_state_dict({**state, "masters": {k: v for k, v in state["masters"].items() if k[0] == "0"}})
    with pytest.raises(ConfigError, match="is in one of the two only"):
        third.load_state_dict(state)
    with pytest.raises(ConfigError, match="the stored loss scale 3 is outside"):
        precision.load_state_dict({**state, "scale": 3})
