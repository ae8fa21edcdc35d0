"""Statistics in true half precision: every intermediate rounded, against a numpy loop that rounds every step."""

from __future__ import annotations

import numpy as np
import pytest
import reference_norm as reference
import torch

from lowprec.errors import ConfigError
from lowprec.formats import BF16, FP16, FP32, round_to
from lowprec.norm import NORMS, inference_affine
from lowprec.norm.rounded import SUMS, naive_sum, tree_sum
from lowprec.statistics import HeldStatistics

FORMATS = {torch.float16: FP16, torch.bfloat16: BF16}
over_norms = pytest.mark.parametrize("name", NORMS)
over_sums = pytest.mark.parametrize("accumulation", SUMS)
over_dtypes = pytest.mark.parametrize("dtype", FORMATS)


def make(name, dtype=torch.float16, accumulation="tree", channels=3, **options):
    return NORMS[name].classes[2](channels, stats_dtype=dtype, accumulation=accumulation, **options)


def data(scale=1.0, shape=(5, 3, 4, 3), seed=0):
    return scale * (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp() - 0.7)


def spread(norm):
    return getattr(norm, next(name for name, kind in norm.running_kinds.items() if kind != "mean"))


@over_norms
@over_sums
@over_dtypes
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_rounded(name, accumulation, dtype, seed):
    norm, x = make(name, dtype, accumulation, momentum=1.0), data(seed=seed)
    norm(x)
    mean, value = reference.rounded_statistics(name, x.double().numpy(), norm.eps, FORMATS[dtype], accumulation)
    assert norm.running_mean.dtype == spread(norm).dtype == dtype
    if name == "topk" and accumulation == "naive":
        # The order of the k largest is torch's: k roundings of partial sums at most.
        np.testing.assert_allclose(spread(norm).double(), value, rtol=reference.rounding_bound(FORMATS[dtype], 10))
    elif name == "topk":
        np.testing.assert_allclose(spread(norm).double(), value, rtol=reference.rounding_bound(FORMATS[dtype], 4))
    else:
        np.testing.assert_array_equal(spread(norm).double(), value)
    np.testing.assert_array_equal(norm.running_mean.double(), mean)


@over_norms
def test_the_running_update_is_rounded_at_every_step(name):
    norm = make(name, momentum=0.3)
    mean, value = np.zeros(3), np.ones(3)
    for seed in range(4):
        x = data(seed=seed)
        one = make(name, momentum=1.0)
        one(x)
        new_mean, new_value = one.running_mean.double().numpy(), spread(one).double().numpy()
        mean = round_to(round_to(0.7 * mean, FP16) + round_to(0.3 * new_mean, FP16), FP16)
        value = round_to(round_to(0.7 * value, FP16) + round_to(0.3 * new_value, FP16), FP16)
        norm(x)
    np.testing.assert_array_equal(norm.running_mean.double(), mean)
    np.testing.assert_array_equal(spread(norm).double(), value)


def test_sums_round_as_their_names_say():
    ones = torch.ones(2, 5000, dtype=torch.float16)
    assert naive_sum(ones).tolist() == [2048, 2048]
    assert tree_sum(ones).tolist() == [5000, 5000]
    assert tree_sum(torch.tensor([[1.0, 2.0, 4.0]]).half()).tolist() == [7]


@over_norms
@over_sums
@pytest.mark.parametrize("value", [0.1, 7.0, -333.3, 3e-5])
def test_a_constant_channel_gives_the_bias(name, accumulation, value):
    for dtype in (torch.float16, torch.float32):
        norm = make(name, accumulation=accumulation)
        torch.nn.init.constant_(norm.bias, 0.5)
        y = norm(torch.full((5, 3, 7, 3), value, dtype=dtype))
        assert torch.equal(y, torch.full_like(y, 0.5))


@over_norms
@over_sums
def test_a_mean_does_not_overflow_where_the_sum_of_its_terms_would(name, accumulation):
    norm = make(name, accumulation=accumulation, momentum=1.0)
    value = FP16.max / 4  # 128 of them
    assert torch.equal(norm(torch.full((8, 3, 4, 4), value)), torch.zeros(8, 3, 4, 4))
    assert torch.equal(norm.running_mean, torch.full((3,), value, dtype=torch.float16))


def test_squares_overflow_where_absolute_deviations_do_not():
    x = data(300.0, (4, 3, 4, 4)).half()
    for name in NORMS:
        norm = make(name, momentum=1.0)
        norm(x)
        assert torch.isfinite(spread(norm)).all() == (name != "l2")


@over_norms
def test_the_output_uses_the_rounded_statistics_and_the_gradient_is_the_wide_one(name):
    x = data().double().requires_grad_()
    rounded, wide = make(name, eps=1e-3), NORMS[name].classes[2](3, eps=1e-3)
    upstream = data(seed=1).double()
    y = rounded(x)
    mean, value = reference.rounded_statistics(name, x.detach().numpy(), 1e-3, FP16, "tree")
    if name == "l2":
        square = round_to(reference.l2_statistics(x.detach().numpy(), 0.0)[1] ** 2, FP16)
        value = round_to(np.sqrt(square + 1e-3), FP16)
    want = reference.normalised(round_to(x.detach().numpy(), FP16), mean, value, np.ones(3), np.zeros(3))
    # A few units of half in the scale: the order of top-k's sum, the reference variance rounded once for l2.
    np.testing.assert_allclose(y.detach(), want, rtol=0, atol=8 * FP16.unit_roundoff * np.abs(want).max())
    (got,) = torch.autograd.grad(y, x, upstream)
    (expected,) = torch.autograd.grad(wide(x), x, upstream)
    # The same formula at statistics that differ by a few half roundings.
    assert (got - expected).abs().max() <= 32 * FP16.unit_roundoff * expected.abs().max()
    assert not torch.equal(got, expected)


@over_norms
def test_evaluation_and_folding_read_the_narrow_buffers(name):
    norm = make(name)
    norm(data())
    norm.eval()
    affine, x = inference_affine(norm), data(seed=2)
    want = x.double().numpy() * affine.scale.reshape(3, 1, 1) + affine.shift.reshape(3, 1, 1)
    atol = reference.rounding_bound(FP32) * np.abs(x.double().numpy() * affine.scale.reshape(3, 1, 1)).max()
    np.testing.assert_allclose(norm(x).detach().double(), want, rtol=0, atol=atol)


@over_norms
def test_held_statistics_land_as_a_plain_loop_writes_them(name):
    plain, held_norm = make(name), make(name)
    plain(data())
    held = HeldStatistics(held_norm)
    with held.forward():
        held_norm(data())
    assert spread(held_norm).tolist() == [1, 1, 1]
    held.commit()
    assert torch.equal(spread(plain), spread(held_norm))
    assert torch.equal(plain.running_mean, held_norm.running_mean)


def test_other_types_and_sums_are_refused():
    with pytest.raises(ConfigError, match=r"stats_dtype=torch.float32 is not a narrow type; use torch.float16"):
        make("l1", torch.float32)
    with pytest.raises(ConfigError, match="accumulation='kahan' is unknown; choose one of tree, naive"):
        make("l1", accumulation="kahan")
    assert "stats_dtype=torch.float16, naive sums" in repr(make("l1", accumulation="naive"))
