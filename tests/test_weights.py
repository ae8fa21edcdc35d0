"""Weight maps against numpy: norms per output channel, bounds, gains, centring, in float64 and in half."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_norm
import reference_weights as reference
import torch
from reference_norm import rounding_bound
from torch import nn

from lowprec.formats import FP16, FP32, FP64
from lowprec.weights import (
    bounded_weight,
    centre_,
    gained_weight,
    initial_bound,
    initial_gain,
    is_centred,
    output_rows,
    row_norms,
    scale_update,
    scale_weight,
)

# layer, its groups, whether axis 0 counts inputs
LAYERS = {
    "linear": (lambda: nn.Linear(7, 4), 1, False),
    "embedding": (lambda: nn.Embedding(5, 6), 1, False),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 1, False),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2, False),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), 4, False),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), 1, False),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 1, True),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 2, True),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), 4, True),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), 1, True),
}
over_layers = pytest.mark.parametrize("kind", LAYERS)
NORMS = {"1": (1.0, None), "2": (2.0, None), "inf": (math.inf, None), "top-3": (math.inf, 3), "top-99": (math.inf, 99)}
over_norms = pytest.mark.parametrize(("p", "k"), NORMS.values(), ids=NORMS)


def weight_of(kind):
    make, groups, transposed = LAYERS[kind]
    torch.manual_seed(0)
    return make().double().weight.detach(), groups, transposed


def rows_of(weight, groups, transposed):
    return reference_norm.rows(weight.detach().double().numpy(), groups, transposed)


@over_norms
@over_layers
def test_every_output_channel_gets_the_bound_and_keeps_its_direction(kind, p, k):
    v, groups, transposed = weight_of(kind)
    w = bounded_weight(v, 2.5, groups, transposed, p=p, k=k)
    for got, row in zip(rows_of(w, groups, transposed), rows_of(v, groups, transposed), strict=True):
        rtol = rounding_bound(FP64, len(row))
        np.testing.assert_allclose(got, 2.5 * row / reference.norm(row, p, k), rtol=rtol)
        np.testing.assert_allclose(reference.norm(got, p, k), 2.5, rtol=2 * rtol)


@over_norms
@over_layers
def test_gradient_of_the_bounded_weight_is_the_closed_form_and_orthogonal_to_the_row(kind, p, k):
    v, groups, transposed = weight_of(kind)
    v.requires_grad_()
    upstream = torch.randn_like(v)
    bounded_weight(v, 1.5, groups, transposed, p=p, k=k).backward(upstream)
    for row, g, got in zip(*(rows_of(t, groups, transposed) for t in (v, upstream, v.grad)), strict=True):
        want = reference.bounded_gradient(row, g, 1.5, p, k)
        # Two terms that may cancel: relative to the larger of them.
        size = 1.5 / reference.norm(row, p, k) * (np.abs(g).max() + np.abs(row * g).sum() / reference.norm(row, p, k))
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding_bound(FP64, len(row)) * size)
        assert abs(float(row @ got)) <= rounding_bound(FP64, 2 * len(row)) * np.abs(row).sum() * size


@over_norms
def test_gradients_of_gradients_exist(p, k):
    v = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gain = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).add(0.5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: bounded_weight(value, 1.5, p=p, k=k), (v,))
    assert torch.autograd.gradgradcheck(lambda value, g: gained_weight(value, g, 2.0, p=p, k=k), (v, gain))


@over_norms
@over_layers
def test_gained_weight_bounds_the_layer_and_its_gradients_are_the_closed_forms(kind, p, k):
    v, groups, transposed = weight_of(kind)
    rows = rows_of(v, groups, transposed)
    v.requires_grad_()
    gain = torch.linspace(0.5, 2, len(rows), dtype=torch.float64, requires_grad=True)
    w = gained_weight(v, gain, 3.0, groups, transposed, p=p, k=k)
    sizes = [reference.norm(row, p, k) for row in rows_of(w, groups, transposed)]
    share = gain.detach().numpy() / np.linalg.norm(gain.detach().numpy())
    rtol = rounding_bound(FP64, v.numel())
    np.testing.assert_allclose(sizes, 3.0 * share, rtol=rtol)
    np.testing.assert_allclose(math.fsum(size**2 for size in sizes), 9.0, rtol=2 * rtol)
    upstream = torch.randn_like(v)
    w.backward(upstream)
    got, g = rows_of(v.grad, groups, transposed), rows_of(upstream, groups, transposed)
    by_v, by_gain = reference.gained_gradients(rows, g, gain.detach().numpy(), 3.0, p, k)
    for mine, want, row in zip(got, by_v, rows, strict=True):
        atol = rtol * np.abs(upstream.numpy()).sum() * 3.0 / reference.norm(row, p, k)
        np.testing.assert_allclose(mine, want, rtol=0, atol=atol)
    np.testing.assert_allclose(gain.grad, by_gain, rtol=0, atol=rtol * np.abs(upstream.numpy()).sum() * 3.0)


@over_norms
@over_layers
def test_initial_bound_and_gain_give_the_weight_back(kind, p, k):
    v, groups, transposed = weight_of(kind)
    sizes = [reference.norm(row, p, k) for row in rows_of(v, groups, transposed)]
    rtol = rounding_bound(FP64, v.numel())
    rho = initial_bound(v, groups, transposed, p=p, k=k)
    np.testing.assert_allclose(rho, math.sqrt(math.fsum(s * s for s in sizes) / len(sizes)), rtol=rtol)
    gain = initial_gain(v, groups, transposed, p=p, k=k)
    np.testing.assert_allclose(gain, sizes, rtol=rtol)
    again = gained_weight(v, gain, torch.linalg.vector_norm(gain), groups, transposed, p=p, k=k)
    np.testing.assert_allclose(again, v, rtol=rtol)
    if (p, k) == (2.0, None):
        np.testing.assert_allclose(rho, np.linalg.norm(v.flatten()) / math.sqrt(len(sizes)), rtol=rtol)


@over_norms
def test_a_row_of_zeros_stays_zero_and_gets_a_finite_gradient(p, k):
    v = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    w = bounded_weight(v, 2.0, p=p, k=k)
    np.testing.assert_array_equal(w.detach()[0], [0, 0])
    w.backward(torch.ones_like(w))
    assert v.grad[0].tolist() == [2.0, 2.0]  # rho * dL/dw
    assert torch.isfinite(v.grad).all()
    gain = initial_gain(v.detach(), p=p, k=k)
    assert gain[0] == gain[1]
    v.grad = None
    gained_weight(v, gain, torch.linalg.vector_norm(gain), p=p, k=k).backward(torch.ones_like(w))
    assert bool(v.grad[0].all())
    assert torch.isfinite(v.grad).all()


def test_ties_at_the_maximum_share_the_gradient_or_go_to_the_chosen_ones():
    rows = torch.tensor([[2.0, -2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    row_norms(rows, (1,), math.inf).sum().backward()
    assert rows.grad.tolist() == [[0.5, -0.5, 0.0]]
    rows.grad = None
    row_norms(rows, (1,), math.inf, 1).sum().backward()
    assert rows.grad.abs().sum() == 1


@over_norms
def test_norms_of_half_weights_are_wide(p, k):
    # Squares of 4e-5 vanish in half and those of 1e-4 are subnormal; a half sum of 70000 ones overflows. With equal
    # values every norm is known.
    for value, length in ((4e-5, 25088), (1e-4, 64), (1.0, 70000)):
        v = torch.full((1, length), value, dtype=torch.float16)
        w = bounded_weight(v, 8.0, p=p, k=k)
        want = {1.0: 8.0 / length, 2.0: 8.0 / math.sqrt(length), math.inf: 8.0}[p]
        assert w.dtype == torch.float16
        # The rounding of the result and as much for the float32 sum; below half's normal range half a subnormal step.
        np.testing.assert_allclose(w.double(), np.full((1, length), want), rtol=2 * FP16.unit_roundoff, atol=2.0**-25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_centring_in_place_takes_the_mean_of_each_row_whatever_the_memory(dtype):
    fmt = {torch.float64: FP64, torch.float32: FP32, torch.float16: FP16}[dtype]
    weights = [torch.randn(5, 4, 3, 3, dtype=torch.float64) + 3, torch.randn(2, 7, dtype=torch.float64)]
    held = [weights[0].to(dtype, memory_format=torch.channels_last), weights[1].to(dtype)]
    before = [weight.double().flatten(1).numpy() for weight in held]
    assert not is_centred(held[0])
    centre_(held)
    for got, rows in zip(held, before, strict=True):
        want = rows - rows.mean(1, keepdims=True)
        atol = rounding_bound(fmt, rows.shape[1]) * np.abs(rows).max()
        np.testing.assert_allclose(got.double().flatten(1), want, rtol=0, atol=atol)
        assert is_centred(got)
    centre_([])


def test_a_wide_scalar_gets_a_wide_gradient_from_half_weights():
    weight = torch.linspace(0.5, 1.5, 4097).half()
    factor = torch.tensor(1 / 3 + 1e-5, requires_grad=True)
    product = scale_weight(weight, factor)
    assert product.dtype == torch.float16
    assert torch.equal(product, (weight.float() * factor.detach()).half())
    product.sum().backward()
    np.testing.assert_allclose(factor.grad, weight.double().sum(), rtol=rounding_bound(FP32, 4097))
    assert factor.grad != factor.grad.half()  # half has no such number


@over_layers
def test_an_update_is_scaled_per_output_channel(kind):
    before, groups, transposed = weight_of(kind)
    after = before + 1
    rows, axes = output_rows(before, groups, transposed)
    norms = row_norms(rows, axes)
    got = scale_update(before, after, norms, groups, transposed)
    for mine, row in zip(rows_of(got, groups, transposed), rows_of(before, groups, transposed), strict=True):
        np.testing.assert_allclose(mine, row + reference.norm(row, 2.0, None), rtol=rounding_bound(FP64, len(row)))
