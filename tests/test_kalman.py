"""Batch Kalman normalisation: the mixture, how moments travel, the variants, and what it is on whole networks."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import reference_norm as reference
import torch
from reference_norm import close
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import FP32
from lowprec.methods import convert
from lowprec.models import small_resnet
from lowprec.norm import KalmanBatchNorm1d, KalmanBatchNorm2d
from lowprec.norm.gaussian import elementwise_moments, position_moments, relu_moments
from lowprec.norm.kalman import VARIANTS, default_gain
from lowprec.norm.l2 import L2BatchNorm2d
from lowprec.norm.moment_flow import _KINDS, MomentFlow
from lowprec.norm.moment_states import Carried, Moments, Sample, set_state, state_of
from lowprec.precision import Precision

OPTIONS = [*({"variant": name} for name in VARIANTS), {"variant": "code", "deterministic": False}]
over_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def predicted(norm, x, mean, variance):
    """The output of `norm` on x when these moments are predicted."""
    x = x.clone()
    set_state(x, Moments(mean, variance))
    return norm(x)


def images(count=6, channels=3, size=5, dtype=torch.float64):
    return torch.randn(count, channels, size, size, dtype=dtype) * 2 + 1


def test_the_filtered_moments_are_those_of_the_mixture_of_both():
    norm = KalmanBatchNorm2d(3, gain=0.3, momentum=1.0, eps=0.0).double()
    x = images()
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    y = predicted(norm, x, mean, variance)
    for channel in range(3):
        values = reference.channel(x.numpy(), channel)
        # Sampled exactly: each measured value has weight q / n; two points have the predicted moments.
        a, s = mean[channel].item(), math.sqrt(variance[channel].item())
        points = np.concatenate([values, [a - s, a + s]])
        weights = np.concatenate([np.full(len(values), 0.3 / len(values)), [0.35, 0.35]])
        m = (weights * points).sum()
        v = (weights * (points - m) ** 2).sum()
        close(y[:, channel], (x[:, channel] - m) / math.sqrt(v))
        close(norm.running_mean[channel], m)
        n = len(values)
        close(norm.running_var[channel], v + 0.3 * values.var() * (n / (n - 1) - 1))


def test_a_gain_of_one_is_batch_norm_to_the_bit_and_a_gain_of_zero_ignores_the_batch():
    x = images(dtype=torch.float32)
    ours, plain = KalmanBatchNorm2d(3, gain=1.0), L2BatchNorm2d(3)
    assert torch.equal(predicted(ours, x, torch.randn(3), torch.rand(3)), plain(x))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in ours.state_dict().items())
    ours = KalmanBatchNorm2d(3, gain=0.0)
    mean, variance = torch.randn(3), torch.rand(3) + 0.5
    first = predicted(ours, x, mean, variance)
    moved = x.clone()
    moved[0] += 100
    assert torch.equal(predicted(ours, moved, mean, variance)[1:], first[1:])
    close(first, (x - mean.view(3, 1, 1)) / (variance + 1e-5).sqrt().view(3, 1, 1), terms=2**30)  # float32


def test_the_gain_follows_the_samples_between_the_released_values():
    assert [round(default_gain(n), 6) for n in (2, 128)] == [0.1, 0.95]
    gains = [default_gain(n) for n in (1, 2, 4, 16, 128, 1024)]
    assert gains == sorted(gains)
    assert 0 < gains[0] < 0.1
    assert gains[-1] < 1
    close(default_gain(torch.tensor(16.0)), default_gain(16), terms=2**30)
    for count, gain in ((2, 0.1), (6, default_gain(6))):
        x = images(count)
        state = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        by_itself, told = KalmanBatchNorm2d(3).double(), KalmanBatchNorm2d(3, gain=gain).double()
        close(predicted(by_itself, x, *state), predicted(told, x, *state))


def test_a_prediction_that_cannot_be_believed_is_left_out():
    x = images()
    x[:, 1] *= 1e-6
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    plain = L2BatchNorm2d(3).double()(x)
    ours = predicted(KalmanBatchNorm2d(3, gain=0.5).double(), x, mean, variance)
    assert torch.equal(ours[:, 1], plain[:, 1])
    assert not torch.equal(ours[:, 0], plain[:, 0])
    code = predicted(KalmanBatchNorm2d(3, gain=0.5, variant="code").double(), x, mean, variance)
    assert torch.equal(code, plain)  # the released code leaves out all channels for one
    for broken in (math.nan, math.inf):
        spoilt = variance.clone()
        spoilt[0] = broken
        assert torch.equal(predicted(KalmanBatchNorm2d(3, gain=0.5).double(), x, mean, spoilt)[:, 0], plain[:, 0])


GEOMETRIES = [
    {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1, "size": (9, 11)},
    {"kernel": 3, "stride": 2, "padding": 1, "dilation": 1, "groups": 2, "size": (8, 9)},
    {"kernel": 5, "stride": 3, "padding": (4, 1), "dilation": (1, 2), "groups": 4, "size": (23, 40)},
    {"kernel": 1, "stride": 2, "padding": 0, "dilation": 1, "groups": 1, "size": (7, 6)},
    {"kernel": 7, "stride": 2, "padding": 3, "dilation": 1, "groups": 1, "size": (32, 4)},
    {"kernel": 2, "stride": 1, "padding": "same", "dilation": 1, "groups": 1, "size": (6, 5)},
    {"kernel": 3, "stride": 1, "padding": "valid", "dilation": 1, "groups": 1, "size": (3, 3)},
    {"kernel": 3, "stride": 4, "padding": 2, "dilation": 1, "groups": 1, "size": (50,)},
    {"kernel": 3, "stride": 2, "padding": 1, "dilation": 1, "groups": 1, "size": (5, 6, 7)},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_moments_through_a_convolution_are_those_at_every_position(case):
    axes = len(case["size"])
    weight = torch.randn(4, 4 // case["groups"], *[case["kernel"]] * axes, dtype=torch.float64)
    mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    full = torch.ones(1, 4, *case["size"], dtype=torch.float64)
    shape = (1, 4, *[1] * axes)
    means = convolve(full * mean.view(shape), weight, None, *geometry)[0].flatten(1)
    variances = convolve(full * variance.view(shape), weight**2, None, *geometry)[0].flatten(1)
    got_mean, got_variance = position_moments(mean, variance, weight, case["size"], *geometry)
    close(got_mean, means.mean(1))
    close(got_variance, variances.mean(1) + means.var(1, correction=0))


@pytest.mark.parametrize("f", [F.relu, F.leaky_relu, F.gelu, F.silu, torch.tanh, F.relu6, F.hardswish])
def test_moments_through_an_activation_are_the_integrals(f):
    mean = torch.tensor([0.0, 1.5, -2.0, 0.3], dtype=torch.float64)
    variance = torch.tensor([1.0, 0.25, 4.0, 0.0], dtype=torch.float64)
    got = elementwise_moments(f, mean, variance)
    for channel in range(4):
        m, s = mean[channel].item(), math.sqrt(variance[channel].item())

        def value(t, m=m, s=s):
            return f(torch.tensor(m + s * t, dtype=torch.float64)).item()

        kinks = [] if s == 0 else sorted({(k - m) / s for k in (-3, 0, 3, 6) if abs((k - m) / s) < 8})
        first = integrate.quad(lambda t: value(t) * stats.norm.pdf(t), -8, 8, points=kinks, epsabs=1e-11)[0]
        second = integrate.quad(
            lambda t, first=first: (value(t) - first) ** 2 * stats.norm.pdf(t), -8, 8, points=kinks, epsabs=1e-11
        )[0]
        # Two kinks of slope 1 at most: 2 * 1.3e-4 sigma; the square's kink has the slope 2 |f - mean| <= 2 * 6 sigma.
        assert abs(got[0][channel].item() - first) <= 2 * 1.3e-4 * s + 1e-8
        assert abs(got[1][channel].item() - second) <= 12 * 2 * 1.3e-4 * s * s + 1e-8
        if f is F.relu:
            exact = relu_moments(mean, variance)
            assert abs(exact[0][channel].item() - first) <= 1e-8
            assert abs(exact[1][channel].item() - second) <= 1e-8


def test_noise_converges_to_the_closed_form_with_the_root_of_its_number():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)).double()
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.2
    errors = []
    for size in (16, 128):
        found = {}
        for kind in ("exact", "drawn"):
            x = torch.randn(1, 3, size, size, dtype=torch.float64)
            set_state(x, Moments(mean, variance) if kind == "exact" else Sample.drawn(mean, variance, (size, size)))
            with MomentFlow():
                y = network[0](x)
            found[kind] = [value.detach() for value in state_of(y).moments(4)]
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found["exact"], found["drawn"], strict=True)))
    # 5 standard errors over size^2 positions; outputs that share inputs are correlated: the 9 of a kernel, so 3 times.
    scale = float(variance.max() * network[0].weight.detach().square().flatten(1).sum(1).max()) + 1
    assert errors[1] <= 5 * 3 * 2 * scale / 128
    assert errors[1] < errors[0]


# None: for other dimensions, as the 2d kin.
ARGUMENTS = {
    F.conv1d: None, F.conv3d: None,
    F.conv2d: (torch.randn(4, 4, 3, 3),), F.linear: (torch.randn(2, 4),),
    torch.add: (1.5,), torch.Tensor.add: (1.5,), torch.Tensor.add_: (1.5,),
    torch.prelu: (torch.tensor([0.2]),), F.pad: ((1, 1, 1, 1, 2, 0),), F.channel_shuffle: (2,),
    torch.Tensor.__getitem__: ((slice(None), slice(None), slice(None, None, 2)),),
    torch.flatten: (1,), torch.Tensor.flatten: (1,), torch.Tensor.to: (torch.float64,),
    torch.Tensor.type: (torch.float64,),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), (1,)),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d), (2,)),
    **dict.fromkeys((F.max_pool1d, F.max_pool3d, F.avg_pool1d, F.avg_pool3d, F.adaptive_avg_pool1d)),
    **dict.fromkeys((F.adaptive_avg_pool3d, F.dropout1d, F.dropout3d)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "drawn", "carried"])
def test_every_known_operation_gives_a_state_of_its_channels(kind):
    seen = 0
    for func in {func for funcs in _KINDS.values() for func in funcs}:
        arguments = ARGUMENTS.get(func, ())
        if arguments is None:
            continue
        x = torch.randn(2, 4, 6, 6) if func is not F.linear else torch.randn(8, 4)
        mean, variance = torch.randn(4), torch.rand(4)
        make = {"exact": Moments, "carried": Carried, "drawn": lambda m, v, x=x: Sample.drawn(m, v, x.shape[2:])}[kind]
        set_state(x, make(mean, variance))
        with MomentFlow():
            y = func([x, x], 1) if func in (torch.cat, torch.concat) else func(x, *arguments)
        state = state_of(y)
        assert type(state) is {"exact": Moments, "carried": Carried, "drawn": Sample}[kind], func
        moments = state.moments(y.shape[1])
        assert moments is None or [value.shape for value in moments] == [(y.shape[1],)] * 2, func
        assert moments is None or all(value.isfinite().all() for value in moments), func
        seen += 1
    assert seen > 40


def test_what_has_no_spread_goes_through_every_operation_as_itself():
    """With a variance of zero noise is the mean itself: closed form and noise must agree, channel by channel."""
    for func in {func for funcs in _KINDS.values() for func in funcs}:
        arguments = {**ARGUMENTS, F.pad: ((0, 0, 0, 0, 2, 0),)}.get(func, ())
        if arguments is None:
            continue
        mean, found = torch.tensor([0.5, -1.0, 2.0, 3.5]), []
        for kind in ("exact", "drawn"):
            x = torch.ones(2, 4, 6, 6) if func is not F.linear else torch.ones(8, 4)
            zeros = torch.zeros(4)
            set_state(x, Moments(mean, zeros) if kind == "exact" else Sample.drawn(mean, zeros, x.shape[2:]))
            with MomentFlow():
                y = func([x, x], 1) if func in (torch.cat, torch.concat) else func(x, *arguments)
            found.append(state_of(y).moments(y.shape[1]))
        if found[1] is not None:
            # The smallest deviation is taken to be 1e-6, a hundredth of this; sums of 36 terms of size 20.
            torch.testing.assert_close(found[0][0].float(), found[1][0].float(), rtol=0, atol=36 * 20 * FP32.eps)


def test_sums_add_and_widening_pads_and_unknown_operations_end_it():
    def tensor(channels=2):
        x = torch.randn(3, channels, 4, 4)
        set_state(x, Moments(torch.arange(channels) + 1.0, torch.arange(channels) + 2.0))
        return x

    with MomentFlow():
        total = tensor() + tensor()
        assert [v.tolist() for v in state_of(total).moments(2)] == [[2, 4], [4, 6]]
        wide = F.pad(tensor()[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        assert [v.tolist() for v in state_of(wide).moments(4)] == [[0, 1, 2, 0], [0, 2, 3, 0]]
        both = torch.cat([tensor(), tensor(3)], 1)
        assert state_of(both).channels == 5
        for y in (
            tensor() * 2, tensor() + torch.ones(3, 2, 4, 4), tensor().softmax(1), torch.cat([tensor(), tensor()]),
            torch.add(tensor(), tensor(), alpha=2), tensor()[:, :1], tensor()[:, [1, 0]], tensor()[:, None],
            tensor()[0], tensor().transpose(1, 2), tensor().mul_(3),
            torch.cat([tensor(), torch.ones(3, 2, 4, 4)], 1), F.pad(tensor(), (0, 0, 0, 0, -1, 0)),
        ):  # fmt: skip
            assert state_of(y) is None
        x = tensor()
        x += tensor()
        assert state_of(x).moments(2)[0].tolist() == [2, 4]
    y = tensor() + tensor()
    assert state_of(y) is None  # no flow, no state


def plain_chain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5),
    )  # fmt: skip


def test_the_first_norm_measures_and_the_next_mixes_what_its_input_makes_likely():
    model, report = convert(plain_chain().double(), "kalman", gain=0.25)
    assert [type(model[index]) for index in (1, 4)] == [KalmanBatchNorm2d] * 2
    assert len(report.changed) == 2
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, 1, 2, 3]))
        model[1].bias.copy_(torch.tensor([0.5, 0, -1, 1]))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    seen = {}
    model[4].register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), y=out.detach()))
    model(x)
    relu = relu_moments(model[1].bias.detach(), model[1].weight.detach() ** 2)
    mean, variance = position_moments(*relu, model[3].weight.detach(), (6, 6), 1, 1, 1, 1)
    m, v = seen["x"].mean((0, 2, 3)), seen["x"].var((0, 2, 3), correction=0)
    filtered = 0.75 * mean + 0.25 * m
    spread = 0.75 * variance + 0.25 * v + 0.1875 * (m - mean) ** 2
    wanted = (seen["x"] - filtered.view(-1, 1, 1)) / (spread + 1e-5).sqrt().view(-1, 1, 1)
    close(seen["y"], wanted)


@over_options
def test_gradients_are_those_of_central_differences(options):
    """Through prediction and normalisation, in float64; at h = 1e-6 off by h^2 and by u / h = 1e-10."""
    model, _ = convert(plain_chain().double(), "kalman", gain=0.4, **options)
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])

    def loss():
        torch.manual_seed(3)
        return F.cross_entropy(model(x), y)

    loss().backward()
    checked = 0
    for param in model.parameters():
        if param.grad is None:  # the paper's first norm has nothing to predict from
            continue
        flat = param.detach().view(-1)
        index = int(param.grad.abs().view(-1).argmax())
        ends = []
        for h in (1e-6, -1e-6):
            flat[index] += h
            ends.append(loss().item())
            flat[index] -= h
        numeric = (ends[0] - ends[1]) / 2e-6
        grad = param.grad.view(-1)[index].item()
        assert abs(numeric - grad) <= 1e-6 * max(abs(grad), 1e-2), param.shape
        checked += 1
    assert checked >= 7


@over_options
def test_networks_train_in_half_and_evaluate_as_batch_norm_does(options):
    model, _ = convert(small_resnet(width=4), "kalman", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    precision = Precision("fp16-master", init_scale=2.0**8)
    precision.prepare(model, optimizer)
    x = torch.randn(4, 1, 8, 8)
    losses = []
    for _ in range(12):
        with precision.forward():
            loss = F.cross_entropy(model(x), torch.arange(4))
        assert precision.step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    norm = model.blocks[0].norm1.eval()
    assert norm.running_mean.dtype == torch.float32
    y = torch.randn(2, 4, 5, 5)
    wanted = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).detach()
    atol = reference.rounding_bound(FP32, 16) * float(wanted.abs().max())
    torch.testing.assert_close(norm(y).detach(), wanted, rtol=0, atol=atol)


@over_options
def test_norms_that_begin_with_a_weight_of_zero_get_finite_gradients(options):
    """The usual start of the last norm of a branch; here of every norm, so that ReLUs see no spread at all."""
    model, _ = convert(small_resnet(width=4), "kalman", **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, KalmanBatchNorm2d):
                module.weight.zero_()
                module.bias.copy_(torch.linspace(-9, 9, module.num_features))
    F.cross_entropy(model(torch.randn(2, 1, 8, 8)), torch.arange(2)).backward()
    assert all(param.grad is None or param.grad.isfinite().all() for param in model.parameters())


def test_closed_form_repeats_itself_and_noise_is_the_generators():
    x = torch.randn(4, 1, 8, 8)
    for deterministic in (True, False):
        model, _ = convert(small_resnet(width=4), "kalman", deterministic=deterministic)
        outputs = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            outputs.append(model(x))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[0], outputs[1]) == deterministic


def test_the_papers_transition_and_gain_are_learned():
    model, _ = convert(small_resnet(width=4), "kalman", variant="paper")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names = {name for name, _ in model.named_parameters() if "transition" in name or "noise" in name or "gain" in name}
    assert len(names) == 3 * 8
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    moved = {name for name in names if not torch.equal(dict(model.named_parameters())[name], before[name])}
    assert names - moved == {f"norm.{part}" for part in ("transition", "process_noise", "gain_logit")}  # the first one


def test_copies_and_pickles_train_and_stay_apart():
    model, _ = convert(small_resnet(width=4), "kalman")
    x = torch.randn(2, 1, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.norm.flow is not model.norm.flow
        twin = copy.deepcopy(model)
        assert torch.equal(other(x), twin(x))
    assert not model.norm.flow.is_open


def test_a_forward_that_fails_closes_the_flow():
    model, _ = convert(plain_chain(), "kalman")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 1, 5, 5))
    assert not model[1].flow.is_open
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8))
    x = torch.randn(2, 4, 3, 3)
    assert state_of(x + x) is None


def test_kalman_says_in_one_line_what_it_cannot_do():
    with pytest.raises(ConfigError, match="has no variant 'thesis'; choose one of output, code, paper"):
        convert(plain_chain(), "kalman", variant="thesis")
    with pytest.raises(ConfigError, match=r"gain is 2 .*from 0 to 1"):
        KalmanBatchNorm1d(3, gain=2)
    with pytest.raises(UnsupportedError, match="found no BatchNorm1d"):
        convert(nn.Sequential(nn.Linear(2, 2)), "kalman")
    model, _ = convert(plain_chain(), "kalman")
    with pytest.raises(UnsupportedError, match="without activation checkpointing"):
        checkpoint(model[3:], torch.randn(2, 4, 6, 6, requires_grad=True), use_reentrant=False)
