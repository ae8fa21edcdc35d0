"""Weight norms on layers and networks: registration, training in two precisions, growth of v, baking."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import reference_norm
import reference_weights as reference
import torch
from reference_norm import rounding_bound
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.export.folding import fold
from lowprec.formats import FP16, FP32, FP64
from lowprec.methods.bounded import attach_bounded_weight_norm, convert_bounded_weight_norm
from lowprec.methods.weight_norm_lp import attach_weight_norm_lp, convert_weight_norm_lp, norm_named
from lowprec.parametrize import (
    GainedWeightNorm,
    WeightNorm,
    register_bounded_weight_norm,
    weight_layout,
    weight_names,
    zero_rows,
)
from lowprec.precision import Precision
from lowprec.precision.masters import master_of
from lowprec.report import ChangeReport

WORDS = torch.arange(10).reshape(2, 5) % 7


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class First(nn.Module):
    """A layer whose result is a tuple, as a network of one tensor; attention attends to its own input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            other = x if self.layer.kdim == x.shape[-1] else x[..., : self.layer.kdim]
            return self.layer(x, other, other)[0]
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


# Every kind of layer that can be normalised, an input, and the names of its weights.
LAYERS = {
    "linear": (lambda: nn.Linear(7, 4), noise(3, 7), ["weight"]),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), WORDS, ["weight"]),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), noise(2, 4, 5), ["weight"]),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), noise(2, 4, 5, 5), ["weight"]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), noise(2, 2, 3, 3, 3), ["weight"]),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), noise(2, 4, 5), ["weight"]),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), noise(2, 4, 5, 5), ["weight"]),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), noise(2, 2, 3, 3, 3), ["weight"]),
    "rnn": (lambda: nn.RNN(3, 4, batch_first=True), noise(2, 5, 3), ["weight_ih_l0", "weight_hh_l0"]),
    "gru": (lambda: nn.GRU(3, 4, batch_first=True), noise(2, 5, 3), ["weight_ih_l0", "weight_hh_l0"]),
    "lstm": (
        lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
        noise(2, 5, 3),
        [f"weight_{part}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for part in ("ih", "hh")],
    ),
    "gru cell": (lambda: nn.GRUCell(3, 4), noise(2, 3), ["weight_ih", "weight_hh"]),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), noise(2, 3), ["weight_ih", "weight_hh"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), noise(2, 5, 4), ["in_proj_weight"]),
    "attention to narrower keys": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
        noise(2, 5, 4),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
    ),
}
over_layers = pytest.mark.parametrize("kind", LAYERS)
FORMS = {
    "bounded": (convert_bounded_weight_norm, attach_bounded_weight_norm, {}),
    "learned": (convert_bounded_weight_norm, attach_bounded_weight_norm, {"learned": True}),
    "l1": (convert_weight_norm_lp, attach_weight_norm_lp, {"p": 1}),
    "l2": (convert_weight_norm_lp, attach_weight_norm_lp, {"p": 2}),
    "linf": (convert_weight_norm_lp, attach_weight_norm_lp, {"p": "inf"}),
    "top-4": (convert_weight_norm_lp, attach_weight_norm_lp, {"p": "topk", "k": 4}),
    "learned l1": (convert_weight_norm_lp, attach_weight_norm_lp, {"p": 1, "learned": True}),
}
over_forms = pytest.mark.parametrize("form", FORMS)


def made(kind, dtype=torch.float32):
    make, x, names = LAYERS[kind]
    torch.manual_seed(0)
    return First(make()).to(dtype), x.to(dtype) if x.is_floating_point() else x, names


def parametrised(model):
    """Every weight norm of a model with the row norms of its weight and of its v, as numpy computes them in float64."""
    found = []
    for module in model.modules():
        for name in weight_names(module) if parametrize.is_parametrized(module) else ():
            norm, v = module.parametrizations[name][0], module.parametrizations[name].original
            sizes = [
                np.array([reference.norm(row, norm.p, norm.k) for row in rows(tensor, module)])
                for tensor in (getattr(module, name), master_of(v))
            ]
            found.append((norm, *sizes))
    return found


def rows(tensor, module):
    return reference_norm.rows(tensor.detach().double().numpy(), *weight_layout(module))


@pytest.mark.parametrize("learned", [False, True])
@over_layers
def test_registration_keeps_the_size_of_the_layer_and_the_parameter(kind, learned):
    model, x, names = made(kind)
    layer = model.layer
    assert list(weight_names(layer)) == names
    for name in names:
        parameter = getattr(layer, name)
        before = parameter.detach().clone()
        norm = register_bounded_weight_norm(layer, name, learned=learned)
        assert layer.parametrizations[name].original is parameter
        assert torch.equal(parameter, before)
        bound = rounding_bound(FP32, parameter.numel())
        if learned:
            assert isinstance(norm, GainedWeightNorm)
            np.testing.assert_allclose(getattr(layer, name).detach(), before, rtol=bound)
            # A row of zeros has the mean gain of the others, to grow with.
            full = len(rows(before, layer))
            share = full / (full - zero_rows(layer, name))
            np.testing.assert_allclose(norm.bound, float(before.double().norm()) * math.sqrt(share), rtol=bound)
        else:
            sizes = np.array([np.linalg.norm(row) for row in rows(getattr(layer, name), layer)])
            want = float(before.double().norm()) / math.sqrt(len(sizes))
            np.testing.assert_allclose(sizes[sizes > 0], want, rtol=bound)
            assert norm.wide_parameters == ("rho",)
    model(x)


@over_layers
def test_a_normalised_layer_computes_with_its_weights_and_is_copied_stored_and_undone(kind):
    model, x, names = made(kind)
    plain = copy.deepcopy(model)
    convert_bounded_weight_norm(model, ChangeReport())
    model(x).sum().backward()  # whatever a layer keeps from one forward to the next is kept now
    assert all(param.grad is not None for param in model.parameters())
    with torch.no_grad():
        for param in model.parameters():
            param.add_(param.grad, alpha=0.01)  # and now it is out of date
        for name in names:
            getattr(plain.layer, name).copy_(getattr(model.layer, name))
        if isinstance(plain.layer, nn.MultiheadAttention):
            plain.layer.out_proj.weight.copy_(model.layer.out_proj.weight)
        others = dict(model.named_parameters())
        for name, param in plain.named_parameters():
            if name in others:
                param.copy_(others[name])
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    twin = copy.deepcopy(model)
    fresh = made(kind)[0]
    convert_bounded_weight_norm(fresh, ChangeReport())
    fresh.load_state_dict(model.state_dict())
    for other in (twin, fresh):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    for name in names:
        parametrize.remove_parametrizations(model.layer, name)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


# Every layer in the plain form, and every form on the layers whose weights have the most structure.
BAKED = [(kind, "bounded") for kind in LAYERS] + [
    (kind, form) for kind in ("transposed2d", "lstm", "attention") for form in FORMS if form != "bounded"
]


@pytest.mark.parametrize(("kind", "form"), BAKED)
def test_every_form_bakes_to_a_plain_weight_exactly(kind, form):
    convert, _, options = FORMS[form]
    model, x, _ = made(kind)
    model = convert(model, ChangeReport(), **options).eval()
    wide = copy.deepcopy(model).double()
    folded, _ = fold(model, (x,))
    constants = folded.state_dict()
    for module in wide.modules():
        for name in weight_names(module):
            want = getattr(module, name).detach().float()  # rounded once from float64
            assert any(torch.equal(value, want) for value in constants.values()), (name, list(constants))
    assert sum(value.numel() for value in constants.values()) == sum(
        weight.numel() for weight in LAYERS[kind][0]().state_dict().values()
    )  # the plain layer's tensors and nothing else


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 3)
    )


def train(model, optimizer, precision, steps, after_step=lambda: None):
    x, labels = noise(16, 1, 8, 8), torch.arange(16) % 3
    losses = []
    for _ in range(steps):
        with precision.forward():
            loss = nn.functional.cross_entropy(model(x), labels)
        assert precision.step(loss)
        losses.append(loss.item())
        after_step()
    return losses


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
@over_forms
def test_weights_keep_their_bound_over_a_hundred_steps(form, mode):
    convert, _, options = FORMS[form]
    model = convert(network(), ChangeReport(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    precision = Precision(mode, init_scale=2.0**8)
    model, optimizer = precision.prepare(model, optimizer)
    before = parametrised(model)
    losses = train(model, optimizer, precision, 100)
    assert losses[-1] < losses[0] / 2
    stored = FP32 if mode == "fp32" else FP16
    for (norm, sizes, v_sizes), (_, first, v_first) in zip(parametrised(model), before, strict=True):
        # A row norm over n computed in float32, and every element rounded to the stored type.
        rtol = rounding_bound(FP32, 196) + 2 * stored.unit_roundoff
        if isinstance(norm, GainedWeightNorm):
            np.testing.assert_allclose(np.linalg.norm(sizes), float(norm.bound), rtol=rtol)
            assert norm.gain.dtype == torch.float32
            assert not np.allclose(sizes, first, rtol=rtol)  # channels did trade
        else:
            np.testing.assert_allclose(sizes, float(norm.rho), rtol=rtol)
        assert np.abs(v_sizes / v_first - 1).max() > 10 * rtol  # the norms of v did not hold by themselves


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
@over_forms
def test_on_its_sphere_v_has_the_norm_of_w_after_every_step(form, mode, order):
    convert, attach, options = FORMS[form]
    model = convert(network(), ChangeReport(), **options, sphere=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    precision = Precision(mode, init_scale=2.0**8)
    if order == "attach first":
        handle = attach(model, optimizer, sphere=True)
    model, optimizer = precision.prepare(model, optimizer)
    if order == "prepare first":
        handle = attach(model, optimizer, sphere=True)

    def check():
        for norm, _, sizes in parametrised(model):
            np.testing.assert_allclose(sizes, float(norm.radius()), rtol=rounding_bound(FP32, 196))

    check()
    losses = train(model, optimizer, precision, 10, check)
    assert losses[-1] < losses[0]
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            assert torch.equal(module.original, master_of(module.original).to(module.original.dtype))
    handle.remove()
    train(model, optimizer, precision, 3)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@over_forms
def test_with_corrected_growth_a_longer_v_turns_exactly_as_a_shorter_one(form, momentum):
    convert, attach, options = FORMS[form]

    def directions(scale, corrected):
        model = convert(network().double(), ChangeReport(), **options, correct_growth=True)
        norms = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
        with torch.no_grad():
            for module in norms:
                module.original.mul_(scale)
        # The biases and gains are left out: they know nothing of the scale of v.
        optimizer = torch.optim.SGD([module.original for module in norms], lr=0.01, momentum=momentum)
        attach(model, optimizer, correct_growth=corrected)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(noise(16, 1, 8, 8).double()), torch.arange(16) % 3).backward()
            optimizer.step()
        return [module.original.detach() / scale for module in norms]

    short, long, plain = directions(1.0, True), directions(3.0, True), directions(3.0, False)
    for a, b, c in zip(short, long, plain, strict=True):
        # Ten steps, each with sums over at most 16 * 6 * 36 elements.
        atol = 10 * rounding_bound(FP64, 16 * 6 * 36) * float(a.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
        assert (a - c).abs().max() > atol


class Reader(nn.Module):
    """Embedding, recurrent layer, attention: what the network of convolutions has not."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(7, 8), nn.LSTM(8, 8, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        y = self.lstm(self.words(x))[0]
        return self.head(self.attention(y, y, y, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("sphere", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_embeddings_recurrent_and_attention_weights_keep_their_bound_too(mode, sphere):
    torch.manual_seed(0)
    model = convert_bounded_weight_norm(Reader(), ChangeReport(), skip=["head"], sphere=sphere)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    precision = Precision(mode, init_scale=2.0**8)
    model, optimizer = precision.prepare(model, optimizer)
    attach_bounded_weight_norm(model, optimizer, sphere=sphere)
    words = torch.arange(60).reshape(12, 5) * 11 % 7
    losses = []
    for _ in range(30):
        with precision.forward():
            loss = nn.functional.cross_entropy(model(words), torch.arange(12) % 3)
        assert precision.step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    found = parametrised(model)
    assert len(found) == 5  # words, two of the LSTM, two of the attention
    stored = FP32 if mode == "fp32" else FP16
    for norm, sizes, v_sizes in found:
        rtol = rounding_bound(FP32, 8)
        np.testing.assert_allclose(sizes, float(norm.rho), rtol=rtol + 2 * stored.unit_roundoff)
        assert np.allclose(v_sizes, float(norm.rho), rtol=rtol) == sphere


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.words(x))


def test_tied_weights_stay_tied_and_are_projected_once():
    model = convert_bounded_weight_norm(Tied(), ChangeReport(), sphere=True)
    assert torch.equal(model.words.weight, model.head.weight)
    assert len(list(model.parameters())) == 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_bounded_weight_norm(model, optimizer, sphere=True)
    nn.functional.cross_entropy(model(WORDS).flatten(0, 1), WORDS.flatten()).backward()
    optimizer.step()
    norm, _, sizes = parametrised(model)[0]
    np.testing.assert_allclose(sizes, float(norm.rho), rtol=rounding_bound(FP32, 4))
    assert torch.equal(model.words.weight, model.head.weight)


def test_hooks_act_on_the_weights_of_their_own_method():
    model = convert_bounded_weight_norm(network(), ChangeReport(), skip=["5"], sphere=True)
    model = convert_weight_norm_lp(model, ChangeReport(), p="inf")
    owners = [module.owner for module in model.modules() if isinstance(module, WeightNorm)]
    assert owners == ["bounded_weight_norm", "bounded_weight_norm", "weight_norm_lp"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_bounded_weight_norm(model, optimizer, sphere=True)
    attach_weight_norm_lp(model, optimizer).remove()  # inert
    before = model[5].parametrizations.weight.original.detach().clone()
    optimizer.step()
    assert torch.equal(before, model[5].parametrizations.weight.original)


def test_methods_refuse_in_one_line_what_they_cannot_do():
    for bad, match in (
        ({"sphere": True, "correct_growth": True}, "choose one"),
        ({"skip": ["nowhere"]}, "skip names 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=match):
            convert_bounded_weight_norm(network(), ChangeReport(), **bad)
    for p, k, match in ((3, None, "not a norm here"), (1, 4, "belongs to p = 'topk'"), ("topk", 0, "positive whole")):
        with pytest.raises(ConfigError, match=match):
            norm_named(p, k)
    model = convert_bounded_weight_norm(network(), ChangeReport(), sphere=True)
    stranger = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="holds none of the 3 weights"):
        attach_bounded_weight_norm(model, stranger, sphere=True)
    with pytest.raises(UnsupportedError, match="found no weight to normalise in Sequential"):
        convert_weight_norm_lp(nn.Sequential(nn.ReLU()), ChangeReport())


def test_skipping_a_module_skips_what_is_below_it():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2), nn.Bilinear(2, 2, 2))
    report = ChangeReport()
    convert_bounded_weight_norm(model, report, skip=["0.self_attn"])
    reasons = {row.name: row.reason for row in report.refused}
    assert reasons["0.self_attn"] == reasons["0.self_attn.out_proj"] == "left out by skip"
    assert "Bilinear is not a layer whose weight rows are known" in reasons["2"]
    assert [row.name for row in report.changed] == ["0.linear1", "0.linear2", "1"]


def test_layers_without_a_usable_weight_are_refused_with_the_reason():
    zeros, double, lazy = nn.Linear(2, 2), nn.Linear(2, 2), nn.LazyLinear(2)
    infinite, older = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.zeros_(zeros.weight)
    nn.init.constant_(infinite.weight, torch.inf)
    register_bounded_weight_norm(double)
    weight_norm(older)
    for layer, name, reason in (
        (zeros, "weight", "all zeros"),
        (double, "weight", "parametrised already"),
        (older, "weight", "parametrised already"),
        (lazy, "weight", "lazy"),
        (infinite, "weight", "not finite"),
        (nn.ReLU(), "weight", "ReLU has no weight 'weight'"),
        (nn.LSTM(2, 2), "weight", "it has weight_ih_l0, weight_hh_l0"),
        (nn.Embedding(2, 2, sparse=True), "weight", "sparse"),
        (nn.Embedding(2, 2, max_norm=1.0), "weight", "max_norm"),
        (nn.Linear(2, 2, device="meta"), "weight", "meta device"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            register_bounded_weight_norm(layer, name)
