"""Binary networks without batch norms: layers and gradients against their formulas, and the way to a bundle."""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import pytest
import reference_norm as reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.data import load_data
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.export import export, fold
from lowprec.formats import FP32
from lowprec.methods import attach, convert
from lowprec.methods.binary import BinaryConv2d, BinaryStandardisation, RPReLU, binary_conv, binary_weight, sign
from lowprec.methods.structure import residual_branches
from lowprec.models import mlp, small_resnet
from lowprec.precision import MODES, Precision


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def binary_by_definition(weight: np.ndarray, gain: np.ndarray, constant: float) -> np.ndarray:
    made = np.empty_like(weight)
    for index, row in enumerate(weight):
        centred = row - math.fsum(np.ravel(row)) / row.size
        unit = centred / math.sqrt(math.fsum(np.ravel(centred) ** 2))
        size = math.fsum(np.abs(np.ravel(unit))) / row.size
        made[index] = constant * gain[index] * size * np.where(unit >= 0, 1, -1)
    return made


def test_signs_and_their_gradients():
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)
    inside = [(-0.5, 1.0, 1.0), (-0.0, 2.0, 1.0), (0.0, 2.0, 1.0), (0.25, 1.5, 1.0)]
    for position, estimator in ((1, "quadratic"), (2, "clipped")):
        leaf = x.clone().requires_grad_(True)
        y = sign(leaf, estimator)
        assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
        y.backward(torch.full_like(x, 3))
        slopes = {row[0]: row[position] for row in inside}
        border = 0.0 if estimator == "quadratic" else 1.0
        want = [0, border, slopes[-0.5], slopes[-0.0], slopes[0.0], slopes[0.25], border, 0]
        assert leaf.grad.tolist() == [3 * value for value in want]
        lost = torch.tensor([math.nan], requires_grad=True)
        sign(lost, estimator).backward()
        assert lost.grad.isnan()  # or the loss scale would never know


def test_a_binary_weight_is_that_of_the_definition_with_the_gradient_of_the_standardised_one():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64) + 2
    gain = torch.rand(5, dtype=torch.float64) - 0.5  # negative ones too
    leaf, gain_leaf = weight.clone().requires_grad_(True), gain.clone().requires_grad_(True)
    made = binary_weight(leaf, gain_leaf, 0.3)
    reference.close(made, binary_by_definition(weight.numpy(), gain.numpy(), 0.3))
    assert all(len(row.detach().abs().unique()) == 1 for row in made)  # exactly two values per channel
    upstream = torch.randn_like(weight)
    made.backward(upstream)
    # u = c / |c| of the centred row: the identity passes G to u, so c gets (G - u (u . G)) / |c|, less its mean.
    for index in range(5):
        centred = (weight[index] - weight[index].mean()).numpy()
        norm = np.sqrt((centred**2).sum())
        u, g = centred / norm, 0.3 * gain[index].item() * upstream[index].numpy()
        along = (g - u * (u * g).sum()) / norm
        reference.close(leaf.grad[index], along - along.mean())
        want = 0.3 * np.abs(u).mean() * (np.where(u >= 0, 1, -1) * upstream[index].numpy()).sum()
        reference.close(gain_leaf.grad[index], want)


def test_a_binary_convolution_is_a_convolution_of_signs():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    layer = binary_conv(conv, scale=0.5, shift=-0.25)
    assert layer.weight is conv.weight
    with torch.no_grad():
        layer.shift.copy_(torch.randn(4))
        layer.shift[0] = -1.0
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    x[:, 0] = 2.0  # 0.5 * 2 - 1 = 0, whose sign is +1
    want = np.where(0.5 * x.numpy() + layer.shift.detach().numpy()[None, :, None, None] >= 0, 1.0, -1.0)
    reference.close(layer.signs(x), want)
    assert (layer.signs(x)[:, 0] == 1).all()
    reference.close(layer(x), F.conv2d(torch.tensor(want), conv.weight, conv.bias, 2, 1, 1, 2))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # one sample without a batch axis
    leaf = x.clone().requires_grad_(True)
    layer.signs(leaf).sum().backward()
    moved = 0.5 * x + layer.shift.detach().reshape(1, -1, 1, 1)
    reference.close(leaf.grad, 0.5 * (2 - 2 * moved.abs()).clamp(min=0))
    reference.close(layer.shift.grad, (2 - 2 * moved.abs()).clamp(min=0).sum((0, 2, 3)))


def test_rprelu_shifts_bends_and_shifts():
    layer = RPReLU(3, torch.empty(0, dtype=torch.float64))
    assert layer.weight.tolist() == [0.25] * 3
    with torch.no_grad():
        for value in (layer.weight, layer.before, layer.after):
            value.copy_(torch.randn(3))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    slope, before, after = (
        value.detach().numpy()[None, :, None] for value in (layer.weight, layer.before, layer.after)
    )
    moved = x.numpy() + before
    reference.close(layer(x), np.where(moved >= 0, moved, slope * moved) + after)
    half, narrow = RPReLU(3, torch.empty(0, dtype=torch.float16)), torch.randn(2, 3).half()
    assert half.before.dtype == torch.float32
    assert half(narrow).dtype == torch.float16


class Functional(nn.Module):
    """Bottleneck with a shortcut convolution, a functional ReLU, a ReLU of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.shortcut, self.relu, self.act = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.ReLU()
        self.hidden, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.relu(self.b(self.relu(self.a(x))) + self.shortcut(x))
        return self.fc(F.relu(self.hidden(self.act(x).mean((2, 3)))))


def test_which_layers_become_binary_and_what_they_start_from():
    (branch,) = residual_branches(Functional())
    assert (branch.last_conv, branch.shortcut) == ("b", ("shortcut",))
    model, report = convert(Functional(), "bn_free_binary", alpha=0.3)
    kinds = {row.name: row.reason for row in report.changed if "drawn" not in row.reason}
    assert kinds["stem"] == kinds["hidden"] == "weight standardised; it stays real"
    assert kinds["shortcut"] == "binary weight; a shortcut's input stays real"
    assert {name for name, reason in kinds.items() if "signs" in reason} == {"a", "b"}
    refused = {row.name: row.reason for row in report.refused}
    assert refused["fc"] == "is not binary: it makes the logits"
    assert refused["relu"] == "stays a ReLU: it does not read convolutions with one number of channels"
    assert type(model.act) is RPReLU
    assert type(model.shortcut.parametrizations.weight[0]) is BinaryStandardisation
    assert not isinstance(model.shortcut, BinaryConv2d)
    # Behind relu(z): mean 1 / sqrt(2 pi); DeepMind's gain for it is 1.71396. From 2^16 equally likely values.
    np.testing.assert_allclose(model.a.scale.item(), 1.7139588594436646, rtol=FP32.eps)
    np.testing.assert_allclose(model.a.shift.detach(), -1.7139588594436646 / math.sqrt(2 * math.pi), rtol=1e-4)
    assert abs(model.b.parametrizations.weight[0].constant.item() - 0.3) < 1e-7
    shares = model.a.signs(F.relu(model.stem(torch.randn(64, 1, 8, 8)))).double().mean()
    assert abs(shares) < 0.4  # without the shift every sign behind a ReLU would be +1


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_wide_in_every_mode(mode):
    model, _ = convert(small_resnet(width=4, blocks=1), "bn_free_binary")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    x = torch.randn(16, 1, 8, 8)
    for _ in range(2):
        with precision.forward():
            loss = F.cross_entropy(model(x), torch.arange(16) % 10)
        assert precision.step(loss)
    conv, act = model.blocks[0].conv1, model.blocks[0].act
    made = conv.parametrizations.weight[0]
    wide = (conv.shift, conv.scale, made.gain, made.constant, act.weight, act.before, act.after)
    assert {value.dtype for value in wide} == {torch.float32}
    assert all(len(row.abs().unique()) == 1 for row in conv.weight.detach())
    signs = conv.signs(torch.randn(2, 4, 8, 8, dtype=conv.weight.dtype))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.dtype == conv.weight.dtype
    twin = copy.deepcopy(model).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), model.eval()(x))


def test_gradients_are_clipped_in_proportion_to_the_weights():
    model, _ = convert(small_resnet(width=4), "bn_free_binary", clip=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    latent = model.blocks[0].conv1.parametrizations.weight.original
    before, head = latent.detach().clone(), model.classifier.weight.detach().clone()
    handle = attach(model, optimizer)
    (1e6 * F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8))).backward()
    optimizer.step()
    steps, norms = (value.flatten(1).double().norm(dim=1) for value in (latent.detach() - before, before))
    # float32 norms of 36 values, and the rounding of the step where it is added to the weight.
    np.testing.assert_allclose(steps, 0.5 * norms, rtol=reference.rounding_bound(FP32, 36))
    assert (model.classifier.weight - head).norm() > 1e3  # the classifier is left out
    handle.remove()


def test_it_trains_in_half_folds_and_ships(tmp_path):
    samples = load_data("digits")
    (x,), y = samples.inputs.values(), samples.labels
    x, y = torch.tensor(x[y < 3]).float(), torch.tensor(y[y < 3])
    model, _ = convert(small_resnet(width=8, blocks=2, classes=3), "bn_free_binary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    precision = Precision("fp16-master", init_scale=2.0**10)
    precision.prepare(model, optimizer)
    for epoch in range(2):
        for index in torch.randperm(400, generator=torch.Generator().manual_seed(epoch)).split(8):
            with precision.forward():
                loss = F.cross_entropy(model(x[index]), y[index])
            precision.step(loss)
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x[400:]).argmax(1) == y[400:]).float().mean())
    # Chance is 1/3; of 137 images 4 standard deviations above it are 0.49.
    assert accuracy > 1 / 3 + 4 * math.sqrt(2 / 9 / len(y[400:])), accuracy
    shipped = copy.deepcopy(model).float()
    folded, report = fold(shipped, (x[:2],))
    assert report.facts["norms_left"] == 0
    with torch.no_grad():
        assert torch.equal(folded(x[400:]).argmax(1), shipped(x[400:]).argmax(1))
    bundle = export(shipped, (x[400:416],), tmp_path / "bundle", precision="fp16")
    # A sign that rounding turns moves the logits by more than rounding; the measured floor turns the same signs.
    assert bundle.parity.passed, bundle.parity
    for name in ("model.onnx", "model.fp16.onnx"):
        graph = onnx.load(tmp_path / "bundle" / name).graph
        assert not [node for node in graph.node if node.op_type == "Sign"]
        stored = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
        weights = [stored[node.input[1]] for node in graph.node if node.op_type == "Conv"]
        weights = [weight for weight in weights if weight[0].size > 1]  # others are shifts per channel
        binary = [w for w in weights if all(len(np.unique(np.abs(row))) == 1 for row in w)]
        assert len(binary) == 5  # two per block and one shortcut
        assert len(weights) == 6


def test_what_cannot_be_done_is_said_in_one_line():
    with pytest.raises(ConfigError, match=r"estimator='tanh'; alpha and eps are numbers above 0, estimator quadratic"):
        convert(small_resnet(), "bn_free_binary", estimator="tanh")
    with pytest.raises(UnsupportedError, match="'bn_free_binary' found no convolution to make binary in Sequential"):
        convert(mlp(), "bn_free_binary")
