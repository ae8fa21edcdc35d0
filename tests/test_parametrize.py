"""Weight maps against numpy, and bounded weight norm on layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn

from lowprec.errors import UnsupportedError
from lowprec.formats import FP16, FP32, FP64
from lowprec.functional import bounded_weight, centre_weight, initial_bound, scale_weight
from lowprec.parametrize import register_bounded_weight_norm

# layer, its groups, whether axis 0 counts inputs
LAYERS = {
    "linear": (lambda: nn.Linear(7, 4), 1, False),
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


def weight_of(kind):
    make, groups, transposed = LAYERS[kind]
    torch.manual_seed(0)
    return make().double().weight.detach(), groups, transposed


@over_layers
def test_bounded_weight_gives_every_output_channel_its_norm_and_direction(kind):
    v, groups, transposed = weight_of(kind)
    w = bounded_weight(v, 2.5, groups, transposed)
    pairs = zip(
        reference.rows(w.numpy(), groups, transposed), reference.rows(v.numpy(), groups, transposed), strict=True
    )
    for got, row in pairs:
        bound = reference.rounding_bound(FP64, len(row))
        np.testing.assert_allclose(got, 2.5 * row / np.sqrt(np.sum(row * row)), rtol=bound)


@over_layers
def test_centred_weight_has_no_mean_per_output_channel(kind):
    v, groups, transposed = weight_of(kind)
    w = centre_weight(v + 3, groups, transposed)
    pairs = zip(
        reference.rows(w.numpy(), groups, transposed), reference.rows(v.numpy(), groups, transposed), strict=True
    )
    for got, row in pairs:
        atol = reference.rounding_bound(FP64, len(row)) * 4  # values up to 3 + 1
        np.testing.assert_allclose(got, row - np.mean(row), rtol=0, atol=atol)
    again = centre_weight(w, groups, transposed)
    torch.testing.assert_close(again, w, rtol=0, atol=reference.rounding_bound(FP64, v.numel()))


@over_layers
def test_gradient_of_bounded_weight_is_exact_and_orthogonal_to_the_row(kind):
    v, groups, transposed = weight_of(kind)
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda value: bounded_weight(value, 1.5, groups, transposed), (v,))
    upstream = torch.randn_like(v)
    bounded_weight(v, 1.5, groups, transposed).backward(upstream)
    rows = [reference.rows(value.numpy(), groups, transposed) for value in (v.detach(), v.grad)]
    for row, gradient in zip(*rows, strict=True):
        bound = reference.rounding_bound(FP64, len(row)) * np.abs(row).max() * np.abs(gradient).sum() * 4
        assert abs(float(row @ gradient)) <= bound


def test_a_row_of_zeros_stays_zero_and_gets_a_finite_gradient():
    v = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    w = bounded_weight(v, 2.0)
    torch.testing.assert_close(w.detach(), torch.tensor([[0.0, 0.0], [1.2, 1.6]], dtype=torch.float64))
    w.backward(torch.ones_like(w))
    assert v.grad[0].tolist() == [2.0, 2.0]  # rho * dL/dw
    assert torch.isfinite(v.grad).all()


def test_norms_of_half_weights_are_wide():
    # Squares of 1e-4 vanish in half; 70000 ones overflow it.
    for value, length in ((1e-4, 64), (1.0, 70000)):
        v = torch.full((1, length), value, dtype=torch.float16)
        w = bounded_weight(v, 8.0)
        want = 8.0 / np.sqrt(length)
        assert w.dtype == torch.float16
        np.testing.assert_allclose(w.double(), np.full((1, length), want), rtol=2 * FP16.unit_roundoff)


def test_a_wide_scalar_gets_a_wide_gradient_from_half_weights():
    weight = torch.linspace(0.5, 1.5, 4097).half()
    factor = torch.tensor(1 / 3 + 1e-5, requires_grad=True)
    product = scale_weight(weight, factor)
    assert product.dtype == torch.float16
    assert torch.equal(product, (weight.float() * factor.detach()).half())
    product.sum().backward()
    np.testing.assert_allclose(factor.grad, weight.double().sum(), rtol=reference.rounding_bound(FP32, 4097))
    assert factor.grad != factor.grad.half()  # half has no such number


@over_layers
def test_registration_keeps_the_frobenius_norm_and_the_parameter(kind):
    make, groups, transposed = LAYERS[kind]
    layer = make()
    parameter, before = layer.weight, layer.weight.detach().double().norm()
    rho = register_bounded_weight_norm(layer)
    assert layer.parametrizations.weight.original is parameter
    bound = reference.rounding_bound(FP32, parameter.numel())
    np.testing.assert_allclose(layer.weight.detach().double().norm(), before, rtol=bound)
    for row in reference.rows(layer.weight.detach().double().numpy(), groups, transposed):
        np.testing.assert_allclose(np.linalg.norm(row), float(rho), rtol=bound)
    assert float(initial_bound(parameter.detach(), groups, transposed)) == float(rho)
    assert layer.parametrizations.weight[0].wide_parameters == ("rho",)


def test_row_norms_stay_through_training_and_copies_and_state():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    rho = register_bounded_weight_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        layer(torch.randn(4, 2, 5, 5)).square().mean().backward()
        optimizer.step()
    norms = layer.weight.detach().double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(norms, np.full(3, float(rho)), rtol=reference.rounding_bound(FP32, 18))
    twin = copy.deepcopy(layer)
    fresh = nn.Conv2d(2, 3, 3)
    register_bounded_weight_norm(fresh)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(fresh.weight, layer.weight)


def test_refusals_say_why():
    zeros, double, lazy = nn.Linear(2, 2), nn.Linear(2, 2), nn.LazyLinear(2)
    infinite = nn.Linear(2, 2)
    nn.init.zeros_(zeros.weight)
    nn.init.constant_(infinite.weight, torch.inf)
    register_bounded_weight_norm(double)
    for layer, reason in (
        (zeros, "all zeros"),
        (double, "parametrised already"),
        (lazy, "lazy"),
        (infinite, "not finite"),
        (nn.ReLU(), "neither a linear nor a convolution"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            register_bounded_weight_norm(layer)
