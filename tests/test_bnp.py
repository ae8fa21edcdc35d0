"""Batch normalization preconditioning against float64 references, and in the loops that users have."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from reference_norm import close
from torch import nn
from torch.nn import functional as F

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import FP32, FP64
from lowprec.methods import attach, convert
from lowprec.methods.bnp import precondition
from lowprec.methods.input_statistics import InputStatistics, measured, pooled
from lowprec.models import mlp, small_resnet
from lowprec.precision import MODES, Precision

TINY = 1e-300  # an eps2 that is lost beside any variance
EXACT = {"rho": 0.0, "eps1": 0.0, "eps2": TINY}  # the statistics of the step alone
CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 4, 3, padding="same", groups=4),
    nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, padding=2),
    nn.Conv3d(4, 2, 2, stride=2),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def attached(model, optimizer=None, lr=0.1, convert_options=None, **options):
    """A converted model that was not drawn anew, its optimizer, and the handle."""
    model, _ = convert(model, "bnp", init=False, **(convert_options or {}))
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, attach(model, optimizer, **options)


def columns_of(layer, x):
    """The rows that the layer multiplies its weight with, by torch's own unfold, per group: (groups, rows, columns)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).numpy()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    rows = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # (N, C K, L)
    rows = rows.transpose(1, 2).reshape(-1, layer.groups, rows.shape[1] // layer.groups)
    return rows.transpose(0, 1).numpy()


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Linear(30, 4), *CONVOLUTIONS[:5]], ids=str)
def test_a_step_is_plain_gradient_descent_on_the_layer_written_for_standardised_inputs(layer):
    """W a + b = (W sigma) (a - mu) / sigma + (b + W mu): descend on these, go back, and the function is the same."""
    layer = copy.deepcopy(layer).double()
    shape = (7, 4, 6, 5) if isinstance(layer, nn.Conv2d) else (9, layer.in_features)
    x = torch.randn(shape, dtype=torch.float64)
    x = x * 3 + 1
    target = torch.randn_like(layer(x))
    lr = 0.05
    groups = getattr(layer, "groups", 1)
    rows = torch.tensor(columns_of(layer, x))  # (g, n, k)
    mu, sigma = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
    weight = layer.weight.detach().reshape(groups, -1, rows.shape[2])
    bias = layer.bias.detach().reshape(groups, -1)
    wide = (weight * sigma).requires_grad_(True)
    shift = (bias + (weight * mu).sum(2)).requires_grad_(True)
    out = ((rows - mu) / sigma) @ wide.transpose(1, 2) + shift[:, None]  # (g, n, o)
    wanted = target.flatten(2).transpose(1, 2).reshape(rows.shape[1], -1) if target.dim() > 2 else target
    (out.transpose(0, 1).reshape(rows.shape[1], -1) - wanted).square().mean().backward()
    q2 = max(rows.shape[2] / rows.shape[1], 1)
    new = ((wide - lr / q2 * wide.grad) / sigma).detach()
    new_bias = (shift - lr / q2 * shift.grad).detach() - (new * mu).sum(2)

    model, optimizer, _ = attached(layer, lr=lr, convert_options={"columns": "patch"}, **EXACT)
    (model(x) - target).square().mean().backward()
    optimizer.step()
    close(model.weight, new.reshape(model.weight.shape))
    close(model.bias, new_bias.reshape(-1))


def test_q_can_count_the_samples_of_a_convolution_instead_of_its_positions():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    moves = []
    for rows in ("positions", "samples"):
        torch.manual_seed(0)
        model, optimizer, _ = attached(nn.Conv2d(4, 6, 3).double(), lr=0.1, rows=rows, **EXACT)
        before = model.weight.detach().clone()
        model(x).square().mean().backward()
        optimizer.step()
        moves.append(before - model.weight.detach())
    close(moves[0] * (36 / 32), moves[1] * (36 / 2))  # 36 columns; 2 samples of 16 positions


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_patch_statistics_are_those_of_the_unfolded_input(layer):
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, 4, *[7, 6, 5][: len(layer.kernel_size)], dtype=torch.float64) * 2 + 1
    found = measured(layer, x, "patch")
    outputs = layer(x)
    assert found[1:3].tolist() == [3, 3 * outputs[0, 0].numel()]
    mean, squares = found[3:].chunk(2)
    if isinstance(layer, nn.Conv2d):
        rows = columns_of(layer, x)
        close(mean, rows.mean(1).reshape(-1))
        close(squares / found[0], rows.var(1).reshape(-1))
    # In any number of dimensions: the mean of an output is linear in the means of what the kernel reads.
    taps = mean.reshape(layer.groups, 1, -1)
    weight = layer.weight.detach().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    close((weight * taps).sum(2).reshape(-1) + layer.bias.detach(), outputs.mean([0, *range(2, x.dim())]).detach())


def test_channel_statistics_are_torchs_own_and_empty_or_broken_parts_count_for_nothing():
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64) + 2
    found = measured(layer, x, "channel")
    mean, squares = found[3:].chunk(2)
    close(mean, x.mean((0, 2, 3)))
    close(squares / found[0], x.var((0, 2, 3), correction=0))
    assert found[:3].tolist() == [90, 3, 90]
    parts = [measured(layer, part, "channel") for part in x.split([1, 2])]
    close(pooled(parts), found)
    broken = torch.full_like(found, math.nan)
    close(pooled([parts[0], broken, measured(layer, x[:0], "channel"), parts[1]]), found)
    assert torch.equal(pooled([broken]), torch.zeros_like(found))


def test_the_formula_never_ascends_and_is_the_gradient_itself_for_standardised_inputs():
    for groups in (1, 2):
        grad, bias_grad = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        mean, variance = torch.randn(3 * groups, dtype=torch.float64), torch.rand(3 * groups, dtype=torch.float64) + 0.1
        new, new_bias = precondition(grad, bias_grad, mean, variance, 2.0, groups)
        assert (new * grad).sum() + (new_bias * bias_grad).sum() > 0
        same, same_bias = precondition(grad, bias_grad, mean * 0, variance * 0 + 1, 4.0, groups)
        close(same, grad / 4)
        close(same_bias, bias_grad / 4)
        scaled, none = precondition(grad, None, mean, variance, 1.0, groups)
        assert none is None
        assert (scaled * grad).sum() > 0


def test_scaling_and_shifting_the_inputs_does_not_change_what_a_step_makes_of_the_function():
    x = torch.randn(20, 6, dtype=torch.float64)
    scale, shift = torch.rand(6, dtype=torch.float64) * 5 + 0.2, torch.randn(6, dtype=torch.float64)
    values = {}
    for name in ("bnp", "sgd"):
        results = []
        for moved in (False, True):
            torch.manual_seed(1)
            layer = nn.Linear(6, 3).double()
            inputs = x
            if moved:
                with torch.no_grad():
                    layer.weight.div_(scale)
                    layer.bias.sub_(layer.weight @ shift)
                inputs = x * scale + shift
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            if name == "bnp":
                layer, optimizer, _ = attached(layer, lr=0.1, **EXACT)
            F.cross_entropy(layer(inputs), torch.arange(20) % 3).backward()
            optimizer.step()
            results.append(layer(inputs).detach())
        values[name] = results
    close(*values["bnp"])
    assert (values["sgd"][0] - values["sgd"][1]).abs().max() > 1e-3  # what the test would see


def test_q_bounds_the_largest_eigenvalue_where_there_are_less_rows_than_columns():
    """lambda_max of (1/N) [e, G]^T [e, G] / q^2 is about (1 + sqrt(m/N))^2 / (m/N) <= 4 for standard normal G."""
    for rows, columns in ((10, 100), (50, 2000), (100, 100)):
        x = torch.randn(rows, columns, dtype=torch.float64)
        x = (x - x.mean(0)) / x.std(0, correction=0)
        both = torch.cat([torch.ones(rows, 1, dtype=torch.float64), x], 1)
        largest = torch.linalg.eigvalsh(both @ both.T / rows)[-1] / max(columns / rows, 1)
        assert largest <= 4 * 1.05  # the edge of the spectrum fluctuates by N^(-2/3)


def test_running_statistics_hold_the_spread_between_steps_so_a_batch_of_one_has_a_variance():
    statistics = InputStatistics((3,), torch.float64, torch.device("cpu"))
    x = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]).double() + 3
    for row in x:
        statistics.take_in(row, torch.zeros(3), 1 - 1e-9)
    # A plain average over 4000 steps and the start (mean 0, variance 1), which counts as one.
    full = torch.cat([x, torch.zeros(1, 3)])
    close(statistics.mean, full.mean(0))
    close(statistics.variance, full.var(0, correction=0) + 1 / 4001)
    weights = []
    for _ in range(150):
        before = InputStatistics((1,), torch.float64, torch.device("cpu"))
        before.steps.fill_(len(weights))
        before.take_in(torch.ones(1), torch.zeros(1), 0.99)
        weights.append(before.mean.item())
    wanted = [max(0.01, 1 / (step + 2)) for step in range(150)]
    np.testing.assert_allclose(weights, wanted, rtol=reference.rounding_bound(FP64))


def steps(model, optimizer, batches, precision=None):
    for x, y in batches:
        if precision is None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        else:
            with precision.forward():
                loss = F.cross_entropy(model(x), y)
            precision.step(loss)


def digits(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


def test_micro_batches_are_one_batch_whatever_the_loop():
    ends = {}
    x, y = digits(12)
    for name in ("whole", "parts", "precision parts", "precision whole"):
        torch.manual_seed(0)
        model, optimizer, _ = attached(small_resnet(width=4).double(), convert_options={"columns": "patch"})
        if name.startswith("precision"):
            precision = Precision("fp32")
            precision.prepare(model, optimizer)
        for _ in range(3):
            pieces = [(x, y)] if "whole" in name else [(x[:5], y[:5]), (x[5:], y[5:])]
            for images, labels in pieces:
                loss = F.cross_entropy(model(images.double()), labels) * len(images) / 12
                precision.backward(loss) if name.startswith("precision") else loss.backward()
            if name.startswith("precision"):
                precision.step()
            else:
                optimizer.step()
                optimizer.zero_grad()
        ends[name] = torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])
    for name in ("parts", "precision parts", "precision whole"):
        close(ends[name], ends["whole"], 2**16)  # a dozen layers, three steps


def test_dropped_gradients_take_their_statistics_along():
    x, y = digits(8)
    other, _ = digits(8, seed=2)
    ends = []
    for detour in (False, True):
        torch.manual_seed(0)
        model, optimizer, _ = attached(mlp(hidden=[8]))
        if detour:
            F.cross_entropy(model(other * 100), y).backward()
            optimizer.zero_grad()  # as GradScaler loops do after a step that was skipped
        with torch.no_grad():
            model(other)
        model.eval()(other)
        model.train()
        steps(model, optimizer, [(x, y)])
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.scaled])
def test_a_skipped_step_leaves_the_statistics_in_every_mode(mode):
    x, y = digits(16)
    model, optimizer, _ = attached(small_resnet(width=4))
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    steps(model, optimizer, [(x, y)], precision)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    statistics = model.stem.input_statistics
    assert statistics.mean.dtype == torch.float32
    assert int(statistics.steps) == 1
    with precision.forward():
        loss = F.cross_entropy(model(x), y) * math.inf
    assert not precision.step(loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    steps(model, optimizer, [(x, y)], precision)
    assert int(statistics.steps) == 2
    close_to = x.mean() * (1 - 1 / 3)  # the same batch twice, and the start
    assert abs(float(statistics.mean) - float(close_to)) <= reference.rounding_bound(FP32, 1024) * float(x.abs().max())


def test_precision_clips_what_was_preconditioned():
    x, y = digits(16)
    model, optimizer, _ = attached(mlp(hidden=[8]), lr=1.0)
    precision = Precision("fp32")
    precision.prepare(model, optimizer)
    before = torch.cat([param.detach().flatten() for param in model.parameters()])
    with precision.forward():
        loss = F.cross_entropy(model(x), y)
    precision.step(loss, clip_norm=1e-3)
    after = torch.cat([param.detach().flatten() for param in model.parameters()])
    # The move of one SGD step at lr 1 has the norm that was asked for; up to the rounding of weights below 1.
    assert abs(float((after - before).norm()) - 1e-3) <= 2 * FP32.eps * math.sqrt(after.numel())


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_any_batch_size_learns_one_included(batch):
    x, y = digits(48)
    y = (x.mean((1, 2, 3)) > 0).long()
    model, optimizer, _ = attached(mlp(hidden=[16]), lr=0.1)
    model.train()
    for epoch in range(8):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
        steps(model, optimizer, [(x[index], y[index]) for index in order.split(batch)])
    accuracy = (model(x).argmax(1) == y).float().mean()
    assert accuracy > 0.8


def test_layers_that_share_a_weight_or_are_used_twice_have_one_statistic_over_all_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model, optimizer, _ = attached(Twice().double(), **EXACT)
    assert model.a.input_statistics is model.b.input_statistics
    seen = []
    for layer in (model.a, model.b):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.randn(6, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    optimizer.step()
    close(model.a.input_statistics.mean, torch.cat(seen).mean(0))
    assert len(seen) == 3


def test_bnp_says_in_one_line_what_it_cannot_do():
    with pytest.raises(UnsupportedError, match="found no conv or linear layer in Sequential"):
        convert(nn.Sequential(nn.ReLU()), "bnp")
    with pytest.raises(ConfigError, match="columns is 'pixel'; choose channel or patch"):
        convert(mlp(), "bnp", columns="pixel")
    model, report = convert(
        nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)), "bnp"
    )
    assert [row.name for row in report.refused if "not preconditioned" in row.reason] == ["0"]
    assert any("got a bias of zeros, which centring needs" in row.reason for row in report.changed)
    assert isinstance(model[2], nn.Identity)
    kept, report = convert(mlp(), "bnp", remove_norms=False, skip=["4"])
    assert any(isinstance(module, nn.BatchNorm1d) for module in kept)
    assert [row.reason for row in report.refused] == ["is not preconditioned: left out by skip"]
    with pytest.raises(ConfigError, match=r"rho=1.*rho is from 0 to below 1"):
        attach(model, torch.optim.SGD(model.parameters()), rho=1)
    with pytest.raises(ConfigError, match=r"attach\('bnp'\): the optimizer holds none of the 1 weights"):
        attach(model, torch.optim.SGD(mlp().parameters()))


def test_options_of_attach_can_be_given_to_convert_so_that_a_config_can_hold_them():
    model, _ = convert(mlp(hidden=[8]), "bnp", rho=0.5, skip=["3"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    x, y = digits(8)
    steps(model, optimizer, [(x, y), (x, y)])
    # Weights 1/2 and max(1 - rho, 1/3) = 1/2: a quarter of the start's zero is left.
    wanted = 0.75 * x.flatten(1).mean(0)
    close(model[1].input_statistics.mean, wanted, terms=2**30)
    wrong, _ = convert(mlp(hidden=[8]), "bnp", rho=2.0)
    with pytest.raises(ConfigError, match="rho is from 0 to below 1"):
        attach(wrong, torch.optim.SGD(wrong.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"'bnp' has no option 'rhoo'; its options are columns, .*mean 'rho'"):
        convert(mlp(), "bnp", rhoo=0.5)


def test_the_handle_takes_everything_off():
    model, optimizer, handle = attached(mlp(hidden=[8]))
    steps(model, optimizer, [digits(8)])
    handle.remove()
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    steps(model, optimizer, [digits(8)])
    steps(twin, other, [digits(8)])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks
