"""The backward starts from the output where that is accurate, and only there; when the choice is taken."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowprec.kernels import BackwardChoice, choice, fused_norm, output_suffices
from lowprec.norm import L1BatchNorm2d, TopKBatchNorm2d
from tests.reference_kernels import Problem, rows, solve

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SINGLE = 2.0**-24  # unit roundoff of the arithmetic


def smallest_weight(dtype, bias):
    """The smallest float32 weight that the bound lets pass: |w| > L u (|w| + |b|), solved for |w|, one step on."""
    share = choice.LIMIT * HALVES[dtype]
    weight = torch.tensor([share / (1 - share) * bias])
    while not output_suffices(weight, torch.tensor([bias]), dtype):
        weight = weight.nextafter(torch.tensor(1e9))
    return weight


def run(dtype, weight, bias, k, from_output):
    """(answer in float64, y, dx, dweight) of one channel of norm + ReLU with 4096 elements."""
    random = torch.Generator().manual_seed(0)
    x, g = (torch.randn(16, 1, 16, 16, generator=random) for _ in range(2))
    g = (g + x).to(dtype)  # so that dweight is not a sum of nothing but chance
    x = x.to(dtype).requires_grad_()
    weight_C, bias_C = weight.clone().requires_grad_(), torch.tensor([bias])
    y = fused_norm(x, weight_C, bias_C, k=k, relu=True, from_output=from_output).y
    y.backward(g)
    values = (rows(t.detach().double().numpy()) for t in (x, g))
    ask = Problem(*values, weight.double().numpy(), bias_C.double().numpy(), k=k, relu=True)
    want = solve(ask)
    return ask, want, *(rows(t.detach().double().numpy()) for t in (y, x.grad)), float(weight_C.grad[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("k", [0, 10])
@pytest.mark.parametrize("dtype", HALVES)
def test_at_the_limit_the_error_is_what_the_bound_says(dtype, k, sign):
    """(z - b) / w is d / S to 1/64 of max(1, |d / S|); the gradients are off by what follows from that."""
    weight = smallest_weight(dtype, 1.0)
    ask, want, y, dx, dweight = run(dtype, sign * weight, 1.0, k, from_output=True)
    assert weight < {torch.bfloat16: 0.334, torch.float16: 0.0323}[dtype]  # 1/4 / (1 - 1/4), 1/32 / (1 - 1/32)
    unit = want.d / want.scale
    seen = y > 0
    # The docstring counts the rounding of z, u; float32 arithmetic adds at most 8 of its own to each z.
    off = (1 + 8 * SINGLE / HALVES[dtype]) / choice.LIMIT * np.maximum(1, np.abs(unit))
    error = np.abs((y - 1) / ask.w - unit)
    assert (error <= off)[seen].all()
    assert error[seen].max() > 1 / choice.LIMIT / 8  # and the bound is not idle
    g = np.where(seen, np.abs(ask.g), 0)
    # sum(g d / S) with each d / S off by that, and a float32 sum of n terms, weight-times cancelled.
    sums = ask.x.shape[1] * SINGLE * (g * (y + 1)).sum() / float(weight)
    off_dweight = (g * off).sum() + sums
    assert abs(dweight - want.dweight[0]) <= off_dweight
    # dx = w / S (g - A / n) - T / S dS/dx with T = w dweight, |dS/dx| <= C (1 / used + 1 / n); dx itself is rounded.
    share = ask.constant * (1 / ask.used + 1 / ask.x.shape[1])
    arithmetic = 64 * SINGLE * (float(weight) / want.scale * (g + g.mean() + share * (g * np.abs(unit)).sum()))
    off_dx = float(weight) / want.scale * off_dweight * share + HALVES[dtype] * np.abs(want.dx) + arithmetic
    assert (np.abs(dx - want.dx) <= off_dx).all()


@pytest.mark.parametrize("k", [0, 10])
def test_far_below_the_limit_the_output_would_be_wrong_and_the_input_is_right(k):
    """Why there are two backwards: weight 1e-3, bias 1 in bfloat16, where all of z is one of a few values."""
    weight = torch.tensor([1e-3])
    assert not output_suffices(weight, torch.ones(1), torch.bfloat16)
    _, want, _, _, from_output = run(torch.bfloat16, weight, 1.0, k, from_output=True)
    ask, _, _, _, from_input = run(torch.bfloat16, weight, 1.0, k, from_output=False)
    n = ask.x.shape[1]
    assert abs(from_output - want.dweight[0]) > 0.5 * abs(want.dweight[0])
    # A float32 sum of n terms, and d and S about a mean and a scale that are such sums.
    off = 4 * n * SINGLE * (np.abs(ask.g * want.d).sum() + np.abs(ask.g).sum()) / want.scale[0, 0]
    assert off < 0.05 * abs(want.dweight[0])
    assert abs(from_input - want.dweight[0]) <= off


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_the_bound_is_taken_over_all_channels(compiled, monkeypatch):
    if not compiled:  # what runs on other devices, and where there is no compiled library
        monkeypatch.setattr(choice.native, "output_suffices", lambda *args: None)
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert output_suffices(None, None, torch.bfloat16)
    assert output_suffices(ones, None, torch.bfloat16)
    assert output_suffices(1e-6 * ones, zeros, torch.bfloat16)
    assert not output_suffices(None, ones, torch.bfloat16)
    for bad in (0.0, 1e-3, float("nan"), float("inf")):
        weight = torch.tensor([1.0, bad, -1.0])
        assert not output_suffices(weight, ones, torch.bfloat16)
    assert not output_suffices(torch.tensor([1.0, 0.0]), None, torch.float64)
    # L u (1 + |b|) at weight 1: bfloat16 to |b| < 3, float16 to 31, float32 to 2^18 - 1.
    for dtype, most in ((torch.bfloat16, 3), (torch.float16, 31), (torch.float32, 2**18 - 1)):
        assert not output_suffices(torch.ones(1), torch.tensor([-float(most)]), dtype)
        assert output_suffices(torch.ones(1), torch.tensor([-most * 0.99]), dtype)


@pytest.mark.parametrize("layer", [L1BatchNorm2d, TopKBatchNorm2d])
def test_on_a_cpu_every_training_forward_chooses(layer):
    norm = layer(3, relu=True)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def keeps_its_input():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            norm(x)
        return x.data_ptr() in kept

    for weight, keeps in ((1.0, False), (0.0, True), (0.0, True), (1.0, False), (1e-9, True)):
        with torch.no_grad():
            norm.weight[1] = weight
            norm.bias[1] = 1.0
        assert keeps_its_input() == keeps


def test_nothing_is_chosen_before_the_first_forward(monkeypatch):
    """Parameters are loaded, or filled on the device, after construction: a choice from them would be stale."""
    read = []
    monkeypatch.setattr(choice, "output_suffices", lambda *args: read.append(args) or True)
    norm = L1BatchNorm2d(3, relu=True)
    norm.load_state_dict({**norm.state_dict(), "weight": torch.zeros(3)})
    norm.eval()(torch.randn(4, 3, 5, 5))
    assert not read
    assert not norm._backward_choice.from_output
    norm.train()(torch.randn(4, 3, 5, 5))
    assert len(read) == 1


def test_on_another_device_only_every_so_many_forwards_read_the_parameters(monkeypatch):
    answers = []
    monkeypatch.setattr(choice, "output_suffices", lambda *args: answers.append(len(answers) % 2 == 0) or answers[-1])
    made = BackwardChoice()
    x = SimpleNamespace(device=torch.device("cuda"), is_cuda=False, dtype=torch.float16)
    found = [made.review(None, None, x) for _ in range(3 * choice.REVIEW_EVERY)]
    assert answers == [True, False, True]
    assert found == [True] * choice.REVIEW_EVERY + [False] * choice.REVIEW_EVERY + [True] * choice.REVIEW_EVERY


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    """Reading the parameters waits for the device, which a capture forbids."""
    monkeypatch.setattr(choice, "output_suffices", lambda *args: pytest.fail("the parameters were read"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=torch.float16)
    assert not BackwardChoice().review(None, None, x)


def test_a_compiled_graph_holds_the_choice_and_a_new_choice_traces_again():
    torch._dynamo.reset()
    held = []

    def backend(graph, example_inputs):
        held.extend(node.args[7] for node in graph.graph.nodes if node.target is torch.ops.lowprec.norm)
        return graph.forward

    norm = L1BatchNorm2d(3, relu=True)
    compiled = torch.compile(norm, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    compiled(x)
    assert held == [False]  # nothing chosen yet: the input
    norm(x)
    compiled(x)
    assert held == [False, True]
    with torch.no_grad():
        norm.weight.zero_()
    compiled(x)
    assert held == [False, True]
    norm(x)
    compiled(x)
    assert not norm._backward_choice.from_output
    assert held == [False, True]  # the first graph fits again
