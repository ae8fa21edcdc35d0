"""The fused norm is an operator that compile, export, autograd and torch.func see through, and that keeps little."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from lowprec.kernels import fused_norm, operators, reference
from lowprec.kernels.layout import bits_shape
from lowprec.norm import L1BatchNorm1d, L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm1d, TopKBatchNorm2d

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def batch(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# x is (N, C, ...); each line is a layout: planes, rows, a plain (N, C), one that is neither.
LAYOUTS = {
    "planes": batch(4, 3, 5, 3),
    "rows": batch(4, 9, 3, 5).to(memory_format=torch.channels_last),
    "plain": batch(9, 17),
    "neither": batch(4, 5, 3, 6)[..., ::2],
    "one place": batch(9, 8, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_accepts_the_operators(layout, monkeypatch):
    """Schema, fake implementations, autograd registration, static and dynamic shapes through AOTAutograd."""
    for k, (relu, from_output), residual in itertools.product(
        (0, 3), ((True, True), (True, False), (False, False)), (False, True)
    ):
        if residual and from_output:
            continue
        x = LAYOUTS[layout].clone(memory_format=torch.preserve_format).requires_grad_()
        weight, bias = (torch.full((x.shape[1],), value, requires_grad=True) for value in (1.5, 0.5))
        second = torch.rand_like(x).requires_grad_() if residual else None
        forward = (x, weight, bias, second, k, 1e-5, relu, from_output)
        with torch.no_grad():
            y, mean, scale, bits, extremes = torch.ops.lowprec.norm(*forward)
        assert bits.shape == (bits_shape(x) if relu and (from_output <= (k == 0)) else (0,))
        kept = y if from_output else x.detach()
        backward = (torch.rand_like(y), kept, mean, scale, bits, extremes, weight.detach(), bias.detach())
        options = (torch.rand_like(mean), torch.rand_like(scale), k, relu, from_output, residual)
        few = CHECKS[:3] if (k == 0) == residual else CHECKS  # through AOTAutograd: a quarter of a second each
        torch.library.opcheck(torch.ops.lowprec.norm_backward, (*backward, *options), test_utils=few)
        torch.library.opcheck(torch.ops.lowprec.norm, forward, test_utils=few)
        with monkeypatch.context() as patch:  # the same fakes stand for both implementations
            patch.setattr(operators, "_kernels", lambda *args: reference)
            torch.library.opcheck(torch.ops.lowprec.norm, forward, test_utils="test_faketensor")
            torch.library.opcheck(torch.ops.lowprec.norm_backward, (*backward, *options), test_utils="test_faketensor")


def stepped(run, model, x):
    """y and all gradients of one training step."""
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(x)
    (y * batch(*y.shape, seed=1, dtype=y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d])
def test_a_compiled_norm_computes_the_same_in_one_graph(layer, dtype):
    torch._dynamo.reset()
    model = layer(3, relu=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in (batch(4, 3, 5, 5, dtype=dtype), batch(8, 3, 5, 5, dtype=dtype)):
        running = model.running_mean.clone(), model.running_scale.clone()
        found = stepped(compiled, model, x)
        moved = model.running_mean.clone(), model.running_scale.clone()
        model.running_mean.copy_(running[0]), model.running_scale.copy_(running[1])
        # A compiled graph holds the keep-input backward until an eager forward has chosen: the same choice here.
        model._backward_choice.review = lambda *args: False
        for one, other in zip(found, stepped(model, model, x), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(moved[0], model.running_mean)
        assert torch.equal(moved[1], model.running_scale)
        del model._backward_choice.review


@pytest.mark.filterwarnings("ignore")  # the compiler's own deprecations
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
def test_generated_code_around_it_computes_the_same():
    """Inductor chooses its own strides for what it generates; the operators ask for theirs."""
    torch._dynamo.reset()
    model = nn.Sequential(L1BatchNorm2d(4, relu=True), nn.MaxPool2d(2), L1BatchNorm2d(4, relu=True))
    x = batch(2, 4, 6, 6).to(memory_format=torch.channels_last)
    compiled = torch.compile(lambda x: model(x * 2) + 1, fullgraph=True)
    for norm in (model[0], model[2]):
        norm._backward_choice.review = lambda *args: False
    found = stepped(compiled, model, x), stepped(lambda x: model(x * 2) + 1, model, x)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # products by 2, a maximum and sums of one term: the same roundings
        assert one.stride() == other.stride()


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_training_norm_shows_one_operator(strict):
    program = torch.export.export(nn.Sequential(L1BatchNorm2d(3, relu=True)), (batch(4, 3, 5, 5),), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.lowprec.norm.default) == 1
    assert not any("mean" in str(call) or "relu" in str(call) for call in calls)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("mode", ["relu", "from output", "residual", "norm"])
def test_it_can_be_differentiated_twice(k, mode):
    x, residual = batch(5, 2, 3, dtype=torch.float64), batch(5, 2, 3, seed=1, dtype=torch.float64)
    weight, bias = torch.tensor([1.5, -0.5], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias, *([residual] if mode == "residual" else []))]

    def run(*args):
        out = fused_norm(*args, k=k, relu=mode != "norm", from_output=mode == "from output")
        return out.y, out.mean, out.scale

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, at the first dual number
@pytest.mark.parametrize("layer", [L1BatchNorm1d, TopKBatchNorm1d])
def test_vmap_and_forward_mode_take_the_composed_way(layer, monkeypatch):
    norm = layer(3, track_running_stats=False, relu=True).double()
    x, along = batch(4, 6, 3, dtype=torch.float64), batch(6, 3, seed=1, dtype=torch.float64)
    each = torch.stack([norm(one) for one in x])
    one = x[0].clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(value, one, retain_graph=True)[0] for value in norm(one).flatten()])
    monkeypatch.setattr(
        "lowprec.norm.absolute.fused_norm", lambda *args, **options: pytest.fail("the operator was used")
    )
    # The same sums in another order: a dozen float64 roundings of values of order 1.
    torch.testing.assert_close(torch.func.vmap(norm)(x), each, rtol=0, atol=1e-14)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x[0], along))).tangent
    torch.testing.assert_close(tangent.flatten(), rows.flatten(1) @ along.flatten(), rtol=0, atol=1e-13)


def kept_storages(model, x):
    """{address: bytes} of what a training forward keeps for its backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return kept, y


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d])
def test_little_more_than_half_of_batch_norm_and_relu_is_kept(layer, dtype, memory_format):
    """BatchNorm + ReLU keeps x and y. Here y and one bit an element: (1 + 1/16) / 2 = 0.53 in half, 0.516 in float32,
    and no more than statistics and positions beside, a few numbers a channel."""
    x = batch(8, 16, 20, 20, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    ours, y = kept_storages(layer(16, relu=True), x)
    theirs, _ = kept_storages(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()), x)
    assert x.untyped_storage().data_ptr() not in ours
    assert y.untyped_storage().data_ptr() in ours  # what the next layer keeps anyway
    assert sum(ours.values()) <= 0.55 * sum(theirs.values())


def test_with_a_residual_the_input_and_one_bit_an_element_are_kept():
    x, residual = batch(8, 16, 20, 20).requires_grad_(), batch(8, 16, 20, 20, seed=1).requires_grad_()
    norm = L1BatchNorm2d(16, relu=True)
    kept, y = kept_storages(lambda x: norm(x, residual), x)
    assert x.untyped_storage().data_ptr() in kept
    assert not {t.untyped_storage().data_ptr() for t in (y, residual)} & set(kept)
    assert sum(kept.values()) <= x.nbytes + x.numel() // 8 + 4 * 4 * 16  # mean, scale, weight, bias


@pytest.mark.parametrize("place", ["before", "after"])
def test_writing_over_what_backward_needs_is_noticed(place):
    norm = L1BatchNorm2d(3, relu=True)
    with torch.no_grad():
        norm.weight.fill_(1.0 if place == "after" else 0.0)  # 0: the input is kept
    x = batch(4, 3, 5, 5).requires_grad_() * 1
    y = norm(x)
    (x if place == "before" else y).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
