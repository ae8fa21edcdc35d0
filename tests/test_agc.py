"""Adaptive gradient clipping against a float64 reference, and the traps of its public copies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn
from torch.nn import functional as F

from lowprec.errors import ConfigError
from lowprec.formats import FP32
from lowprec.methods import attach, convert
from lowprec.models import mlp, small_resnet
from lowprec.precision import MODES, Precision, master_of

LAYERS = [
    nn.Linear(5, 4),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.Embedding(7, 3),
    nn.LSTM(3, 2),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def units(tensor, layer):
    """The parts of an array that have one norm each, as index tuples; written out channel by channel."""
    if tensor.ndim < 2:
        return [...]
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return list(range(tensor.shape[0]))
    inputs = tensor.shape[0] // layer.groups
    return [
        (slice(group * inputs, (group + 1) * inputs), output)
        for group in range(layer.groups)
        for output in range(tensor.shape[1])
    ]


def clipped(weight, grad, layer, clip, eps):
    """The formula in float64."""
    result = np.array(grad)
    for part in units(weight, layer):
        limit = clip * max(math.sqrt((weight[part] ** 2).sum()), eps)
        size = math.sqrt((grad[part] ** 2).sum())
        if size > limit:
            result[part] = grad[part] * (limit / size)
    return result


def double(tensor):
    return tensor.detach().double().numpy().copy()


@pytest.mark.parametrize("clip", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_every_output_channel_is_clipped_by_its_own_norm(layer, clip):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    wanted = {}
    for name, param in layer.named_parameters():
        spread = torch.logspace(-2, 1, param.shape[0]).reshape(-1, *[1] * (param.dim() - 1))
        param.grad = torch.randn_like(param) * spread
        wanted[name] = clipped(double(param), double(param.grad), layer, clip, 1e-3)
    given = {name: param.grad.clone() for name, param in layer.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, "agc", clip=clip, skip=[])
    optimizer.step()
    for name, param in layer.named_parameters():
        # Two norms of n float32 squares, a quotient and a product.
        rtol = reference.rounding_bound(FP32, 2 * param.numel())
        np.testing.assert_allclose(double(param.grad), wanted[name], rtol=rtol, atol=0)
        for part in units(param, layer):
            if np.array_equal(wanted[name][part], double(given[name])[part]):
                assert torch.equal(param.grad[part], given[name][part])  # below the limit: to the bit
    once = {name: param.grad.clone() for name, param in layer.named_parameters()}
    optimizer.step()
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, once[name], rtol=reference.rounding_bound(FP32, param.numel()), atol=0)


def test_a_large_row_changes_no_other_row():
    """Public copies take the norm of a linear weight over the wrong axis, so that one row clips its column."""
    layer = nn.Linear(6, 5)
    model = nn.Sequential(layer, nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, "agc")
    layer.weight.grad = torch.full_like(layer.weight, 1e-5)
    layer.weight.grad[3] = 1e4
    optimizer.step()
    assert torch.equal(layer.weight.grad[[0, 1, 2, 4]], torch.full((4, 6), 1e-5))
    assert layer.weight.grad[3].norm() < 0.011 * layer.weight[3].norm()


@pytest.mark.parametrize(("skip", "names"), [(None, {"4"}), (["1"], {"1"}), ([], set())])
def test_what_is_skipped_keeps_its_weight_and_bias_gradients(skip, names):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer, "agc", skip=skip)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e3)
    optimizer.step()
    kept = {name for name, param in model.named_parameters() if bool((param.grad == 1e3).all())}
    assert {name.split(".")[0] for name in kept} == names
    assert all(len({name for name in kept if name.startswith(one)}) == 2 for one in names)


@pytest.mark.parametrize("mode", MODES)
def test_in_every_mode_the_gradients_that_are_clipped_are_unscaled(mode):
    """The step of a clipped row is lr * clip * ||W_i||, whatever the loss scale."""
    model = small_resnet(width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    attach(model, optimizer, "agc", clip=1e-2)
    before = {param: double(master_of(param)) for param in model.parameters()}
    with precision.forward():
        loss = F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)) * 100
    precision.step(loss)
    stored = MODES[mode].update not in (None, "master")
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            start, end = before[conv.weight], double(master_of(conv.weight))
            moved, size = (np.sqrt((value.reshape(len(value), -1) ** 2).sum(1)) for value in (end - start, start))
            # Half weights hold a step of 1 % to half an ulp of each weight (stochastic rounding: one), 2^-11 to 2^-10.
            slack = 2.0**-10 if stored else reference.rounding_bound(FP32, 100)
            assert (moved <= (1e-2 * (1 + 1e-5) + slack) * size).all(), name
            assert moved.max() > 0.9e-2 * size.min(), name


@pytest.mark.parametrize("fused", [False, True])
def test_with_torchs_scaler_the_limit_is_that_of_unscaled_gradients(fused):
    """A fused optimizer gets scaled gradients and unscales them in its kernel."""
    ends = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        model = mlp(hidden=[8])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        attach(model, optimizer, "agc", clip=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loss = F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        ends.append([double(param) for param in model.parameters()])
    for one, other in zip(*ends, strict=True):
        # Powers of two, so only the order of the products could tell them apart.
        np.testing.assert_allclose(one, other, rtol=4 * FP32.eps, atol=0)


def test_weights_that_start_at_zero_move_by_at_most_clip_times_eps():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach(model, optimizer, "agc")
    model[0].weight.grad = torch.randn(3, 3)
    optimizer.step()
    # The limit, the norm of three squares and the product.
    np.testing.assert_allclose(model[0].weight.norm(dim=1).detach(), 1e-5, rtol=8 * FP32.eps)
    model[0].weight.grad = torch.zeros(3, 3)
    optimizer.step()
    assert not model[0].weight.grad.any()


def test_it_goes_with_another_method_and_with_parametrised_weights():
    model, _ = convert(small_resnet(width=4), "bounded_weight_norm")
    model, _ = convert(model, "agc", clip=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach(model, optimizer)
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    optimizer.step()
    v = model.stem.parametrizations.weight.original
    ratio = v.grad.flatten(1).norm(dim=1) / (v + v.grad).flatten(1).norm(dim=1)
    assert ratio.max() <= 1e-3 * (1 + reference.rounding_bound(FP32, 40))


@pytest.mark.parametrize(("clip", "eps"), [(0, 1e-3), (-1, 1e-3), (math.inf, 1e-3), (math.nan, 1e-3), (0.01, 0)])
def test_constants_out_of_range_are_refused(clip, eps):
    model = mlp()
    with pytest.raises(ConfigError, match=r"agc: clip=.*, eps=.*; give two numbers above 0"):
        attach(model, torch.optim.SGD(model.parameters()), "agc", clip=clip, eps=eps)
