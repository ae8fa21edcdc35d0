"""The convolution with a scalar: the same numbers as autograd's own, without a copy of the weight kept."""

from __future__ import annotations

import copy

import pytest
import reference_norm as reference
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowprec.formats import FP16, FP32
from lowprec.methods import layers
from lowprec.methods.layers import branch_conv
from lowprec.precision.arithmetic import HalfArithmetic

CASES = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 9, 8)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "padding by name": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 8)),
    "no batch axis": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
}
over_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(case, dtype):
    conv, shape = CASES[case]
    return branch_conv(copy.deepcopy(conv).to(dtype), 0.7), torch.randn(shape, dtype=dtype)


def gradients(conv, x, monkeypatch, plain, **autocast):
    if plain:
        monkeypatch.setattr(layers, "kernels_apply", lambda x: False)
    x = x.clone().requires_grad_(True)
    mode = HalfArithmetic(**autocast)
    with mode if autocast or x.dtype == torch.float16 else torch.enable_grad():
        y = conv(x)
    params = list(conv.parameters())
    upstream = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    found = torch.autograd.grad(y, [x, *params], upstream)
    monkeypatch.undo()
    return [y.detach(), *found]


@over_cases
def test_it_is_the_convolution_times_the_scalar(case):
    conv, x = made(case, torch.float64)
    plain = CASES[case][0]
    reference.close(conv(x).detach(), (0.7 * copy.deepcopy(plain).double()(x)).detach().numpy())


@over_cases
@pytest.mark.parametrize("kind", ["float32", "half", "autocast"])
def test_values_and_gradients_are_those_of_autograd(case, kind, monkeypatch):
    conv, x = made(case, torch.float16 if kind == "half" else torch.float32)
    if kind == "half":
        conv.branch_scale.data = conv.branch_scale.data.float()
    options = {"autocast": True} if kind == "autocast" else {}
    ours = gradients(conv, x, monkeypatch, plain=False, **options)
    want = gradients(conv, x, monkeypatch, plain=True, **options)
    names = ["output", "input", *(name for name, _ in conv.named_parameters())]
    for name, one, other in zip(names, ours, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        if name == "branch_scale":  # <gradient of the scaled parameter, parameter>, summed in another order
            pairs = zip(conv.parameters(), want[2:], strict=True)
            terms = sum(float((param.detach().float() * grad.float() / 0.7).abs().sum()) for param, grad in pairs)
            assert (one - other).abs() <= reference.rounding_bound(FP32, conv.weight.numel() + 6) * terms
        else:
            fmt = FP32 if kind == "float32" else FP16
            # One rounding of sums of at most 200 products in float32, in whichever order.
            torch.testing.assert_close(one, other, rtol=fmt.eps, atol=float(other.abs().max()) * FP32.eps * 200)


@over_cases
def test_the_gradient_is_that_of_the_function_twice(case):
    conv, x = made(case, torch.float64)
    tensors = [x.requires_grad_(True), conv.weight, conv.branch_scale]

    def function(x, weight, scale):
        return torch.func.functional_call(conv, {"weight": weight, "branch_scale": scale}, (x,))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize(
    ("frozen", "case"),
    [("weight", "2d"), ("weight", "groups"), ("bias", "groups"), ("branch_scale", "groups"), ("input", "groups")],
)
def test_what_needs_no_gradient_gets_none_and_the_rest_stays_right(frozen, case, monkeypatch):
    conv, x = made(case, torch.float64)
    found = {}
    for plain in (False, True):
        one, leaf = copy.deepcopy(conv), x.clone().requires_grad_(frozen != "input")
        if frozen != "input":
            getattr(one, frozen).requires_grad_(False)
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(layers, "kernels_apply", lambda x: False)
            one(leaf).square().sum().backward()
        found[plain] = {"input": leaf.grad, **{name: param.grad for name, param in one.named_parameters()}}
    assert found[False][frozen] is None
    for name, grad in found[True].items():
        if grad is not None:
            reference.close(found[False][name], grad)


def test_only_the_input_is_kept():
    conv, x = made("2d", torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = conv(x.requires_grad_(True))
    own = {param.data_ptr() for param in conv.parameters()}
    assert [tensor.data_ptr() for tensor in kept if tensor.data_ptr() not in own] == [x.data_ptr()]
    y.sum().backward()


def test_under_checkpointing_compile_and_vmap_it_is_the_same():
    conv, x = made("2d", torch.float32)
    want = conv(x)
    assert torch.equal(checkpoint(conv, x.clone().requires_grad_(True), use_reentrant=False), want)
    per_sample = torch.func.vmap(lambda one: conv(one[None])[0])(x)
    torch.testing.assert_close(per_sample, want)
    program = torch.export.export(conv, (x,))
    assert torch.equal(program.module()(x), want)
