"""Every implementation of the fused norm computes the definition, within bounds that its arithmetic explains."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lowprec.kernels import fused_norm, native, operators, reference
from lowprec.kernels.layout import bits_shape, is_rows, pack, unpack
from tests.kernel_cases import (
    DTYPES,
    KS,
    MODES,
    SHAPES,
    assert_within,
    name_of,
    problem,
    solved,
    strides,
    tensor,
)
from tests.reference_kernels import Problem, bounds, forward, rows, solve

IMPLEMENTATIONS = ("reference", "portable", "avx2", "avx512")  # the last three: compiled, by instruction set


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """Makes the operators run one implementation whatever the tensors; its name."""
    if request.param == "reference":
        monkeypatch.setattr(operators, "_kernels", lambda *args: reference)
        yield request.param
        return
    if (reason := native.why_not()) is not None:
        pytest.skip(reason)
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor does not have {request.param}")
    monkeypatch.setattr(operators, "_kernels", lambda *args: native)
    with native.use(request.param):
        yield request.param


def left_to_the_reference(implementation, dtype):
    """Whether the compiled kernels have nothing to do with `dtype`, and say so."""
    left = implementation != "reference" and dtype == torch.float64
    assert not left or not native.can_run(torch.zeros(2, 1, dtype=dtype), 0)
    return left


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_values_and_gradients_are_those_of_the_definition(implementation, shape, dtype):
    if left_to_the_reference(implementation, dtype):
        return
    for seed, (k, (title, mode)) in enumerate(itertools.product(KS, MODES.items())):
        ask, want, off = problem(shape, dtype, k, mode, seed)
        for layout in ("planes", "rows") if len(shape) > 2 else ("planes",):
            where = f"k={k} {title} {layout} "
            out, grad, x = solved(ask, shape, dtype, mode, layout)
            assert_within(out.mean, want.mean, off.mean, where + "mean")
            assert_within(out.scale, want.scale, off.scale, where + "scale")
            assert_within(out.y, want.y, off.y, where + "y", shape)
            assert_within(grad["x"], want.dx, off.dx, where + "dx", shape)
            assert strides(out.y) == strides(grad["x"]) == strides(x)
            if ask.weight is not None:
                assert_within(grad["weight"], want.dweight, off.dweight, where + "dweight")
            if ask.bias is not None:
                assert_within(grad["bias"], want.dbias, off.dbias, where + "dbias")
            if mode.residual:  # a copy of g, or 0
                np.testing.assert_array_equal(rows(grad["residual"].double().numpy()), want.dresidual, where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_channels_longer_than_any_run_or_block(implementation, dtype):
    for shape, k, title in itertools.product([(1, 2, 9001), (9001, 2)], (0, 10), ("relu", "from output", "norm")):
        ask, want, off = problem(shape, dtype, k, MODES[title], likely=True)
        out, grad, _ = solved(ask, shape, dtype, MODES[title], "planes")
        assert_within(out.mean, want.mean, off.mean, f"{shape} k={k} {title} mean")
        assert_within(out.scale, want.scale, off.scale, f"{shape} k={k} {title} scale")
        assert_within(out.y, want.y, off.y, f"{shape} k={k} {title} y", shape)
        assert_within(grad["x"], want.dx, off.dx, f"{shape} k={k} {title} dx", shape)
        assert_within(grad["weight"], want.dweight, off.dweight, f"{shape} k={k} {title} dweight")


def test_results_written_around_the_cache_are_the_same(implementation, monkeypatch):
    """What large tensors get: stores that do not fill the cache. Here for small ones, whose rows have whole lines."""
    for dtype, k, title, layout in itertools.product(DTYPES[1:], (0, 2), MODES, ("planes", "rows")):
        found = []
        for least in (0, 1 << 60):
            monkeypatch.setattr(native, "_STREAM_BYTES", least)
            ask, _, _ = problem((2, 32, 8, 8), dtype, k, MODES[title])
            out, grad, _ = solved(ask, (2, 32, 8, 8), dtype, MODES[title], layout)
            found.append([*out, *grad.values()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("k", [2, 17, 64])
def test_many_extremes(implementation, k):
    """Up to what the compiled kernels keep; beyond it they leave the work to the reference."""
    assert not native.can_run(torch.zeros(2, 1), 65)
    for title, layout in itertools.product(("relu", "from output"), ("planes", "rows")):
        ask, want, off = problem((2, 6, 11, 9), torch.float32, k, MODES[title])
        out, grad, _ = solved(ask, (2, 6, 11, 9), torch.float32, MODES[title], layout)
        assert_within(out.scale, want.scale, off.scale, "scale")
        assert_within(grad["x"], want.dx, off.dx, "dx", (2, 6, 11, 9))


def test_the_definition_agrees_with_a_complex_step():
    """d loss / dx_i = Im loss(x + i h e_i) / h, without cancellation: right to a few hundred float64 roundings."""
    for k, title in itertools.product(KS, ("relu", "residual and relu", "norm", "statistics")):
        ask, want, _ = problem((3, 2, 5), torch.float64, k, MODES[title])
        for i in range(ask.x.shape[1]):
            moved = ask.x.astype(np.complex128)
            moved[:, i] += 1e-30j
            out = forward(replace(ask, x=moved))
            loss_C = (ask.g * out.y).sum(1) + ask.grad_mean * out.mean[:, 0] + ask.grad_scale * out.scale[:, 0]
            np.testing.assert_allclose(loss_C.imag / 1e-30, want.dx[:, i], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_bits_and_extremes_are_the_references(implementation, dtype):
    """They pass from a forward of one implementation to a backward of another; positions as `reference` says."""
    for shape, k, layout in itertools.product([(3, 17, 7, 7), (1, 5, 13), (2, 16, 14, 14)], KS, ("planes", "rows")):
        for title in ("relu", "from output", "norm"):
            mode = MODES[title]
            ask, want, off = problem(shape, dtype, k, mode)
            out, _, x = solved(ask, shape, dtype, mode, layout)
            assert is_rows(x) == (layout == "rows")
            if title == "norm" or (k and mode.from_output):
                assert out.bits.numel() == 0
            else:
                flags = want.d >= 0 if mode.from_output else want.before > 0
                assert out.bits.shape == bits_shape(x)
                np.testing.assert_array_equal(rows(unpack(out.bits, x).numpy()), flags)
                spare = torch.ones_like(x, dtype=torch.bool)
                packed = pack(spare, x)
                assert not (out.bits & ~packed).any(), "bits beyond the last element are not 0"
            if k:
                chosen = np.sort(want.chosen, 1)
                signed = np.where(np.take_along_axis(want.d, chosen, 1) >= 0, chosen, ~chosen)
                got = out.extremes.numpy()
                places = np.where(got >= 0, got, ~got)
                np.testing.assert_array_equal(np.take_along_axis(got, np.argsort(places, 1), 1), signed)
                # Largest first, but for what rounding d may do to two neighbours: u |d| and the mean's error each.
                sizes = np.take_along_axis(np.abs(want.d), places, 1)
                assert (np.diff(sizes, axis=1) <= 2 * (off.mean + 2.0**-24 * sizes.max())).all()
            else:
                assert out.extremes.numel() == 0


def test_of_equal_deviations_the_first_is_chosen(implementation):
    values = torch.tensor([[0.0, 1.0], [4.0, 1.0], [0.0, 1.0], [4.0, 1.0], [2.0, 1.0]])
    for x in (values, values.t().reshape(1, 2, 5).contiguous(), values.reshape(5, 2, 1)):
        for k, want in ((1, [[~0], [0]]), (3, [[~0, 1, ~2], [0, 1, 2]])):
            assert fused_norm(x, None, None, k=k).extremes.tolist() == want


def test_what_is_stored_as_0_has_no_gradient(implementation):
    """y = 1e-9 is positive in float32 and 0 in float16: the ReLU's mask is that of the y that the next layer sees."""
    for layout in ("planes", "rows"):
        x = tensor(np.random.default_rng(0).standard_normal((9, 105)), (3, 9, 5, 7), torch.float16, layout)
        out = fused_norm(x, torch.full((9,), 1e-9), None, relu=True)
        assert not out.y.any()
        assert not out.bits.any()


def test_the_sign_of_no_deviation_is_positive(implementation):
    """Forward's bits and both backwards agree on it; four elements whose mean is exactly one of them."""
    for k, title, layout in itertools.product((0, 4), ("relu", "from output", "norm"), ("planes", "rows")):
        mode = MODES[title]
        x_Cn = np.array([[0.0, 1.0, -1.0, 0.0], [5.0, 2.0, 5.0, 8.0]])
        ask = Problem(x_Cn, np.array([[1.0, 2.0, 3.0, 4.0]] * 2), np.ones(2), np.full(2, 2.0), k=k, relu=mode.relu)
        want = solve(ask)
        off = bounds(ask, want, "float32", mode.from_output)
        out, grad, x = solved(ask, (2, 2, 2, 1), torch.float32, mode, layout)
        assert_within(grad["x"], want.dx, off.dx, f"k={k} {title} dx", x.shape)
        if k == 0 and mode.from_output:
            np.testing.assert_array_equal(rows(unpack(out.bits, x).numpy()), want.d >= 0)
        if k:
            assert sorted(out.extremes[0].tolist()) == [~2, 0, 1, 3]


def test_a_constant_channel_is_exact(implementation):
    """mean = the constant, S = eps, y = bias and nothing to learn about weight, whatever the length."""
    for dtype, (value, count), k in itertools.product(DTYPES[1:], ((0.1, 7), (3.3, 1009), (1e4, 4096)), KS):
        constant = torch.tensor(value).to(dtype)
        for x in (constant.expand(count, 3).clone(), constant.expand(1, 3, count).clone()):
            weight, bias = torch.tensor([2.0, -1.0, 0.0]).requires_grad_(), torch.tensor([0.0, 1.0, -5.0])
            out = fused_norm(x, weight, bias, k=k)
            assert (out.mean == constant).all()
            assert (out.scale == torch.tensor(1e-5)).all()
            assert (out.y == bias.view(1, 3, *[1] * (x.dim() - 2))).all()
            out.y.backward(torch.randn_like(x))
            assert (weight.grad == 0).all()


@pytest.mark.parametrize("k", KS)
def test_a_mean_far_from_zero_keeps_the_digits_of_the_deviations(implementation, k):
    """Mean 1e4, standard deviation 1. What is lost is what float32 cannot say about the mean, u 1e4, and nothing more:
    a plain sum, or x * a + c, would lose several times that."""
    u = 2.0**-24
    for shape, layout in itertools.product(((64, 5), (4, 5, 6, 6)), ("planes", "rows")):
        x_Cn = np.random.default_rng(k).standard_normal((5, int(np.prod(shape)) // 5)) + 1e4
        ask = Problem(np.float32(x_Cn).astype(float), np.zeros((5, 1)), k=k)
        want, n = forward(ask), ask.x.shape[1]
        out = fused_norm(tensor(ask.x, shape, torch.float32, layout), None, None, k=k)
        # mean = a + sum(x - a) / n: one rounding to float32, and the sum's n u mean|x - a| where |x - a| < 8.
        assert_within(out.mean, want.mean, u * 1e4 + n * u * 8, "mean")
        lost = np.abs(out.mean.double().numpy()[:, None] - want.mean)  # at most; a kernel may know better than it says
        sums = (n + 8) * u * 8
        assert_within(out.scale, want.scale, ask.constant * lost + sums, "scale")
        relative = (ask.constant * lost + sums) / want.scale
        assert_within(
            out.y, want.y, (lost + relative * np.abs(want.d)) / want.scale + 8 * u * np.abs(want.y), "y", shape
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
def test_nan_and_infinity_are_never_hidden(implementation, dtype, bad):
    """In x: all of its channel is NaN, forward and backward, and no other. In g: all of its channel's gradient."""
    for k, title, layout in itertools.product(KS, ("relu", "from output", "norm"), ("planes", "rows")):
        mode = MODES[title]
        for place in ((0, 0, 0, 0), (1, 0, 2, 1), (2, 0, 4, 6)):  # first, inside, last
            x = tensor(np.random.default_rng(1).standard_normal((9, 105)), (3, 9, 5, 7), dtype, layout)
            clean = fused_norm(x, None, torch.ones(9), k=k, relu=mode.relu, from_output=mode.from_output)
            x[place] = bad
            x.requires_grad_()
            out = fused_norm(x, None, torch.ones(9), k=k, relu=mode.relu, from_output=mode.from_output)
            assert out.y[:, 0].isnan().all()
            assert not (out.mean[0].isfinite() and out.scale[0].isfinite())
            assert torch.equal(out.y[:, 1:], clean.y[:, 1:])
            out.y.sum().backward()
            assert x.grad[:, 0].isnan().all()
            assert x.grad[:, 1:].isfinite().all()
    for title in ("relu", "from output", "norm"):
        x = tensor(np.random.default_rng(1).standard_normal((9, 105)), (3, 9, 5, 7), dtype).requires_grad_()
        weight, bias = torch.ones(9, requires_grad=True), torch.full((9,), 4.0, requires_grad=True)
        out = fused_norm(x, weight, bias, k=1, relu=MODES[title].relu, from_output=MODES[title].from_output)
        g = torch.ones_like(x)
        g[1, 0, 2, 1] = bad
        out.y.backward(g)
        for gradient in (x.grad, weight.grad[None], bias.grad[None]):
            assert not gradient[:, 0].isfinite().any()
            assert gradient[:, 1:].isfinite().all()


def test_nan_in_the_residual_stays_where_it_is(implementation):
    for relu, layout in itertools.product((True, False), ("planes", "rows")):
        x = tensor(np.random.default_rng(1).standard_normal((9, 105)), (3, 9, 5, 7), torch.float32, layout)
        residual = torch.zeros_like(x)
        residual[2, 8, 4, 6] = float("nan")
        y = fused_norm(x, None, None, residual, relu=relu).y
        assert torch.equal(y.isnan(), residual.isnan())


def test_any_strides_give_the_same(implementation):
    """Slices, permutations, expanded gradients and a residual of another layout are copied as need be."""
    x = torch.randn(6, 10, 8, 4, generator=torch.Generator().manual_seed(0))[:, ::2].transpose(2, 3)
    residual = torch.randn(6, 5, 4, 8).contiguous(memory_format=torch.channels_last)
    for k, relu, g in itertools.product(
        KS, (True, False), (torch.ones(()).expand(6, 5, 4, 8), torch.randn(6, 8, 5, 4).permute(0, 2, 3, 1))
    ):
        found = []
        for made in (torch.Tensor.detach, torch.Tensor.contiguous):
            inputs = [made(t).clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual)]
            y = fused_norm(inputs[0], None, None, inputs[1], k=k, relu=relu).y
            y.backward(made(g))
            found.append((y.detach(), *(t.grad for t in inputs)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_parameters_may_be_half(implementation):
    """A network that was cast whole: weight and bias are widened, their gradients rounded once to their type."""
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = {}
    for dtype in (torch.bfloat16, torch.float32):
        affine = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in ([1.0, -0.5, 2.0], [0.0, 0.25, 1.0])]
        out = fused_norm(x, *affine, relu=True)
        out.y.sum().backward()
        grads[dtype] = [out.y, *(t.grad for t in affine)]
    for narrow, wide in zip(*grads.values(), strict=True):
        assert torch.equal(narrow, wide.bfloat16())


def test_the_gradient_of_a_residual_is_empty_unless_a_relu_masks_it(implementation):
    x, g = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2)), torch.randn(2, 4, 3, 3)
    for relu, has_residual in itertools.product((True, False), repeat=2):
        residual = torch.ones_like(x) if has_residual else None
        out = torch.ops.lowprec.norm(x, None, None, residual, 0, 1e-5, relu, False)
        *_, dresidual = torch.ops.lowprec.norm_backward(
            g, x, *out[1:], None, None, None, None, 0, relu, False, has_residual
        )
        assert dresidual.numel() == (x.numel() if relu and has_residual else 0)


def test_any_number_of_threads_gives_the_same_bits(implementation):
    if implementation == "reference":
        pytest.skip("torch's own sums depend on the number of threads; only the compiled kernels promise this")
    before = torch.get_num_threads()
    random = np.random.default_rng(3)
    try:
        for shape, layout in itertools.product([(3, 40, 16, 16), (2, 2, 96, 96), (64, 515)], ("planes", "rows")):
            values = random.standard_normal((2, shape[1], int(np.prod(shape)) // shape[1]))
            for dtype, k in itertools.product(DTYPES[1:], (0, 10)):
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    x, g = (tensor(v, shape, dtype, layout) for v in values)
                    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
                    out = fused_norm(x.requires_grad_(), weight, bias, k=k, relu=True, from_output=True)
                    out.y.backward(g)
                    found.append((*out, x.grad, weight.grad, bias.grad))
                for others in found[1:]:
                    assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    finally:
        torch.set_num_threads(before)
