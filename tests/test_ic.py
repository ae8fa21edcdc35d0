"""The method `ic`: where its layers go, what they compute in both modes, and what the fold makes of them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec import Trainer
from lowprec.calibration import recompute_batch_stats
from lowprec.errors import ConfigError, DataError, UnsupportedError
from lowprec.export import fold
from lowprec.formats import FP32
from lowprec.methods import convert
from lowprec.methods.ic import ICConv2d, ICLayer, ICLinear
from lowprec.models import mlp, small_resnet
from lowprec.norm import NORMS
from lowprec.norm.sync import SyncBatchNorm, SyncL1BatchNorm
from lowprec.precision import MODES, Precision
from lowprec.train import parse_config
from lowprec.train.network import build_network

TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def conv_net(*middle: nn.Module, **geometry) -> nn.Sequential:
    """conv, norm, whatever comes between, and the convolution that gets the IC layer."""
    first = nn.Conv2d(3, 4, 1)
    return nn.Sequential(first, nn.BatchNorm2d(4), *middle, nn.Conv2d(4, 6, 3, **geometry)).double()


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms of any affine and running statistics, both signs of gamma."""
    for norm in model.modules():
        if isinstance(norm, tuple(TORCHS.values())):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def names(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, ICLayer)}


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.fc(F.relu(self.norm3(x)).mean((2, 3)))


def test_every_layer_but_the_first_gets_one_and_a_report_says_so():
    model = small_resnet(width=4)
    converted, report = convert(model, "ic")
    layers = {path for path, m in converted.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert "blocks.1.shortcut.0" in layers  # a 1x1 convolution on a shortcut is a weight layer like any other
    assert names(converted) == layers - {"stem"}
    assert [row.name for row in report.refused] == ["stem"]
    assert "got a bias of zeros: it reads the network's input" in report.refused[0].reason
    reasons = {row.name: row.reason for row in report.changed}
    assert reasons["norm"] == "BatchNorm2d became Identity; its parameters are dropped"
    assert reasons["classifier"] == "reads its input through a norm (bn) and dropout of 0.05"
    assert reasons["blocks.0.conv1"].endswith("and got a bias of zeros")
    assert all(layer.bias is not None for layer in converted.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    assert torch.equal(converted.blocks[0].conv1.weight, model.blocks[0].conv1.weight)
    # Every norm is one of an IC layer, and so it is where the method is applied to a network that `l1` changed.
    for network in (converted, convert(convert(model, "l1")[0], "ic")[0]):
        norms = [path for path, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert set(norms) == {f"{path}.norm" for path in layers - {"stem", "classifier"}}


def test_a_pre_activation_block_becomes_the_published_one():
    model, _ = convert(PreActivation().double(), "ic", p=0)
    x = torch.randn(8, 1, 6, 6, dtype=torch.float64)

    def ic(layer: nn.Module, y: Tensor) -> np.ndarray:
        y = y.detach().numpy()
        ones, zeros = np.ones(y.shape[1]), np.zeros(y.shape[1])
        return torch.from_numpy(reference.normalised(y, *reference.l2_statistics(y, layer.norm.eps), ones, zeros))

    with torch.no_grad():
        y = F.conv2d(x, model.stem.weight, model.stem.bias, padding=1)
        z = F.conv2d(ic(model.conv1, y.relu()), model.conv1.weight, model.conv1.bias, padding=1)
        y = y + F.conv2d(ic(model.conv2, z.relu()), model.conv2.weight, model.conv2.bias, padding=1)
        want = F.linear(ic(model.fc, y.relu().mean((2, 3))), model.fc.weight, model.fc.bias)
        # Sums of 288 per channel, twice normalised: each divides rounding by a standard deviation of 0.1 or more.
        reference.close(model(x), want, terms=2**14)


@pytest.mark.parametrize("dimension", CONVS)
@pytest.mark.parametrize("transposed", [False, True])
def test_without_dropout_it_is_a_batch_norm_before_the_layer(dimension, transposed):
    kind = getattr(nn, f"ConvTranspose{dimension}d") if transposed else CONVS[dimension]
    norm = TORCHS[dimension](4)
    model = nn.Sequential(CONVS[dimension](2, 4, 1), norm, nn.ReLU(), kind(4, 6, 3, stride=2, padding=1, groups=2))
    converted, _ = convert(model, "ic", p=0)
    x = torch.randn(3, 2, *[5] * dimension)
    plain = nn.Sequential(model[0], nn.ReLU(), copy.deepcopy(norm), model[3])
    for _ in range(2):
        assert torch.equal(converted(x), plain(x))
    assert torch.equal(converted.eval()(x), plain.eval()(x))
    assert torch.equal(converted[3].norm.running_var, plain[2].running_var)
    if transposed:
        size = [10] * dimension
        assert list(converted[3](x.repeat_interleave(2, 1), output_size=size).shape[2:]) == size


def test_axes_of_a_linear_layer_before_the_last_all_count_as_samples():
    model = nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    converted, _ = convert(model.double(), "ic", p=0)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    layer = converted[2]
    assert isinstance(layer, ICLinear)
    y = x.reshape(18, 4).numpy()
    z = reference.normalised(y, *reference.l2_statistics(y, 1e-5), np.ones(4), np.zeros(4))
    want = F.linear(torch.from_numpy(z), layer.weight, layer.bias).reshape(6, 3, 4)
    reference.close(layer(x), want)
    _, report = fold(converted.eval(), (torch.randn(2, 3, 5),))
    assert report.facts["norms_left"] == 0


def see_through(model: nn.Module) -> ICLayer:
    """The IC layer before a 1x1 convolution that passes on what it reads."""
    layer = model[2]
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4)[:, :, None, None])
    return layer


def one_by_one() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_elementwise_and_raises_the_second_moment_by_one_over_what_it_keeps(p):
    """The variance shift: E z^2 = E x^2 (1 - p) / (1 - p)^2 in training, E x^2 in evaluation."""
    layer = see_through(convert(one_by_one().double(), "ic", p=p)[0])
    x = torch.randn(64, 4, 32, 32, dtype=torch.float64)
    z = layer(x).detach()
    zeros, count, kept = z == 0, x.numel(), 1 - p
    # 5 standard errors of a share of p.
    assert abs(zeros.double().mean() - p) <= 5 * math.sqrt(p * kept / count)
    assert zeros.flatten(2).any(2).all()  # no channel as a whole
    assert not zeros.flatten(2).all(2).any()
    reference.close(z, torch.where(zeros, 0, layer.norm(x) / kept))
    # The norm makes E x^2 = 1 / (1 + eps), so with E x^4 = 3 the variance of z^2 is below 3 / kept^3.
    sigma = math.sqrt(3 / kept**3 / count)
    assert abs(z.square().mean() - 1 / kept) <= 5 * sigma + 2 * layer.norm.eps
    layer.eval()
    layer.norm.train()
    assert abs(layer(x).square().mean() - 1) <= 2 * layer.norm.eps


def test_the_mean_over_masks_is_the_output_of_evaluation():
    model, _ = convert(conv_net(padding=1), "ic", p=0.2)
    layer = with_statistics(model).eval()[2]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    want = layer(x).detach()
    layer.drop.train()
    masks = 4000
    many = torch.cat([layer(x.repeat(100, 1, 1, 1)).detach() for _ in range(masks // 100)]).reshape(masks, *want.shape)
    # 5 standard errors of each of 300 means, from their own spread.
    assert ((many.mean(0) - want).abs() <= 5 * many.std(0) / math.sqrt(masks)).all()
    assert many.std(0).min() > 0


GEOMETRIES = [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"bias": False}]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_the_folded_layer_is_the_layer_borders_included(relu, geometry, mode):
    """Written out as the definition: pad the normalised image, then convolve without padding."""
    middle = [nn.ReLU()] if relu else []
    geometry = {"padding": 1} | geometry
    model = with_statistics(convert(conv_net(*middle, padding_mode=mode, **geometry), "ic")[0]).eval()
    folded, report = fold(model, (torch.randn(2, 3, 7, 9, dtype=torch.float64),))
    assert report.facts["norms_found"] == 1
    # A shift passes the zeros around an image only towards a convolution that can take it; a ReLU is in the way.
    assert report.facts["norms_left"] == (relu and mode == "zeros")
    x = torch.randn(3, 3, 7, 9, dtype=torch.float64)
    layer, norm = model[-1], model[-1].norm
    with torch.no_grad():
        y = F.conv2d(x, model[0].weight, model[0].bias)
        y = y.relu() if relu else y
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        y = (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        y = F.pad(y, [geometry["padding"]] * 4, "constant" if mode == "zeros" else mode)
        options = {name: geometry[name] for name in ("stride", "dilation", "groups") if name in geometry}
        want = F.conv2d(y, layer.weight, layer.bias, **options)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    reference.close(model(x), want)
    reference.close(folded(x), want)


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_wide_and_move_when_a_step_lands_and_only_then_in_every_mode(mode):
    model, _ = convert(small_resnet(width=4), "ic", p=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    norm = model.blocks[0].conv2.norm
    assert {value.dtype for value in [*norm.parameters(), norm.running_mean, norm.running_var]} == {torch.float32}
    dtypes = set()
    norm.register_forward_hook(lambda m, args, y: dtypes.update({args[0].dtype, y.dtype}))
    x, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10

    def step(factor: float) -> bool:
        with precision.forward():
            loss = F.cross_entropy(model(x), labels) * factor
        return bool(precision.step(loss))

    assert step(1.0)
    assert dtypes == {model.blocks[0].conv2.weight.dtype} or mode in ("bf16", "fp16-autocast")
    before = {key: value.clone() for key, value in model.state_dict().items() if ".norm." in key}
    assert int(norm.num_batches_tracked) == 1
    assert not torch.equal(norm.running_mean, torch.zeros(4))
    if MODES[mode].scaled:
        assert not step(math.inf)
        after = model.state_dict()
        assert before
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_dropout_does_not_move_the_mean_of_half_activations():
    """In half the factor 1 / 0.95 is 1.0527; every activation would be 1e-4 too large."""
    layer = see_through(convert(one_by_one().half(), "ic")[0])
    assert layer.norm.weight.dtype == layer.norm.running_var.dtype == torch.float32
    x = torch.randn(16, 4, 8, 8).half()
    y = layer(x).detach()
    normalised = layer.norm(x).detach()
    kept = y != 0
    assert torch.equal(y[kept], (normalised.float() / 0.95).half()[kept])
    assert not torch.equal(y[kept], (normalised * torch.tensor(1 / 0.95).half())[kept])


@pytest.mark.parametrize("norm", ["bn", *NORMS])
def test_the_norm_may_be_of_any_family_and_folds(norm):
    model, _ = convert(mlp(hidden=[16, 16], inputs=6, classes=3), "ic", norm=norm)
    expected = nn.BatchNorm1d if norm == "bn" else NORMS[norm].classes[1]
    assert {type(m.norm) for m in model.modules() if isinstance(m, ICLayer)} == {expected}
    model(torch.randn(8, 6))
    _, report = fold(model.eval(), (torch.randn(2, 6),))
    assert (report.facts["norms_found"], report.facts["norms_left"]) == (2, 0)


def test_synchronised_norms_in_synchronised_norms_out():
    for options, kind in (
        (["method.name=ic"], SyncBatchNorm),
        (["method.name=ic", "method.args.norm=l1"], SyncL1BatchNorm),
    ):
        model = build_network(parse_config("", options), synchronised=True)
        norms = [m.norm for m in model.modules() if isinstance(m, ICLayer)]
        assert norms
        assert all(isinstance(norm, kind) for norm in norms)


def test_statistics_measured_without_dropout_undo_the_variance_shift():
    """What the second norm reads is linear in what dropout thinned: p / (1 - p) sum w^2 adds to its variance."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    converted, _ = convert(model, "ic", p=0.5)
    x = torch.randn(20000, 6, dtype=torch.float64)
    for layer in converted:
        if isinstance(layer, ICLayer):
            layer.norm.momentum = 1.0
    converted(x)
    trained = converted[3].norm.running_var
    measured, _ = recompute_batch_stats(converted, [x])
    ratio = (trained / measured[3].norm.running_var).detach()
    # The drawn masks add p / (1 - p) = 1 times sum w^2, over the w C w that is there without them.
    z = measured.eval()[2].norm.train()(measured[0](x)).detach()
    w = converted[2].weight.detach()
    share = w.square().sum(1) / torch.einsum("oi,ij,oj->o", w, z.T.cov(), w)
    # 5 standard errors of the ratio of two variances over 20000 samples: of normal inputs, and thinned of kurtosis
    # 3 / (1 - p) = 6 at most, so relative variances of 2 / n and 5 / n.
    torch.testing.assert_close(ratio, 1 + share, rtol=5 * math.sqrt(7 / 20000), atol=0)


class Recurrent(nn.Module):
    """One layer called three times, another at the input and further on, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.own = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.twin = self.inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.outer(x))
        for layer in (self.inner, self.twin, self.inner, self.outer):
            x = F.relu(layer(x))
        return self.own(x)


def test_a_layer_that_is_called_several_times_has_one_norm_for_all_calls():
    model, report = convert(Recurrent(), "ic")
    assert names(model) == {"inner", "own"}
    assert model.twin is model.inner
    assert {row.name: row.reason.split(": ")[1] for row in report.refused} == {
        "outer": "it reads the network's input",
        "idle": "the network does not call it as a layer of its own",
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision("fp32")
    precision.prepare(model, optimizer)
    inputs: list[Tensor] = []
    model.inner.norm.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    with precision.forward():
        loss = model(torch.randn(8, 4)).square().mean()
    precision.step(loss)
    pooled = torch.cat(inputs).double()
    assert len(pooled) == 24
    # A momentum of 0.1 from 0 and from 1, towards mean and unbiased variance of all three calls together.
    atol = reference.rounding_bound(FP32, 24) * max(pooled.square().max().item(), 1)
    np.testing.assert_allclose(model.inner.norm.running_mean, 0.1 * pooled.mean(0), rtol=0, atol=atol)
    np.testing.assert_allclose(model.inner.norm.running_var, 0.9 + 0.1 * pooled.var(0), rtol=0, atol=atol)


class Ends(nn.Module):
    """A norm of the input and one of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = (nn.BatchNorm1d(4) for _ in range(3))
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.b(self.between(self.a(self.before(x))).relu()))


def test_norms_of_the_input_and_of_the_output_stay():
    model, report = convert(Ends().eval(), "ic")
    assert not any(module.training for module in model.modules())
    assert isinstance(model.before, nn.BatchNorm1d)
    assert isinstance(model.after, nn.BatchNorm1d)
    assert isinstance(model.between, nn.Identity)
    assert names(model) == {"b"}
    reasons = {row.name: row.reason for row in report.refused}
    assert reasons["before"] == "is a norm of the network's input, not between layers; it stays"
    assert reasons["after"] == "is a norm of its output, not between layers; it stays"


class Odd(nn.Conv2d):
    pass


def test_what_it_cannot_do_is_said_in_one_line():
    for options, message in (
        ({"p": 1}, r"ic: p is 1; give the share of elements to drop, from 0 to below 1"),
        ({"p": -0.1}, r"ic: p is -0.1"),
        ({"norm": "l_inf"}, r"ic: norm is 'l_inf'; choose one of bn, l1, .*did you mean 'linf'"),
        ({"skip": ["clasifier"]}, r"skip names 'clasifier'.*did you mean 'classifier'"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            convert(small_resnet(width=4), "ic", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="found no batch norm between the layers of Sequential"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "ic")
    with pytest.raises(UnsupportedError, match="applied to this network already; convert the one it came from"):
        convert(convert(small_resnet(width=4), "ic")[0], "ic")
    bounded, _ = convert(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), Odd(2, 2, 1)), "l1")
    _, report = convert(convert(bounded, "bounded_weight_norm", skip=["0", "3"])[0], "ic")
    reasons = [row.reason for row in report.refused]
    assert any("its weight is parametrised; convert with ic first" in reason for reason in reasons)
    assert any("it is a Odd that may compute something else" in reason for reason in reasons)
    skipped, report = convert(small_resnet(width=4), "ic", skip=["classifier"])
    assert "classifier" not in names(skipped)
    assert any("left out by skip" in row.reason for row in report.refused)


def test_one_sample_is_refused_where_there_is_one_value_per_channel():
    model, _ = convert(small_resnet(width=4), "ic")
    with pytest.raises(DataError, match=r"ic normalises what each layer reads over the batch, .* not on 1; bnp"):
        model(torch.randn(1, 1, 8, 8))
    assert model.eval()(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    conv, _ = convert(conv_net(padding=1), "ic")
    conv(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(DataError, match="not on 1"):
        conv(torch.randn(1, 3, 1, 1, dtype=torch.float64))


def test_other_methods_follow_it():
    model, _ = convert(small_resnet(width=4), "ic")
    bounded, _ = convert(model, "bounded_weight_norm")
    assert isinstance(bounded.blocks[0].conv1, ICConv2d)
    bounded(torch.randn(4, 1, 8, 8))
    l1, _ = convert(model, "l1")
    assert type(l1.blocks[0].conv1.norm) is NORMS["l1"].classes[2]


def test_a_resumed_run_draws_the_same_masks(tmp_path):
    overrides = ["method.name=ic", "method.args.p=0.2", "run.epochs=1", "data.batch_size=256", "model.args.width=4"]
    config = parse_config("", ["run.device=cpu", "model.args.blocks=1", *overrides])
    Trainer(config).fit(tmp_path / "whole")
    Trainer(config).fit(tmp_path / "parts", stop_after_steps=3)
    torch.manual_seed(99)
    Trainer(config).fit(tmp_path / "parts", resume=True)
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
