"""The contract of every norm in NORMS, and what the library asks of any layer."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn

from lowprec.formats import BF16, FP16, FP32, FP64
from lowprec.functional import accumulation_dtype, l1_batch_norm
from lowprec.norm import (
    NORMS,
    AbsoluteBatchNorm,
    L1BatchNorm1d,
    L1BatchNorm2d,
    inference_affine,
    is_norm,
    running_statistics,
)

# The float64 reference of each norm's statistics.
REFERENCES = {
    "l1": reference.l1_statistics,
    "linf": reference.linf_statistics,
    "topk": reference.topk_statistics,
    "l2": reference.l2_statistics,
}
SHAPES = {1: (6, 3, 5), 2: (4, 3, 3, 5), 3: (3, 3, 2, 3, 2)}
STREAMED = ("l1", "linf", "topk")
CASES = [(name, dimension) for name, family in NORMS.items() for dimension in family.classes]
FORMATS = {torch.float64: FP64, torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
over_cases = pytest.mark.parametrize(("name", "dimension"), CASES)


def make(name, dimension, dtype=torch.float64, **options):
    norm = NORMS[name].classes[dimension](3, dtype=dtype, **options)
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
            if norm.bias is not None:
                norm.bias.copy_(torch.tensor([0.25, 1.0, -3.0]))
    return norm


def data(dimension, dtype=torch.float64, seed=0):
    """Skewed values, so that the mean of the signs is not zero."""
    x = torch.randn(SHAPES[dimension], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.exp() * torch.tensor([1.0, 30.0, 0.01]).reshape(1, 3, *[1] * dimension).double() + 2).to(dtype)


def elements(dimension):
    return int(np.prod(SHAPES[dimension])) // 3


def spread(norm):
    """The running buffer that is not the mean."""
    return getattr(norm, next(name for name, kind in norm.running_kinds.items() if kind != "mean"))


def running_spread(norm, scale, count):
    """What a batch of this scale leaves in it."""
    return reference.l2_running(scale, norm.eps, count) if "running_var" in norm.running_kinds else scale


def test_every_norm_has_a_reference_and_three_dimensions():
    assert set(REFERENCES) == set(NORMS)
    assert {name for name in NORMS if issubclass(NORMS[name].classes[1], AbsoluteBatchNorm)} == set(STREAMED)
    assert NORMS
    assert all(set(family.classes) == {1, 2, 3} and family.name == name for name, family in NORMS.items())


@over_cases
@pytest.mark.parametrize("dtype", FORMATS)
def test_training_output_and_statistics_equal_the_reference(name, dimension, dtype):
    norm = make(name, dimension, dtype=accumulation_dtype(dtype), momentum=1.0)
    x = data(dimension, dtype)
    y = norm(x)
    x64 = x.double().numpy()
    mean, scale = REFERENCES[name](x64, norm.eps)
    want = reference.normalised(x64, mean, scale, *(p.detach().double().numpy() for p in (norm.weight, norm.bias)))
    wide = FORMATS[accumulation_dtype(dtype)]
    assert y.dtype == dtype
    assert norm.running_mean.dtype == accumulation_dtype(dtype)
    bound = reference.rounding_bound(wide, elements(dimension))
    np.testing.assert_allclose(norm.running_mean, mean, rtol=bound)
    # x - mean cancels: the error of the mean and of x is relative to |x|, the scale is smaller than |x| by this much.
    cancellation = float(np.max(np.abs(x64).max((0, *range(2, x64.ndim))) / scale))
    # The variance has the square of the scale's error.
    np.testing.assert_allclose(
        spread(norm), running_spread(norm, scale, elements(dimension)), rtol=2 * bound * cancellation
    )
    # The result is rounded once to the format of x; everything before is wide. Zero crossings: relative to the largest.
    atol = (bound * cancellation + FORMATS[dtype].unit_roundoff) * np.abs(want).max()
    np.testing.assert_allclose(y.detach().double(), want, rtol=0, atol=atol)


@over_cases
def test_gradients_equal_central_differences_twice(name, dimension):
    norm = make(name, dimension, track_running_stats=False)
    x = data(dimension)[:3, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


@over_cases
def test_the_gradient_of_the_input_sums_to_zero(name, dimension):
    norm, x = make(name, dimension), data(dimension).requires_grad_()
    upstream = data(dimension, seed=1)
    norm(x).backward(upstream)
    # Relative to the terms before they cancel: g / S.
    _, scale = REFERENCES[name](x.detach().numpy(), norm.eps)
    terms = (upstream.transpose(0, 1).flatten(1) * norm.weight[:, None] / torch.from_numpy(scale)[:, None]).abs().sum(1)
    bound = reference.rounding_bound(FP64, elements(dimension)) * terms
    assert (x.grad.transpose(0, 1).flatten(1).sum(1).abs() <= bound).all()


@over_cases
def test_shift_and_positive_scale_of_the_input_change_nothing(name, dimension):
    norm, x = make(name, dimension, eps=0.0), data(dimension)
    bound = reference.rounding_bound(FP64, elements(dimension)) * 100 * x.abs().max()  # 100: the shift below
    torch.testing.assert_close(norm(4.0 * x + 100), norm(x), rtol=0, atol=float(bound))


@over_cases
def test_a_constant_channel_gives_the_bias(name, dimension):
    norm = make(name, dimension, dtype=torch.float32)
    y = norm(torch.full(SHAPES[dimension], 7.0, dtype=torch.float16))
    assert torch.equal(y, norm.bias.detach().half().reshape(1, 3, *[1] * dimension).expand_as(y))


@over_cases
def test_evaluation_is_the_affine_that_inference_affine_says(name, dimension):
    norm, x = make(name, dimension), data(dimension)
    assert inference_affine(norm) is None
    norm(x)
    norm.eval()
    affine = inference_affine(norm)
    shape = (1, 3, *[1] * dimension)
    want = x.numpy() * affine.scale.reshape(shape) + affine.shift.reshape(shape)
    atol = reference.rounding_bound(FP64) * np.abs(x.numpy() * affine.scale.reshape(shape)).max()
    np.testing.assert_allclose(norm(x).detach(), want, rtol=0, atol=atol)
    bare = NORMS[name].classes[dimension](3, affine=False).eval()
    assert np.array_equal(inference_affine(bare).scale, np.full(3, 1 / np.sqrt(1 + 1e-5) if name == "l2" else 1.0))
    untracked = make(name, dimension, track_running_stats=False).eval()
    assert inference_affine(untracked) is None


@over_cases
def test_running_statistics_follow_with_torchs_meaning_of_momentum(name, dimension):
    x = [data(dimension, seed=seed) for seed in range(3)]
    parts = [REFERENCES[name](part.numpy(), 1e-5) for part in x]
    norm = make(name, dimension, momentum=0.25)
    average = make(name, dimension, momentum=None)
    mean, scale = np.zeros(3), np.ones(3)
    for part, (part_mean, part_scale) in zip(x, parts, strict=True):
        norm(part)
        average(part)
        part_scale = running_spread(norm, part_scale, elements(dimension))
        mean, scale = 0.75 * mean + 0.25 * part_mean, 0.75 * scale + 0.25 * part_scale
    bound = reference.rounding_bound(FP64, elements(dimension))
    np.testing.assert_allclose(norm.running_mean, mean, rtol=bound)
    np.testing.assert_allclose(spread(norm), scale, rtol=20 * bound)  # |x| is up to ten scales, the variance a square
    np.testing.assert_allclose(average.running_mean, np.mean([p[0] for p in parts], 0), rtol=bound)
    assert int(norm.num_batches_tracked) == 3
    norm.reset_running_stats()
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert spread(norm).tolist() == [1, 1, 1]
    assert int(norm.num_batches_tracked) == 0


@over_cases
def test_evaluation_approaches_training_as_the_average_does(name, dimension):
    norm, x = make(name, dimension, momentum=0.5), data(dimension)
    for _ in range(30):
        trained = norm(x)
    norm.eval()
    # What is left of the start after 30 steps is 2^-30 of the distance from (0, 1) to the statistics.
    mean, scale = REFERENCES[name](x.numpy(), norm.eps)
    left = 2.0**-30 * (np.abs(mean) + np.abs(scale - 1)).max() / scale.min() * trained.abs().max()
    if "running_var" in norm.running_kinds:  # evaluation uses the unbiased variance, training the biased one
        norm.running_var.mul_((elements(dimension) - 1) / elements(dimension))
        left *= 2 / scale.min()
    assert (norm(x) - trained).abs().max() <= 2 * left


@over_cases
def test_without_running_statistics_evaluation_uses_the_batch(name, dimension):
    norm, x = make(name, dimension, track_running_stats=False), data(dimension)
    assert torch.equal(norm(x), norm.eval()(x))
    assert running_statistics(norm) is None
    assert not [key for key in norm.state_dict() if "running" in key]


@over_cases
def test_constructor_state_and_copies_are_as_in_torch(name, dimension):
    cls, torch_cls = NORMS[name].classes[dimension], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1]
    for options in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}):
        ours = {key.replace("running_scale", "running_var") for key in cls(3, **options).state_dict()}
        assert ours == set(torch_cls(3, **options).state_dict())
    norm = make(name, dimension)
    norm(data(dimension))
    other = cls(3, dtype=torch.float64)
    other.load_state_dict(norm.state_dict())
    again = copy.deepcopy(norm)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
        assert torch.equal(value, again.state_dict()[key])
    assert cls(3, device="meta").weight.device.type == "meta"
    assert "eps=1e-05" in repr(norm)
    norm.reset_parameters()
    assert norm.weight.tolist() == [1, 1, 1]
    assert norm.bias.tolist() == [0, 0, 0]


@over_cases
def test_wrong_input_is_refused_as_torch_refuses_it(name, dimension):
    norm = make(name, dimension, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected .*D input \(got 6D input\)"):
        norm(torch.zeros(1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="expected 3 channels on axis 1"):
        norm(torch.zeros(2, 4, *[2] * dimension))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.zeros(1, 3, *[1] * dimension))
    norm.eval()(torch.zeros(1, 3, *[1] * dimension))


@pytest.mark.parametrize("name", NORMS)
def test_channels_last_goes_in_and_comes_out(name):
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    for training in (True, False):
        norm = make(name, 2, dtype=torch.float32).train(training)
        assert norm(x).is_contiguous(memory_format=torch.channels_last)
        assert norm(x.half()).is_contiguous(memory_format=torch.channels_last)


@over_cases
def test_explicit_half_is_followed_and_still_computed_wide(name, dimension):
    norm, x = make(name, dimension, dtype=torch.float32).half(), data(dimension, torch.float16)
    assert norm.running_mean.dtype == spread(norm).dtype == torch.float16
    wide = make(name, dimension, dtype=torch.float32)
    assert torch.equal(norm(x), wide(x))
    assert norm(x.double()).dtype == torch.float64


@over_cases
def test_large_half_inputs_stay_accurate_where_a_square_would_overflow(name, dimension):
    x = (300 * torch.randn(SHAPES[dimension], generator=torch.Generator().manual_seed(3))).half()
    norm = NORMS[name].classes[dimension](3)
    y = norm(x)
    mean, scale = REFERENCES[name](x.double().numpy(), norm.eps)
    want = reference.normalised(x.double().numpy(), mean, scale, np.ones(3), np.zeros(3))
    bound = FP16.unit_roundoff + reference.rounding_bound(FP32, elements(dimension))
    np.testing.assert_allclose(y.detach().double(), want, rtol=bound, atol=bound)


@over_cases
def test_evaluation_is_exported_with_a_dynamic_batch(name, dimension):
    norm, x = make(name, dimension, dtype=torch.float32), data(dimension, torch.float32)
    norm(x)
    model = nn.Sequential(norm).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {t for t in targets if "mean" in t or "promote" in t or "to." in t}
    other = data(dimension, torch.float32, seed=4)[:2]
    assert torch.equal(program.module()(other), model(other))


@pytest.mark.parametrize(("name", "dimension"), [case for case in CASES if case[0] in STREAMED])
def test_streamed_scale_equals_the_scale_of_everything(name, dimension):
    norm, x = make(name, dimension), data(dimension)
    mean, scale = REFERENCES[name](x.numpy(), norm.eps)
    estimator = norm.scale_estimator(torch.from_numpy(mean))
    for part in x.split(2):
        estimator.update(part)
    np.testing.assert_allclose(estimator.scale(), scale, rtol=10 * reference.rounding_bound(FP64, elements(dimension)))


def test_l1_gradients_equal_the_closed_form():
    x, upstream = data(2).requires_grad_(), data(2, seed=1)
    weight, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.5, -1.5, 2], [0.1, 0.2, 0.3]))
    y, _, _ = l1_batch_norm(x, weight, bias, 1e-3)
    y.backward(upstream)
    want = reference.l1_backward(x.detach().numpy(), upstream.numpy(), weight.detach().numpy(), 1e-3)
    for got, expected in zip((x.grad, weight.grad, bias.grad), want, strict=True):
        atol = reference.rounding_bound(FP64, elements(2)) * 10 * np.abs(expected).max()  # |x| is up to ten scales
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_l1_output_has_unit_l1_scale_for_any_distribution():
    y = L1BatchNorm1d(3, eps=0.0, dtype=torch.float64)(data(1))
    _, scale = reference.l1_statistics(y.detach().numpy(), 0.0)
    np.testing.assert_allclose(scale, np.ones(3), rtol=10 * reference.rounding_bound(FP64, elements(1)))


def test_l1_subgradient_at_the_mean_is_zero():
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    y, _, scale = l1_batch_norm(x, eps=0.0)
    y.backward(torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64))
    # g - mean(g) = (-1, 2, -1)/3 and mean(g y) = 0: no sign enters, whatever it were; now let one enter.
    torch.testing.assert_close(x.grad.flatten() * scale, torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64) / 3)
    x.grad = None
    y, _, scale = l1_batch_norm(x, eps=0.0)
    y.backward(torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64))
    # mean(g y) C = C/(3 S) = 1/2 with S = 2C/3, signs (-1, 0, 1): (-1/3 + 1/2, -1/3, 2/3 - 1/2).
    want = torch.tensor([1 / 6, -1 / 3, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(x.grad.flatten() * scale, want)


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_inference_affine_of_torchs_batch_norms(cls):
    norm = cls(3).double()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.copy_(torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert inference_affine(norm) is None
    norm.eval()
    affine = inference_affine(norm)
    x = torch.randn(4, 3, *[2] * {"1": 1, "2": 2, "3": 3}.get(cls.__name__[-2], 2), dtype=torch.float64)
    shape = (1, 3, *[1] * (x.dim() - 2))
    got = x.numpy() * affine.scale.reshape(shape) + affine.shift.reshape(shape)
    np.testing.assert_allclose(got, norm(x).detach(), rtol=0, atol=reference.rounding_bound(FP64) * np.abs(got).max())


class _Other(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_inference_affine_is_none_where_it_is_not_known():
    patched = nn.BatchNorm2d(3).eval()
    patched.forward = lambda x: x
    for module in (
        _Other(3).eval(),
        patched,
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.LazyBatchNorm2d().eval(),
        nn.LayerNorm(3).eval(),
        nn.InstanceNorm2d(3, track_running_stats=True).eval(),
        nn.Conv2d(3, 3, 1).eval(),
    ):
        assert inference_affine(module) is None


def test_is_norm_knows_the_layers_that_stay_wide():
    norms = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2)]
    ours = [family.classes[2](2) for family in NORMS.values()]
    assert all(map(is_norm, [*norms, nn.RMSNorm(2), *ours, _Other(2)]))
    assert not any(map(is_norm, [nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.Identity(), nn.ReLU()]))


def test_running_statistics_names_buffers_and_kinds():
    assert running_statistics(nn.BatchNorm2d(2)) == {"running_mean": "mean", "running_var": "variance"}
    assert running_statistics(L1BatchNorm2d(2)) == {"running_mean": "mean", "running_scale": "scale"}
    assert running_statistics(nn.InstanceNorm2d(2)) is None
    assert running_statistics(nn.InstanceNorm2d(2, track_running_stats=True))["running_var"] == "scale"
    assert running_statistics(nn.LayerNorm(2)) is None
    assert running_statistics(nn.Linear(2, 2)) is None
