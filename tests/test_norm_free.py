"""Methods without batch norms, or with other ones, on networks of nine kinds, from step to bundle."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.data import load_data
from lowprec.errors import ConfigError, DataError, UnsupportedError
from lowprec.export import export, fold
from lowprec.formats import FP16, FP32, FP64
from lowprec.methods import METHODS, attach, convert
from lowprec.methods.layers import NormalizedLinear
from lowprec.methods.mimic_norm import loss_floor
from lowprec.methods.one_batch_norm import FixedScale, TwoHeads
from lowprec.models import mlp, small_resnet
from lowprec.models.mobilenet import InvertedResidual
from lowprec.models.parts import parts_of
from lowprec.models.resnet import Bottleneck
from lowprec.models.shufflenet import ShuffleUnit
from lowprec.norm import is_norm
from lowprec.precision import MODES, Precision
from lowprec.precision.masters import master_of
from lowprec.train.ema import MovingAverage, averaged_values
from lowprec.weights import centre_

CLASSES = 3
PARTS, RELU6 = parts_of("batch", "relu"), parts_of("batch", "relu6")


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Inception(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.a, self.b1, self.b2 = conv_norm(inputs, width, 1), conv_norm(inputs, width, 1), conv_norm(width, width)
        self.c = conv_norm(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return F.relu(torch.cat([self.a(x), self.b2(F.relu(self.b1(x))), self.c(pooled)], 1))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def stem(width: int) -> list[nn.Module]:
    return [*conv_norm(1, width), nn.ReLU()]


NETWORKS = {
    "resnet": lambda: small_resnet(width=8, classes=CLASSES),
    "pre-activation resnet": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU(),
        *head(8),
    ),
    "bottlenecks": lambda: nn.Sequential(*stem(8), Bottleneck(8, 8, 1, PARTS), Bottleneck(32, 8, 2, PARTS), *head(32)),
    "vgg": lambda: nn.Sequential(
        *stem(8), *conv_norm(8, 16), nn.ReLU(), nn.MaxPool2d(2), *conv_norm(16, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, CLASSES),
    ),
    "shufflenet": lambda: nn.Sequential(*stem(16), *(ShuffleUnit(16, 16, 1, PARTS) for _ in range(2)), *head(16)),
    "mobilenet": lambda: nn.Sequential(*stem(8), *(InvertedResidual(8, 8, 1, 4, RELU6) for _ in range(2)), *head(8)),
    "inception": lambda: nn.Sequential(*stem(8), Inception(8, 8), Inception(24, 8), *head(24)),
    "densenet": lambda: nn.Sequential(*stem(8), Dense(8, 8), Dense(16, 8), nn.BatchNorm2d(24), nn.ReLU(), *head(24)),
    "mlp": lambda: mlp(hidden=[32, 32], classes=CLASSES),
}  # fmt: skip
LEARNING_RATE = {
    "mimic_norm": 3e-3, "one_batch_norm": 3e-2, "bnp": 3e-3, "kalman": 3e-3, "scaled_ws": 3e-3, "ic": 3e-3,
    "frn": 1e-2,
}  # fmt: skip
# A dense block's concatenations, of what came out of a ReLU too, are each read by a norm before a ReLU. An affine
# between two ReLUs that is not monotone stays an operation of its own, whichever method it comes from; plain batch norm
# keeps as many. (BNP and scaled_ws have none, mimic_norm leaves the norms that follow no layer.)
STAYS = {("densenet", method): 3 for method in ("mimic_norm", "one_batch_norm", "kalman")}
# IC puts a norm between a ReLU and each convolution but the first. A shift passes neither the ReLU nor the zeros around
# an image, so one operation stays for each kernel larger than 1x1; before all other layers the norm is gone.
STAYS |= {(network, "ic"): 2 for network in NETWORKS} | {
    ("resnet", "ic"): 6, ("pre-activation resnet", "ic"): 4, ("mlp", "ic"): 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    samples = load_data("digits")
    (x,), y = samples.inputs.values(), samples.labels
    few = y < CLASSES
    return torch.tensor(x[few]).float(), torch.tensor(y[few])


def loss_of(logits: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """The cross-entropy; of two heads as KataGo weighs them."""
    if isinstance(logits, Tensor):
        return F.cross_entropy(logits, labels)
    return 0.8 * F.cross_entropy(logits[0], labels) + 0.2 * F.cross_entropy(logits[1], labels)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", LEARNING_RATE)
def test_a_network_trains_in_half_folds_to_nothing_and_ships(method, network, digits, tmp_path):
    (x, y), original = digits, NETWORKS[network]()
    model, report = convert(original, method, **({"heads": "both"} if method == "one_batch_norm" else {}))
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] or report.refused
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[method])
    attach(model, optimizer)
    precision = Precision("fp16-master", init_scale=2.0**10)
    precision.prepare(model, optimizer)
    train, held = slice(0, 400), slice(400, None)
    for epoch in range(2):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(8):
            with precision.forward():
                loss = loss_of(model(x[train][index]), y[train][index])
            precision.step(loss, clip_norm=5.0)
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x[held]).argmax(1) == y[held]).float().mean())
    # Chance is 1/3; of 137 images 4 standard deviations above it are 0.49.
    assert accuracy > 1 / 3 + 4 * math.sqrt(2 / 9 / len(y[held])), accuracy
    twin, _ = convert(NETWORKS[network](), method)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    Precision("fp16-master").prepare(twin, twin_optimizer)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x[held]), model(x[held]))
    shipped = copy.deepcopy(model).float()
    _, folded = fold(shipped, (x[:2],))
    stays = STAYS.get((network, method), 0)
    if METHODS[method].folds.startswith("no:"):
        stays = sum(is_norm(module) for module in shipped.modules())
    assert folded.facts["norms_left"] <= stays, folded.refused
    bundle = export(shipped, (x[held][:16],), tmp_path / "bundle", precision="fp16")
    assert bundle.parity.passed, bundle.parity


def rows_of(model: nn.Module) -> dict[str, float]:
    """The largest row mean of each convolution, as a share of its largest weight."""
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            weight = master_of(conv.weight).detach().double().flatten(1)
            found[name] = float(weight.mean(1).abs().max() / weight.abs().max())
    return found


class Kinds(nn.Module):
    """Every kind of convolution that the authors' rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.wide, self.depthwise = nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
        self.grouped, self.point, self.one = nn.Conv2d(64, 64, 3, groups=8), nn.Conv2d(64, 1, 1), nn.Conv2d(1, 4, 1)
        self.fc = nn.Linear(4, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.relu(self.norm(self.rgb(x))))
        return self.fc(self.one(self.point(self.grouped(self.depthwise(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "centred"),
    [
        ({}, {"wide", "point"}),
        ({"min_fan_in": 50, "grouped": True}, {"wide", "point", "grouped"}),  # the CIFAR script
        ({"min_fan_in": 1}, {"rgb", "wide", "point"}),  # the ImageNet script
        ({"min_fan_in": 0, "grouped": True}, {"rgb", "wide", "point", "grouped", "depthwise"}),
    ],
)
def test_which_weights_are_centred(options, centred):
    model, report = convert(Kinds(), "mimic_norm", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    attach(model, optimizer)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.arange(4)).backward()
    optimizer.step()
    # A float32 mean of what has a mean of zero: the bound of the sum, over the largest weight.
    assert {name for name, share in rows_of(model).items() if share <= 2 * FP32.eps} == centred
    assert not torch.equal(model.wide.weight, before["wide.weight"])
    reasons = {row.name: row.reason for row in report.refused}
    assert "fan-in is 1, so that centred it would be zero" in reasons["one"] or "not above" in reasons["one"]
    assert model.one.weight.abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_weights_stay_centred_in_every_mode_with_averages_and_after_loading(mode):
    model, _ = convert(small_resnet(width=8), "mimic_norm", min_fan_in=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    attach(model, optimizer)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    average = MovingAverage(0.9, averaged_values(model, precision.wide_weights()))
    for step in range(4):
        with precision.forward():
            loss = F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
        precision.step(loss)
        average.update(averaged_values(model, precision.wide_weights()), step + 1)
    half = MODES[mode].update is not None
    for name, weight in precision.wide_weights().items():
        if weight.dim() != 4:
            continue
        narrow = model.get_parameter(name)
        stored = FP16 if half else FP32
        moved = FP32 if MODES[mode].update in (None, "master") else FP16
        for value, fmt in ((weight, moved), (narrow, stored), (average.average[name], moved)):
            rows = value.detach().double().flatten(1)
            # Each of n roundings is off by u |w| at most; stochastic ones by 2 u |w|. Sums in float32 add as much.
            bound = 3 * fmt.unit_roundoff * rows.abs().mean(1)
            assert (rows.mean(1).abs() <= bound).all(), (mode, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # centred already
    foreign = {key: value + 0.25 if value.dim() == 4 else value for key, value in state.items()}
    model.load_state_dict(foreign)
    assert max(rows_of(model).values()) <= (FP16 if half else FP32).eps


def test_a_centred_convolution_does_not_see_a_constant_but_at_the_zeros_around_an_image():
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    centre_([conv.weight])
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    moved = (conv(x + 5) - conv(x)).detach().abs()
    atol = reference.rounding_bound(FP64, 36) * float((conv.weight.abs().sum((1, 2, 3)).max() * 10).detach())
    assert moved[:, :, 1:-1, 1:-1].max() <= atol
    assert moved.max() > 0.1


def test_a_batch_of_one_is_refused_with_what_takes_it():
    for method in ("mimic_norm", "one_batch_norm"):
        model, _ = convert(small_resnet(width=4), method)
        with pytest.raises(DataError, match=r"over the batch, so it trains on two samples or more, not on 1; bnp"):
            model(torch.randn(1, 1, 8, 8))
        assert model.eval()(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    for method in ("bnp", "kalman"):
        model, _ = convert(small_resnet(width=4), method)
        model(torch.randn(1, 1, 8, 8)).sum().backward()


def test_a_temperature_is_added_where_the_floor_of_the_loss_would_be_felt():
    for classes, learned in ((10, True), (20, True), (21, False), (1000, False)):
        model, report = convert(small_resnet(width=4, classes=classes), "mimic_norm")
        assert (model.classifier.logit_scale is not None) == learned
        assert isinstance(model.classifier, NormalizedLinear)
        assert type(model.classifier.norm) is nn.BatchNorm1d
        assert not model.classifier.norm.affine
        if learned:
            reason = next(row.reason for row in report.changed if row.name == "classifier" and "logits" in row.reason)
            assert f"lifts the loss floor of {loss_floor(classes):.3g}" in reason


def test_a_deep_stack_keeps_its_signal_at_the_papers_initialisation():
    """Twenty centred layers of width 1152 at variance 2.934 / n: no layer changes E y^2 by 5 %."""
    layers = [nn.Conv1d(1152, 1152, 1) for _ in range(20)]
    body = [part for layer in layers for part in (layer, nn.BatchNorm1d(1152), nn.ReLU())]
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(1152 * 8, 4))
    model, _ = convert(network, "mimic_norm", recipe="paper")
    x = torch.randn(16, 1152, 8) * math.sqrt(2)  # E relu^2 of it is 1
    y = F.relu(x)
    squares = []
    with torch.no_grad():
        for index in range(20):
            z = model[3 * index](y)
            squares.append(float(z.square().mean()))
            y = F.relu(z)
    np.testing.assert_allclose(np.array(squares) / squares[0], 1, atol=0.05)
    steps = np.array(squares[1:]) / np.array(squares[:-1])
    np.testing.assert_allclose(steps, 1, atol=0.05)


def test_one_batch_norm_takes_its_scales_from_the_variances_that_blocks_add():
    model, report = convert(NETWORKS["pre-activation resnet"](), "one_batch_norm")
    scales = [module.scale for module in model.modules() if isinstance(module, FixedScale)]
    # Two blocks: the first reads the stem (1), inside it is 1 again; then 2, 1, and 3 at the end.
    close = reference.rounding_bound(FP64)
    np.testing.assert_allclose(scales, [1, 1, 1 / math.sqrt(2), 1, 1 / math.sqrt(3)], rtol=close)
    assert sum("became a scale" in row.reason for row in report.changed) == 5
    x = torch.randn(64, 1, 8, 8)
    trunk = model[:-1](x * 1)
    assert isinstance(model[-1], TwoHeads)
    assert torch.equal(model.eval()(x), F.linear(trunk, model[-1].weight, model[-1].bias))


def test_the_drawn_loss_is_on_average_the_weighted_sum_of_both_heads():
    layer = TwoHeads(nn.Linear(6, 4), 0.2, "both")
    with torch.no_grad():
        layer.normalised.weight.mul_(3)
    x, y = torch.randn(20000, 6), torch.arange(20000) % 4
    normalised, plain = layer(x)
    wanted = 0.8 * F.cross_entropy(normalised, y) + 0.2 * F.cross_entropy(plain, y)
    layer.heads = "drawn"
    logits = layer(x)
    chosen = (logits == plain).all(1).double().mean()
    # 5 standard errors of a share of 0.2, and of a mean loss whose single losses are below 8.
    assert abs(chosen - 0.2) <= 5 * math.sqrt(0.16 / 20000)
    assert abs(F.cross_entropy(logits, y) - wanted) <= 5 * 8 / math.sqrt(20000)
    assert (logits == normalised).all(1).sum() + (logits == plain).all(1).sum() == 20000


def test_one_batch_norm_says_in_one_line_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"bypass=1, heads='drawn'; bypass is between 0 and 1"):
        convert(small_resnet(), "one_batch_norm", bypass=1)
    with pytest.raises(UnsupportedError, match="needs the logits of a final Linear, but the network ends in '1'"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "one_batch_norm")
    with pytest.raises(UnsupportedError, match="'one_batch_norm' found no batch norm in Sequential"):
        convert(nn.Sequential(nn.Linear(2, 2)), "one_batch_norm")
    fused, _ = convert(small_resnet(width=4), "l1")
    _, report = convert(fused, "one_batch_norm")
    assert any("with a ReLU inside; convert the network it came from" in row.reason for row in report.refused)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("method", ["mimic_norm", "one_batch_norm", "bnp", "scaled_ws", "ic", "bn_free_binary"])
def test_a_norm_that_computes_more_is_not_taken_out_with_what_it_computes(method):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), NormAct(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), *head(4)
    )
    with pytest.raises(UnsupportedError, match=r"NormAct is a batch norm with a forward of its own.*would be lost"):
        convert(model, method)
