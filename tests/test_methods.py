"""The contract of every method in METHODS, and what each one does."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn
from torch.nn import functional as F

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.export import fold
from lowprec.formats import FP32, FP64
from lowprec.methods import METHODS, Handle, Method, attach, convert
from lowprec.methods.layers import NormalizedLinear
from lowprec.methods.mimic_norm import loss_floor
from lowprec.models import mlp, small_resnet
from lowprec.norm import NORMS, L1BatchNorm1d, L1BatchNorm2d
from lowprec.precision import Precision
from lowprec.precision.masters import master_of

# For every module method: a network that it converts, and the options to use. Step methods: tests/test_step_methods.py.
CASES = {
    "l1": (lambda: small_resnet(width=4), {}),
    "linf": (lambda: small_resnet(width=4), {}),
    "topk": (lambda: small_resnet(width=4), {"k": 5}),
    "l2_half": (lambda: small_resnet(width=4), {}),
    "bounded_weight_norm": (lambda: small_resnet(width=4), {"skip": ["classifier"]}),
    "weight_norm_lp": (lambda: small_resnet(width=4), {"p": "topk", "k": 4, "sphere": True}),
    "mean_only": (lambda: small_resnet(width=4), {}),
    "mimic_norm": (lambda: small_resnet(width=8), {}),
    "one_batch_norm": (lambda: small_resnet(width=4), {}),
    "bnp": (lambda: small_resnet(width=4), {}),
    "kalman": (lambda: small_resnet(width=4), {}),
    "ic": (lambda: small_resnet(width=4), {"p": 0.1}),
    "frn": (lambda: small_resnet(width=4), {}),
    "scaled_ws": (lambda: small_resnet(width=4), {}),
    "bn_free_binary": (lambda: small_resnet(width=4), {}),
}
MODULE_METHODS = [name for name, method in METHODS.items() if method.kind == "module"]
over_methods = pytest.mark.parametrize("name", MODULE_METHODS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(count=16):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=3):
    labels = torch.arange(16) % 10
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images()), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_method_has_a_case():
    assert set(CASES) == set(MODULE_METHODS)
    assert MODULE_METHODS
    assert all(name == method.name and method.summary and method.source for name, method in METHODS.items())


@over_methods
def test_convert_leaves_its_argument_and_reports(name):
    model = CASES[name][0]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure = repr(model)
    converted, report = convert(model, name, **CASES[name][1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert repr(model) == structure
    assert not hasattr(model, "lowprec_methods")
    assert report.changed
    assert all(row.name and row.reason for row in [*report.changed, *report.refused])
    assert not any(module.training for module in converted.modules())
    assert copy.deepcopy(converted).lowprec_methods == [{"name": name, "args": CASES[name][1]}]


@over_methods
def test_converted_networks_train_export_and_load(name):
    model, _ = convert(CASES[name][0](), name, **CASES[name][1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = attach(model, optimizer)
    losses = train(model, optimizer, 6)
    assert losses[-1] < losses[0]
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks
    model.eval()
    twin, _ = convert(CASES[name][0](), name, **CASES[name][1])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(images()), model(images()))
    with torch.no_grad():
        program = torch.export.export(model, (images(),))
        want = model(images())
        # Another summation order in float32 over the network's depth; relative to the largest logit.
        atol = reference.rounding_bound(FP32, 1000) * want.abs().max().item()
        torch.testing.assert_close(program.module()(images()), want, rtol=0, atol=atol)


@over_methods
def test_what_the_table_says_of_folding_is_so(name):
    model, _ = convert(CASES[name][0](), name, **CASES[name][1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attach(model, optimizer)
    train(model, optimizer)
    _, report = fold(model.eval(), (images(2),))
    says = METHODS[name].folds
    if says.startswith("no:") or "stays" in says:
        assert report.facts["norms_left"] > 0
        assert report.refused
    else:
        assert report.facts["norms_left"] == 0


@over_methods
def test_convert_keeps_hooks_dtype_training_flags_and_attributes(name):
    model = CASES[name][0]().double()
    calls = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append("norm"))
    model.blocks[0].conv2.register_forward_pre_hook(lambda *_: calls.append("conv"))
    model.classifier.register_forward_hook(lambda module, args, output: output + 1)
    model.blocks[0].norm1.train(False)
    model.blocks[0].norm1.note = "mine"
    converted, _ = convert(model, name, **CASES[name][1])
    converted(images().double())
    assert calls == ["norm", "conv"]
    assert {value.dtype for value in converted.parameters()} == {torch.float64}
    assert converted.blocks[0].norm1.training is False
    assert converted.blocks[0].norm1.note == "mine"
    assert converted.blocks[0].training is True
    assert len(converted.classifier._forward_hooks) == 1


@over_methods
def test_state_dict_keys_that_mean_the_same_stay(name):
    model = CASES[name][0]()
    converted, _ = convert(model, name, **CASES[name][1])
    keys, new = set(model.state_dict()), set(converted.state_dict())
    weights = {key for key in keys if key.endswith(".weight") and ("conv" in key or "classifier" in key)}
    kept = {key.replace("parametrizations.weight.original", "weight") for key in new}
    assert weights <= kept


@over_methods
def test_nothing_to_convert_is_an_error(name):
    with pytest.raises(UnsupportedError, match=r"found no|not the logits|ends in"):
        convert(nn.Sequential(nn.ReLU()), name)


@over_methods
def test_unknown_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"method '{name}' has no option 'skipp'"):
        convert(CASES[name][0](), name, skipp=1)


def test_unknown_methods_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no method is called 'mimicnorm'; choose one of l1, .*mean 'mimic_norm'\?"):
        convert(nn.BatchNorm2d(2), "mimicnorm")
    with pytest.raises(ConfigError, match="no method is called 'zzz'"):
        attach(nn.BatchNorm2d(2), torch.optim.SGD([torch.zeros(1)]), "zzz")


def test_attach_without_a_record_is_inert_and_says_what_is_missing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters())
    attach(model, optimizer).remove()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ConfigError, match=r"was not converted by 'mimic_norm'; call lowprec.convert"):
        attach(model, optimizer, "mimic_norm")
    with pytest.raises(ConfigError, match="got options min_fan_in but no method"):
        attach(model, optimizer, min_fan_in=3)


def test_step_and_data_methods_need_no_line_of_convert(monkeypatch):
    attached = []

    def put_on(model, optimizer, *, strength=1):
        attached.append(strength)
        return Handle([lambda: attached.append("off")])

    monkeypatch.setitem(METHODS, "clip", Method("clip", "step", "clips", "here", attach=put_on))
    monkeypatch.setitem(METHODS, "crops", Method("crops", "data", "crops", "here", instead="set [data] crops"))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters())
    converted, report = convert(model, "clip", strength=3)
    assert "attach" in report.changed[0].reason
    assert repr(converted) == repr(model)
    attach(converted, optimizer).remove()
    attach(model, optimizer, "clip", strength=5)
    assert attached == [3, "off", 5]
    for call in (lambda: convert(model, "crops"), lambda: attach(model, optimizer, "crops")):
        with pytest.raises(UnsupportedError, match=r"'crops' acts on the data.*set \[data\] crops"):
            call()
    assert dataclasses.fields(Method)


class Subclass(nn.BatchNorm2d):
    pass


def test_l1_replaces_torchs_own_classes_and_gives_a_reason_for_the_others():
    shared = nn.BatchNorm2d(2, eps=0.5, momentum=None)
    model = nn.Sequential(shared, nn.Sequential(shared), Subclass(2), nn.GroupNorm(1, 2), L1BatchNorm2d(2))
    model[0].weight.requires_grad_(False)
    model[0].running_mean.fill_(3)
    model[0].num_batches_tracked.fill_(7)
    converted, report = convert(model, "l1")
    assert type(converted[0]) is L1BatchNorm2d
    assert converted[1][0] is converted[0]
    assert (converted[0].eps, converted[0].momentum, converted[0].weight.requires_grad) == (0.5, None, False)
    assert converted[0].running_mean.tolist() == [3, 3]
    assert converted[0].running_scale.tolist() == [1, 1]
    assert int(converted[0].num_batches_tracked) == 7
    assert [row.name for row in report.changed] == ["0 = 1.0"]
    assert "running_scale starts at 1" in report.changed[0].reason
    reasons = {row.name: row.reason for row in report.refused}
    assert set(reasons) == {"2", "3", "4"}
    assert "subclass" in reasons["2"]
    assert "not a batch norm" in reasons["3"]
    assert "already" in reasons["4"]
    assert set(converted.state_dict()) == {
        key.replace("0.running_var", "0.running_scale") for key in model.state_dict()
    }


def test_l1_replaces_the_root_itself_and_all_dimensions():
    root, _ = convert(nn.BatchNorm1d(2, affine=False, track_running_stats=False), "l1")
    assert type(root) is L1BatchNorm1d
    assert root.running_scale is None
    assert root.weight is None
    for dimension, cls in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), start=1):
        assert type(convert(cls(2), "l1")[0]) is NORMS["l1"].classes[dimension]


def test_bounded_weight_norm_bounds_all_but_what_is_skipped():
    converted, report = convert(small_resnet(width=4), "bounded_weight_norm", skip=["classifier"])
    assert {row.name: row.reason for row in report.refused} == {"classifier": "left out by skip"}
    norms = converted.blocks[0].conv1.weight.detach().double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(norms, norms.mean(), rtol=reference.rounding_bound(FP32, 36))
    with pytest.raises(ConfigError, match=r"skip names 'clasifier'.*did you mean 'classifier'"):
        convert(small_resnet(), "bounded_weight_norm", skip=["clasifier"])
    with pytest.raises(ConfigError, match="skip is a list"):
        convert(small_resnet(), "bounded_weight_norm", skip="classifier")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[1].weight[0] = 0
    _, report = convert(model, "bounded_weight_norm")
    assert report.refused[0].reason == "its weight is all zeros, so there is no norm to keep"
    assert "1 rows of zeros" in report.changed[0].reason


def centred(model):
    return {
        path: float(conv.weight.detach().double().mean((1, 2, 3)).abs().max() / conv.weight.detach().abs().max())
        for path, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d)
    }


def test_mimic_norm_does_what_the_paper_and_its_code_say():
    model = small_resnet(width=8, blocks=3)
    converted, report = convert(model, "mimic_norm")
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = {path: m for path, m in converted.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(conv.bias is not None and not conv.bias.any() for conv in convs.values())
    # Two convolutions per branch, branches counted from 1: 1.2^2 / l.
    for index in range(3):
        scale = converted.blocks[index].conv2.branch_scale
        np.testing.assert_allclose(scale.item(), 1.44 / (index + 1), rtol=reference.rounding_bound(FP32))
        assert converted.blocks[index].conv2.wide_parameters == ("branch_scale",)
    assert isinstance(converted.classifier, NormalizedLinear)
    assert not converted.classifier.norm.affine
    assert converted.classifier.logit_scale.item() == 1
    means = centred(converted)
    skipped = {"stem", "blocks.1.shortcut.0"}  # fan-in 9 and 8
    assert {path for path, mean in means.items() if mean > FP32.eps} == skipped
    assert {row.name for row in report.refused} == skipped
    # He: variance 2 / fan-in; of 72 * 8 normal values the sample variance is off by 4 sigma = 4 sqrt(2/576) at most.
    variance = float(converted.blocks[0].conv1.weight.detach().var()) * 72
    assert abs(variance / 2 - 1) < 4 * np.sqrt(2 / 576)


def test_mimic_norm_can_keep_the_weights_and_follow_the_paper():
    model = small_resnet(width=8)
    kept, _ = convert(model, "mimic_norm", init=False, temperature=False, min_fan_in=10**6)
    assert torch.equal(kept.blocks[0].conv2.weight, model.blocks[0].conv2.weight)
    assert kept.classifier.logit_scale is None
    paper, report = convert(model, "mimic_norm", recipe="paper")
    np.testing.assert_allclose(paper.blocks[2].conv2.branch_scale.item(), 3**-0.5, rtol=reference.rounding_bound(FP32))
    assert any("2.934" in row.reason for row in report.changed)
    with pytest.raises(ConfigError, match="recipe 'thesis' is unknown"):
        convert(model, "mimic_norm", recipe="thesis")
    many, _ = convert(small_resnet(width=4, classes=21), "mimic_norm")
    assert many.classifier.logit_scale is None


def test_the_branch_scalar_multiplies_the_output_of_the_convolution():
    converted, _ = convert(small_resnet(width=8), "mimic_norm")
    conv = converted.double().blocks[1].conv2
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    want = conv.branch_scale * F.conv2d(x, conv.weight, conv.bias, padding=1)
    atol = reference.rounding_bound(FP64, 144) * want.abs().max().item()
    torch.testing.assert_close(conv(x), want, rtol=0, atol=atol)


def test_centring_after_the_step_equals_a_step_with_centred_gradients():
    model, _ = convert(small_resnet(width=8).double(), "mimic_norm", min_fan_in=0)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    optimizer, other = (torch.optim.SGD(m.parameters(), **options) for m in (model, twin))
    attach(model, optimizer)
    for _ in range(5):
        for m, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            F.cross_entropy(m(images().double()), torch.arange(16) % 10).backward()
        for conv in twin.modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.grad -= conv.weight.grad.mean((1, 2, 3), keepdim=True)
        optimizer.step()
        other.step()
    assert max(centred(model).values()) <= FP64.eps
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        # Rounding only, amplified through five steps of a network a dozen layers deep.
        torch.testing.assert_close(
            mine, its, rtol=0, atol=reference.rounding_bound(FP64, 2**14) * (its.abs().max().item() + 1)
        )


def test_attach_centres_only_what_it_should_and_stops_when_removed():
    model, _ = convert(small_resnet(width=8), "mimic_norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer)
    train(model, optimizer)
    assert {path for path, mean in centred(model).items() if mean > FP32.eps} == {"stem", "blocks.1.shortcut.0"}
    handle.remove()
    handle.remove()
    train(model, optimizer)
    assert min(centred(model).values()) > FP32.eps


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
def test_attach_centres_the_masters_whenever_they_were_made(order):
    model, _ = convert(small_resnet(width=8), "mimic_norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision("fp16-master", init_scale=2.0**8)
    if order == "attach first":
        attach(model, optimizer)
    model, optimizer = precision.prepare(model, optimizer)
    if order == "prepare first":
        attach(model, optimizer)
    for _ in range(3):
        with precision.forward():
            loss = F.cross_entropy(model(images()), torch.arange(16) % 10)
        assert precision.step(loss)
    weight = model.blocks[0].conv2.weight
    master = master_of(weight).detach()
    assert (weight.dtype, master.dtype) == (torch.float16, torch.float32)
    assert master.mean((1, 2, 3)).abs().max() <= FP32.eps * master.abs().max()
    assert torch.equal(weight, master.half())
    wide = (model.blocks[0].conv2.branch_scale, model.classifier.logit_scale, model.classifier.norm.running_var)
    assert {value.dtype for value in wide} == {torch.float32}


def test_attach_refuses_an_optimizer_of_other_parameters():
    model, _ = convert(small_resnet(width=8), "mimic_norm")
    with pytest.raises(ConfigError, match="holds none of the 6 weights to centre; make it from the parameters"):
        attach(model, torch.optim.SGD(small_resnet().parameters()))


def test_last_norm_gives_standard_logits_and_the_loss_floor():
    layer = NormalizedLinear(nn.Linear(5, 4).double(), learn_scale=False)
    x = torch.randn(64, 5, dtype=torch.float64)
    y = layer(x).detach().numpy()
    # 0.5 eps / var of the logits is what eps takes from the variance.
    deviation = 1e-5 / F.linear(x, layer.weight).var(0, correction=0).min().item() + reference.rounding_bound(FP64, 64)
    np.testing.assert_allclose(y.mean(0), 0, atol=reference.rounding_bound(FP64, 64) * np.abs(y).max())
    np.testing.assert_allclose(y.var(0), 1, atol=deviation)
    assert layer(torch.randn(6, 3, 5, dtype=torch.float64)).shape == (6, 3, 4)
    for classes, floor in ((2, 0.127), (3, 0.215), (10, 0.2784), (20, 0.177), (100, 0.0043)):
        assert abs(loss_floor(classes) - floor) <= 0.5 * 10.0 ** -len(str(floor).split(".")[1])
    assert loss_floor(1) == 0


def test_last_norm_is_wide_for_half_logits():
    layer = NormalizedLinear(nn.Linear(3, 4), learn_scale=True)
    norm = layer.norm
    with torch.no_grad():
        layer.weight.mul_(2000)  # logits beyond 256, whose squares overflow half
        layer.logit_scale.copy_(torch.tensor(1 / 3))
    layer.weight, layer.bias = (nn.Parameter(value.detach().half()) for value in (layer.weight, layer.bias))
    x = torch.randn(32, 3).half()
    with torch.no_grad():
        y = layer(x)
        want = (norm(F.linear(x, layer.weight, layer.bias).float()) * layer.logit_scale).half()
    assert y.dtype == torch.float16
    assert torch.equal(y, want)
    assert norm.running_var.dtype == torch.float32


class Odd(nn.Module):
    """Sums of every kind: two branches of one size, a branch that ends in ReLU, one shared, one with two readers."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "d", "e", "f"):
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        self.norm, self.pre = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(4, 3)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = self.norm(self.a(x)) + self.offset
        x = self.b(x) + self.c(x)
        x = x + F.relu(self.d(self.pre(x)))
        x = torch.add(self.drop(self.e(x)), x)
        shared = self.f(x)
        x = x + shared
        return F.log_softmax(self.fc((x * shared.mean()).mean((2, 3))), dim=1)


def test_mimic_norm_refuses_with_a_reason_what_it_cannot_do():
    converted, report = convert(Odd(), "mimic_norm", min_fan_in=0)
    reasons = {row.name: row.reason for row in report.refused}
    text = " | ".join(reasons.values())
    assert "both sides of the sum hold 1 convolutions" in text
    assert "ends in relu" in text
    assert "used outside the branch" in text
    assert "not a conv or linear layer; it stays" in reasons["pre"]
    # The third sum with a fork is the one through dropout.
    np.testing.assert_allclose(converted.e.branch_scale.item(), 1.2 / 3, rtol=reference.rounding_bound(FP32))
    assert isinstance(converted.fc, NormalizedLinear)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x), x


def test_mimic_norm_says_in_one_line_which_networks_it_cannot_read():
    for model, reason in (
        (Untraceable(), "torch.fx cannot trace Untraceable.*control flow"),
        (TwoOutputs(), "several outputs"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()), "ends in '2' \\(ReLU\\)"),
        (nn.Sequential(nn.Linear(2, 2)), "found no batch norm after"),
    ):
        with pytest.raises(UnsupportedError, match=reason) as caught:
            convert(model, "mimic_norm")
        assert "\n" not in str(caught.value)


def test_methods_can_follow_each_other():
    model, _ = convert(small_resnet(width=8), "l1")
    model, _ = convert(model, "mimic_norm")
    assert [record["name"] for record in model.lowprec_methods] == ["l1", "mimic_norm"]
    assert not [m for m in model.modules() if isinstance(m, L1BatchNorm2d)]
    bounded, _ = convert(small_resnet(width=8), "bounded_weight_norm", skip=["classifier"])
    mixed, report = convert(bounded, "mimic_norm")
    assert any("parametrised" in row.reason for row in report.refused)
    mixed(images())


def test_mimic_norm_on_a_plain_network_draws_the_authors_variance():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    converted, report = convert(model, "mimic_norm")
    assert any(row.name == "3" and "N(0, 2.8 / 72)" in row.reason for row in report.changed)
    assert isinstance(converted[-1], NormalizedLinear)
    perceptron, _ = convert(mlp(), "mimic_norm")
    assert perceptron[1].bias is not None
