"""Scaled weight standardisation: the weight against its definition, the constants against the recipe and the data."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import FP16, FP32, FP64
from lowprec.methods import convert
from lowprec.methods.scaled_ws import read_places
from lowprec.methods.signals import PUBLISHED_GAINS, Signal, after_elementwise, propagate
from lowprec.methods.structure import traced
from lowprec.models import mlp, small_resnet
from lowprec.norm import L1BatchNorm2d
from lowprec.parametrize import ScaledStandardisation
from lowprec.precision import MODES, Precision
from lowprec.report import ChangeReport
from lowprec.weights import standardised_weight

RELU = PUBLISHED_GAINS["relu"]
# Of the variance of an activation of the 2^16 equally likely values that signals are made of, measured for eight
# activations against an integral: 1e-5 at most.
SHAPE = 1e-5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def standardised(layer: nn.Module) -> ScaledStandardisation:
    made = layer.parametrizations.weight[0]
    assert isinstance(made, ScaledStandardisation)
    return made


def constants(model: nn.Module) -> dict[str, float]:
    return {
        path: float(standardised(layer).constant)
        for path, layer in model.named_modules()
        if hasattr(layer, "parametrizations")
    }


def by_definition(weight: np.ndarray, gain: np.ndarray, constant: float, eps: float) -> np.ndarray:
    """One row at a time, with the standard library's exact sums."""
    made = np.empty_like(weight)
    for index, row in enumerate(weight):
        values = np.ravel(row).tolist()
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        made[index] = constant * gain[index] * (row - mean) / math.sqrt(max(variance * len(values), eps))
    return made


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6, 1, 3, 3), (3, 2, 5)])
def test_the_weight_is_that_of_the_definition_and_of_unit_rows(shape):
    weight = torch.randn(shape, dtype=torch.float64) * 3 + 5
    weight[0] = 0.7 + 1e-4 * weight[0]  # below eps: 1e-8 * 9 * fan-in
    gain = torch.rand(shape[0], dtype=torch.float64) + 0.5
    made = standardised_weight(weight, gain, 0.3, 1e-4)
    reference.close(made, by_definition(weight.numpy(), gain.numpy(), 0.3, 1e-4))
    rows = made.flatten(1)
    reference.close(rows.sum(1), np.zeros(shape[0]))
    reference.close(rows.square().sum(1)[1:], (0.3 * gain).square()[1:])
    assert rows.square().sum(1)[0] < (0.3 * gain[0]).square() / 2  # eps is a floor of n var, not a summand


def test_only_the_direction_of_the_centred_weight_counts():
    weight, gain = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    reference.close(standardised_weight(7 * weight - 2, gain), standardised_weight(weight, gain))
    weight.requires_grad_(True)
    upstream = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    (standardised_weight(weight, gain) * upstream).sum().backward()
    reference.close(weight.grad.sum((1, 2, 3)), np.zeros(4))
    centred = weight.detach() - weight.detach().mean((1, 2, 3), keepdim=True)
    reference.close((weight.grad * centred).sum((1, 2, 3)), np.zeros(4))
    assert weight.grad.abs().max() > 1e-2
    weight = weight.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(standardised_weight, (weight, torch.rand(4, dtype=torch.float64) + 1))


def test_a_constant_filter_has_a_finite_gradient():
    weight = torch.full((2, 9), 0.25, requires_grad=True)
    (standardised_weight(weight, torch.ones(2)) * torch.randn(2, 9)).sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 48, 3), nn.Conv2d(48, 96, 3, groups=48), nn.Linear(512, 64)])
def test_unit_signals_stay_of_unit_size_whatever_the_number_of_outputs(layer):
    model, _ = convert(nn.Sequential(layer, nn.ReLU()), "scaled_ws")
    x = torch.randn(64, layer.weight.shape[1] * getattr(layer, "groups", 1), *(4 for _ in layer.weight.shape[2:]))
    y = model[0](x + 3).detach()
    # Given the rows, of norm 1, outputs are N(0, 1): at least 64 * 48 independent ones, 5 standard errors.
    assert abs(float(y.var()) - 1) < 5 * math.sqrt(2 / 3072)


class PreActivation(nn.Module):
    def __init__(self, width: int, outputs: int | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        outputs = outputs or width
        self.norm1, self.norm2, self.act = nn.BatchNorm1d(width), nn.BatchNorm1d(outputs), act or nn.ReLU()
        self.conv1, self.conv2 = nn.Conv1d(width, outputs, 1), nn.Conv1d(outputs, outputs, 1)
        self.shortcut = nn.Conv1d(width, outputs, 1) if outputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(x))
        return (x if self.shortcut is None else self.shortcut(y)) + self.conv2(self.act(self.norm2(self.conv1(y))))


class PostActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def test_a_pre_activation_network_gets_the_constants_of_the_published_recipe():
    blocks = [PreActivation(4), PreActivation(4), PreActivation(4, 8), PreActivation(8)]
    network = nn.Sequential(nn.Conv1d(1, 4, 1), *blocks, nn.Flatten(), nn.Linear(8, 2))
    model, report = convert(network, "scaled_ws", alpha=0.3)
    found = constants(model)
    gain, expected, want = RELU, 1.0, {}
    for index, block in enumerate(blocks, start=1):
        beta = math.sqrt(expected)
        want |= {f"{index}.conv1": gain / beta, f"{index}.conv2": 0.3 * gain}
        if block.shortcut is not None:
            want[f"{index}.shortcut"] = gain / beta
            expected = 1.0
        expected += 0.3**2
    # float32 buffers of numbers computed in float64; beta of ReLU takes no more than rounding.
    assert found.keys() == want.keys()
    np.testing.assert_allclose([found[key] for key in want], list(want.values()), rtol=FP32.unit_roundoff * 2)
    refused = {row.name: row.reason for row in report.refused}
    assert refused["0"] == "is not standardised: its fan-in is 1, so that less its mean it would be zero"
    assert refused["6"] == "is not standardised: it makes the logits"
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def integral(function) -> float:
    """The variance of function(z) for z from N(0, 1), Simpson's rule with breaks at whole numbers."""
    z = np.linspace(-12, 12, 24 * 512 + 1)
    weights = np.where(np.arange(z.size) % 2, 4.0, 2.0) * np.exp(-z * z / 2)
    y = function(torch.tensor(z)).numpy()
    mean = (weights * y).sum() / weights.sum()
    return float((weights * (y - mean) ** 2).sum() / weights.sum())


@pytest.mark.parametrize(
    ("function", "module"),
    [(F.relu, nn.ReLU()), (F.gelu, nn.GELU()), (F.silu, nn.SiLU()), (F.relu6, nn.ReLU6()), (torch.tanh, nn.Tanh()),
     (F.hardswish, nn.Hardswish()), (lambda x: F.leaky_relu(x, 0.25), nn.PReLU(3)), (F.elu, nn.ELU(inplace=True)),
     (lambda x: 0.5 * x + 2, None)],
)  # fmt: skip
def test_activations_bring_signals_back_to_variance_one(function, module):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.fc = module, nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.act or function)(x))

    network = Network()
    places = read_places(network, 0.2, ChangeReport())
    published = PUBLISHED_GAINS.get(type(module).__name__.lower())
    if published:
        np.testing.assert_allclose(1 / places["fc"].std, published, rtol=1e-14)
    # DeepMind's three are estimates from 262144 samples: 5 standard errors of a standard deviation are 1e-2 at most.
    rtol = 1e-2 if published else SHAPE
    np.testing.assert_allclose(places["fc"].std, math.sqrt(integral(function)), rtol=rtol)


@pytest.mark.parametrize("block", [PreActivation, PostActivation])
def test_signals_have_the_predicted_size_through_a_deep_stack(block):
    """Twelve blocks of width 512: every layer gives variance 1, or alpha^2 at the end of a branch."""
    width, depth = 512, 12
    stem = nn.Sequential(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width))
    blocks = [block(width) for _ in range(depth)]
    model, _ = convert(
        nn.Sequential(stem, nn.ReLU() if block is PostActivation else nn.Identity(), *blocks), "scaled_ws"
    )
    seen = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv1d):
            layer.register_forward_hook(lambda _, __, y, path=path: seen.update({path: float(y.detach().var())}))
    with torch.no_grad():
        model(torch.randn(64, width, 16))
    assert len(seen) == 1 + 2 * depth
    # The variance of a layer's output is an average over `width` rows of random directions: each is off by a relative
    # sqrt(2 / width) at most, even if all its inputs were one value, and the average of the trunk no more. The trunk
    # takes the errors of what came before, so 4 standard errors, for 24 layers.
    for path, variance in seen.items():
        assert abs(variance / (0.04 if path.endswith("conv2") else 1) - 1) <= 4 * math.sqrt(2 / width), (path, variance)


def test_what_is_added_to_an_activation_keeps_its_shape():
    """relu(relu(z) + 0.2 y) against a million samples."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(F.relu(self.a(x)) + 0.2 * self.b(x)))

    network = Network()
    draw = np.random.default_rng(0)
    z, y = draw.standard_normal((2, 10**6))
    want = np.maximum(np.maximum(z, 0) / RELU * math.sqrt(2 / (1 - 1 / math.pi)) + 0.2 * y, 0).std()
    # A standard deviation from 2^16 pairs and one from 10^6, each within 4 of its standard errors sqrt(kurtosis / 4n),
    # the kurtosis below 9.
    assert abs(read_places(network, 0.2, ChangeReport())["c"].std / want - 1) <= 4 * (1.5 / 2**8 + 1.5 / 10**3)


def test_signals_add_mix_and_multiply():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 3.0]))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            wide = x * 2
            return (
                x + wide,
                torch.cat([x, wide + 1], 1),
                wide * self.scale,
                x.view(x.size(0) * 2, -1),
                torch.sigmoid(x) * x,
            )

    network = Network()
    graph = traced(network)
    found = propagate(network, graph, after_elementwise)
    total, mixed, scaled, viewed, gated = (found[node] for node in list(graph.nodes)[-1].args[0])
    np.testing.assert_allclose([total.variance, mixed.mean, mixed.variance], [5, 0.5, 2.5 + 0.25], rtol=SHAPE)
    # Independent: (4)(1) + (4)(2^2); of 2^16 random pairs 5 standard errors of a mean of squares of kurtosis below 9.
    assert abs(scaled.variance / 20 - 1) <= 5 * 3 / 2**8
    assert viewed == Signal()
    assert abs(gated.mean) < 5 / 2**8
    x = np.random.default_rng(0).standard_normal((2, 10**6))
    assert abs(gated.variance / (x[0] / (1 + np.exp(-x[1]))).var() - 1) <= 5 * (3 / 2**8 + 3 / 10**3)


def test_skip_init_starts_the_network_as_its_trunk_and_lets_it_learn():
    network = nn.Sequential(nn.Conv1d(2, 4, 1), PreActivation(4), PreActivation(4), nn.Flatten(), nn.Linear(4, 2))
    model, report = convert(network, "scaled_ws", skip_init=True)
    x = torch.randn(8, 2, 1)
    assert torch.equal(model(x), model[4](model[3](model[0](x))))
    assert any(row.name == "1.conv2" and row.reason.endswith("gains start at 0") for row in report.changed)
    model(x).square().sum().backward()
    assert standardised(model[1].conv2).gain.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_gains_and_constants_stay_wide_and_weights_are_rounded_once(mode):
    model, _ = convert(small_resnet(width=4, blocks=1), "scaled_ws")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with precision.forward():
        loss = F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
    assert precision.step(loss)
    layer = model.blocks[0].conv1
    made, latent = standardised(layer), layer.parametrizations.weight.original
    assert made.gain.dtype == made.constant.dtype == torch.float32
    assert not torch.equal(made.gain, before["blocks.0.conv1.parametrizations.weight.0.gain"])
    want = by_definition(
        latent.detach().double().numpy(), made.gain.detach().double().numpy(), float(made.constant), 1e-4
    )
    half = latent.dtype == torch.float16
    # float32 moments of 36 values, and one rounding to half, at least of a subnormal.
    np.testing.assert_allclose(
        layer.weight.detach().double(), want, atol=1e-6 * np.abs(want).max() + (2.0**-25 if half else 0),
        rtol=(FP16.unit_roundoff if half else 0) + reference.rounding_bound(FP32, 36),
    )  # fmt: skip


def test_a_copy_a_loaded_state_and_a_weight_that_is_set():
    model, _ = convert(small_resnet(width=4), "scaled_ws")
    x = torch.randn(4, 1, 8, 8)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    other, _ = convert(small_resnet(width=4), "scaled_ws", alpha=0.7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))  # the constants are in the state
    weight = torch.randn_like(model.stem.weight)
    model.stem.weight = weight
    assert torch.equal(model.stem.parametrizations.weight.original, weight)


class Input(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.up, self.group, self.twice = nn.ConvTranspose2d(4, 4, 2), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1)
        self.unused, self.mean, self.var = nn.Linear(3, 3), torch.zeros(4), torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.up(F.relu(self.norm(self.conv(self.first(x))))))
        x = self.twice(x + F.batch_norm(x, self.mean, self.var))
        return (x + self.twice(x)).mean((2, 3))


class Decides(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_done_is_said():
    model, report = convert(Input(), "scaled_ws")
    refused = {row.name: row.reason for row in report.refused}
    assert refused == {
        "first": "normalises what the network is given, whose size nothing else knows; it stays",
        "group": "is a GroupNorm, not a batch norm; it stays",
        "batch_norm": "a functional batch norm is not a module and cannot be taken out; it stays",
        "add_1": "residual branch 1 keeps its full size: 'twice' is used more than once",
        "up": "is not standardised: the method is not defined for transposed convolutions",
        "unused": "is not standardised: the network never calls it as a layer of its own",
    }
    assert type(model.first) is nn.BatchNorm2d
    assert type(model.norm) is nn.Identity
    # Called with variance 1 + 1 and then with 1: the larger one counts.
    np.testing.assert_allclose(constants(model)["twice"], math.sqrt(0.5), rtol=2 * FP32.unit_roundoff)
    with pytest.raises(ConfigError, match=r"scaled_ws: alpha=0, eps=0.0001; both are numbers above 0"):
        convert(small_resnet(), "scaled_ws", alpha=0)
    with pytest.raises(UnsupportedError, match=r"torch\.fx cannot trace"):
        convert(Decides(), "scaled_ws")
    with pytest.raises(UnsupportedError, match="'scaled_ws' found no weight to standardise in Sequential"):
        convert(nn.Sequential(nn.Linear(2, 2)), "scaled_ws")


def test_weights_are_kept_when_asked_and_other_norms_go_too():
    network = small_resnet(L1BatchNorm2d, width=4)
    model, _ = convert(network, "scaled_ws", init=False)
    assert torch.equal(model.blocks[0].conv1.parametrizations.weight.original, network.blocks[0].conv1.weight)
    assert not [module for module in model.modules() if isinstance(module, L1BatchNorm2d)]
    fused, _ = convert(small_resnet(width=4), "l1")
    model, _ = convert(fused, "scaled_ws", init=False)
    plain, _ = convert(small_resnet(width=4), "scaled_ws", init=False)
    assert constants(model) == constants(plain)
    perceptron, _ = convert(mlp().double(), "scaled_ws")
    assert set(constants(perceptron)) == {"1", "4"}
    assert perceptron[1].bias is not None
    # float64 all through: the gain is what makes unit rows.
    rows = perceptron[4].weight.detach().square().sum(1)
    np.testing.assert_allclose(rows, RELU**2, rtol=reference.rounding_bound(FP64, 64))
