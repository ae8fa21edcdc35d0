"""The Triton kernels against the reference in float64, on a GPU or in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py

Both sides get the same tensors; the backward also the same kept tensor, statistics and bits. Tiles are made small, so
that small tensors have several, with tails, and several partial results. Without a GPU the compiler is tried too.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowprec.functional import L1_CONSTANT, linf_constant
from lowprec.kernels import operators, reference
from lowprec.kernels.layout import pack, unpack

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

from lowprec.kernels import triton_backward, triton_forward, triton_norm

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24  # of float32, in which everything is computed
# No element goes through more additions: 7 in a tile of 128, 4 tiles, 6 over partial results, and a few operations
# around them; divisions on a GPU are good to 2 units.
DEPTH = 24
HALVES = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(3, 9, 5, 5), (2, 17, 3, 4), (7, 5), (2, 3, 1, 1)]
MODES = {"from-output": (True, False), "from-input": (False, False), "residual": (False, True)}
CASES = [
    *product(SHAPES[:1], (False, True), (torch.float32,), (0, 1, 3), MODES),
    *product(SHAPES[1:], (False, True), (torch.float16,), (0, 3), ("from-output", "residual")),
    *product(SHAPES[:1], (False, True), (torch.float16, torch.bfloat16), (0, 1), ("from-output", "from-input")),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_norm, "TILE", 128)
    monkeypatch.setattr(triton_norm, "TILE_CHANNELS", 16)
    monkeypatch.setattr(triton_norm, "BLOCKS", 2)


def random(shape, rows, dtype):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if rows and x.dim() > 2 else x


def problem(shape, rows, dtype, residual):
    torch.manual_seed(len(shape) + shape[1])
    channels = shape[1]
    weight = torch.linspace(0.5, 1.5, channels, device=DEVICE) * (-1.0) ** torch.arange(channels, device=DEVICE)
    bias = torch.randn(channels, device=DEVICE)
    x = random(shape, rows, dtype) * 2 + 1
    return x, weight, bias, random(shape, rows, dtype) if residual else None


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def over(value_C, x):
    return value_C.reshape([1, -1] + [1] * (x.dim() - 2))


def channel_sum(x):
    return x.sum([axis for axis in range(x.dim()) if axis != 1])


def assert_within(found, wanted, bound, what):
    worst = ((found.double() - wanted).abs() / bound).max()
    assert worst <= 1, f"{what} is off by {worst:.3g} times the bound"


def forward_bounds(x, weight, bias, residual, wanted):
    """Of the errors of mean and scale (C,), of d and of y (like x), first order, float32 with DEPTH additions."""
    x = x.double()
    count = x.numel() // x.shape[1]
    first = x.flatten(2)[:1, :, 0] if x.dim() > 2 else x[:1]
    mean = DEPTH * U * channel_sum((x - over(first.flatten(), x)).abs()) / count + U * wanted.mean.abs()
    constant = max(linf_constant(count), L1_CONSTANT)
    scale = constant * (mean + U * x.abs().flatten(2).amax((0, 2)) if x.dim() > 2 else mean + U * x.abs().amax(0))
    scale = scale + DEPTH * U * wanted.scale
    d = over(mean, x) + U * x.abs()
    factor = over(weight.abs() / wanted.scale, x)
    relative = over(scale / wanted.scale, x) + 4 * U
    size = (x - over(wanted.mean, x)).abs()
    added = over(bias.abs(), x) + (0 if residual is None else residual.double().abs()) + wanted.y.abs()
    return mean, scale, d, factor * (d + size * relative) + 2 * U * added


@pytest.mark.parametrize(("shape", "rows", "dtype", "k", "mode"), CASES)
def test_forward_and_backward_agree_with_float64(shape, rows, dtype, k, mode):
    from_output, has_residual = MODES[mode]
    x, weight, bias, residual = problem(shape, rows, dtype, has_residual)
    options = (k, 1e-3, True, from_output)
    found = triton_norm.norm_forward(x, weight, bias, residual, *options)
    wanted = reference.norm_forward(*map(wide, (x, weight, bias, residual)), *options)
    mean, scale, d, y = forward_bounds(x, weight, bias, residual, wanted)
    assert_within(found.mean, wanted.mean, mean, "mean")
    assert_within(found.scale, wanted.scale, scale, "scale")
    # The interpreter cuts bfloat16 off where a GPU rounds: twice the half unit. 2^-24 is fp16's smallest number.
    assert_within(found.y, wanted.y, y + 2 * HALVES[dtype] * wanted.y.abs() + U, "y")
    assert found.y.stride() == x.stride()
    assert torch.equal(found.extremes, wanted.extremes)
    assert found.bits.shape == wanted.bits.shape
    if found.bits.numel():
        before = reference.norm_forward(*map(wide, (x, weight, bias, residual)), k, 1e-3, False, False).y
        sure = (x - over(wanted.mean, x)).abs() > d if from_output else before.abs() > y + U
        assert sure.float().mean() > 0.9
        assert not ((unpack(found.bits, x) != unpack(wanted.bits, x)) & sure).any()
        assert torch.equal(found.bits, pack(unpack(found.bits, x), x)), "bits beyond the end"
    check_backward(x, weight, bias, found, k, from_output, has_residual)


def check_backward(x, weight, bias, forward, k, from_output, has_residual):
    """With gradients into the statistics too, as a norm's own double use of them would give."""
    g = random(x.shape, False, x.dtype).to(memory_format=torch.preserve_format)
    g = torch.empty_like(x).copy_(g)
    kept = forward.y if from_output else x
    extra = torch.randn(2, x.shape[1], device=DEVICE)
    arguments = (g, kept, forward.mean, forward.scale, forward.bits, forward.extremes, weight, bias, *extra)
    found = triton_norm.norm_backward(*arguments, k, True, from_output, has_residual)
    wanted = reference.norm_backward(*map(wide, arguments), k, True, from_output, has_residual)
    count, gamma, spread = x.numel() // x.shape[1], weight.double().abs(), forward.scale.double()
    active = kept > 0 if from_output else unpack(forward.bits, x)
    size = torch.where(active, g.double().abs(), 0.0)
    factors = kept.double().abs() + (0 if from_output else over(forward.mean.abs(), x))
    sums, products = channel_sum(size), channel_sum(size * factors)
    if from_output:
        moment = DEPTH * U * (products + bias.abs() * sums)
        slope = moment / gamma
    else:
        slope = DEPTH * U * products / spread
        moment = gamma * slope
    assert_within(found.weight, wanted.weight, slope + 1e-30, "dweight")
    assert_within(found.bias, wanted.bias, DEPTH * U * sums + 1e-30, "dbias")
    step = L1_CONSTANT / count if k == 0 else linf_constant(count) / forward.extremes.shape[1]
    steepest = extra[1].abs() + moment / (DEPTH * U * spread)  # no less than |dL/dS|
    shift = (gamma / spread * sums + extra[0].abs()) / count
    per_channel = 2 * step * (moment / spread + 8 * U * steepest) + DEPTH * U * shift
    bound = over(gamma / spread, x) * 4 * U * size + over(per_channel, x)
    assert_within(found.x, wanted.x, bound + 2 * HALVES[x.dtype] * wanted.x.abs() + U, "dx")
    assert torch.equal(found.residual.double(), wanted.residual), "the residual's gradient is g or 0"


@pytest.mark.parametrize("rows", [False, True])
def test_options_without_affine_relu_or_gradients_of_statistics(rows):
    x = random((3, 9, 5, 5), rows, torch.float32)
    found = triton_norm.norm_forward(x, None, None, None, 0, 1e-3, False, False)
    wanted = reference.norm_forward(wide(x), None, None, None, 0, 1e-3, False, False)
    one, zero = torch.ones(9, device=DEVICE), torch.zeros(9, device=DEVICE)
    assert_within(found.y, wanted.y, forward_bounds(x, one, zero, None, wanted)[3], "y")
    assert found.bits.numel() == 0
    rest = (x, found.mean, found.scale, found.bits, found.extremes, None, None, None, None)
    g = torch.empty_like(x).normal_()
    grads = triton_norm.norm_backward(g, *rest, 0, False, False, False)
    right = reference.norm_backward(wide(g), *map(wide, rest), 0, False, False, False)
    # Sums of 75 products of numbers below 4, twice: DEPTH * U * 75 * 16 in the sum, a 75th of it in dx.
    assert_within(grads.weight, right.weight, torch.tensor(DEPTH * U * 1200, device=DEVICE), "dweight")
    assert_within(grads.x, right.x, torch.tensor(2 * DEPTH * U * 16, device=DEVICE), "dx")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_a_constant_channel_is_exact_and_of_equals_the_first_counts(rows, k):
    x = random((3, 9, 5, 5), rows, torch.float32) * 0 + 0.1
    found = triton_norm.norm_forward(x, None, torch.ones(9, device=DEVICE), None, k, 1e-5, True, True)
    assert (found.mean == x[0, 0, 0, 0]).all()
    assert (found.y == 1).all()
    if k:
        assert (found.extremes == torch.arange(3, device=DEVICE)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(k, value):
    x = random((3, 9, 5, 5), True, torch.float32)
    x[1, 4, 2, 2] = value
    y, _, scale, *_ = triton_norm.norm_forward(x, None, None, None, k, 1e-5, True, False)
    broken = torch.arange(9, device=DEVICE) == 4
    assert torch.equal(scale.isnan(), broken)
    assert torch.equal(y.isnan().any(3).any(2).any(0), broken)


def test_the_same_bits_every_time():
    x, weight, bias, _ = problem((3, 9, 5, 5), True, torch.float16, False)
    first, second = (triton_norm.norm_forward(x, weight, bias, None, 3, 1e-5, True, True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 0), (torch.float32, triton_norm.MOST_EXTREMES + 1)])
def test_what_the_kernels_do_not_know_the_reference_computes(dtype, k):
    x = random((3, 9, 5, 5), False, dtype)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=x.shape, numel=x.numel)
    assert operators._kernels(on_a_gpu, k) is reference
    on_a_gpu.dtype = torch.float16
    assert operators._kernels(on_a_gpu, triton_norm.MOST_EXTREMES) is triton_norm


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = {
        name for module in (triton_forward, triton_backward) for name in vars(module) if name.endswith("_kernel")
    }
    assert set(done.stdout.split()) == kernels
