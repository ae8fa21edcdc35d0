"""Filter response norm: the layer against float64, the method on networks, from step to bundle."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import reference_norm as reference
import torch
from onnx import TensorProto
from test_norm_free import CLASSES, NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec import Trainer
from lowprec.errors import ConfigError, DataError, UnsupportedError
from lowprec.export import export, fold
from lowprec.formats import BF16, FP16, FP32, FP64
from lowprec.kernels import without_kernels
from lowprec.methods import convert
from lowprec.methods.rewrite import replace_module
from lowprec.models import mlp, small_resnet
from lowprec.norm import FilterResponseNorm, L1BatchNorm2d, SyncL1BatchNorm, is_norm
from lowprec.precision import MODES, Precision
from lowprec.train import parse_config

SHAPES = [(3, 4), (3, 4, 7), (3, 4, 5, 6), (3, 4, 2, 3, 4)]
FORMATS = {torch.float64: FP64, torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=len)
# The function with the closed-form backward, and the operations that exporters see.
over_ways = pytest.mark.parametrize("operations", [False, True], ids=["function", "operations"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(channels=4, dtype=torch.float64, **options) -> FilterResponseNorm:
    """A norm with parameters of no special value."""
    norm = FilterResponseNorm(channels, dtype=dtype, **options)
    with torch.no_grad():
        for param in norm.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return norm


def called(norm, operations, *inputs):
    if not operations:
        return norm(*inputs)
    with without_kernels():
        return norm(*inputs)


def numbers(*tensors):
    return [None if tensor is None else tensor.detach().double().numpy() for tensor in tensors]


def eps_of(norm) -> float:
    return norm.eps + (0.0 if norm.learned_eps is None else abs(float(norm.learned_eps.detach())))


def assert_near(got: Tensor, want: np.ndarray, terms: int, fmt=None, size: float | None = None) -> None:
    """Sums of `terms` squares in float32 at least, then one rounding to `fmt`, relative to what is added up."""
    fmt = fmt or FORMATS[got.dtype]
    wide = FP64 if got.dtype == torch.float64 else FP32
    size = np.abs(want).max() if size is None else size
    atol = (reference.rounding_bound(wide, terms) + fmt.unit_roundoff) * size + fmt.min_subnormal
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=0, atol=atol)


# --- the layer ------------------------------------------------------------------------------------------------------


@over_ways
@over_shapes
@pytest.mark.parametrize("dtype", FORMATS)
def test_forward_is_the_definition(dtype, shape, operations):
    for learn_eps, threshold, summed in itertools.product([True, False], repeat=3):
        if len(shape) == 2 and not learn_eps:
            continue
        norm = made(dtype=torch.promote_types(dtype, torch.float32), learn_eps=learn_eps, threshold=threshold)
        x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if summed else None
        z = called(norm, operations, x, residual)
        assert z.dtype == dtype
        parameters = numbers(norm.weight, norm.bias)
        want = reference.filter_response(*numbers(x), *parameters, eps_of(norm), *numbers(norm.tau, residual))
        assert_near(z, want, x[0, 0].numel(), size=np.abs(want).max() + 4)  # of the summands: a bias, a residual


@over_ways
def test_backward_is_the_definition_in_every_dtype(operations):
    for dtype in FORMATS:
        norm = made(dtype=torch.promote_types(dtype, torch.float32), threshold=False)
        x, g = torch.randn(3, 4, 5, 6).to(dtype).requires_grad_(), torch.randn(3, 4, 5, 6).to(dtype)
        called(norm, operations, x).backward(g)
        want = reference.filter_response_backward(*numbers(x, g, norm.weight), norm.eps)
        # Means of 30 products, sums of 90: bounded by the sums of their sizes.
        sizes = np.abs(g.double().numpy()).sum((0, 2, 3)).max() * 4
        for got, expected in zip((x.grad, norm.weight.grad, norm.bias.grad), want, strict=True):
            assert_near(got, expected, 90, size=sizes)


@over_ways
@pytest.mark.parametrize("summed", [False, True])
def test_gradients_of_first_and_second_order(summed, operations):
    for options in ({"learn_eps": True}, {"threshold": False}, {"affine": False}):
        norm = made(2, **options)
        shape = (2, 2, 2, 3)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        residual = [torch.randn(shape, dtype=torch.float64, requires_grad=True)] if summed else []
        names = list(dict(norm.named_parameters()))

        def compute(x, *rest, norm=norm, names=names, summed=summed):
            values = dict(zip(names, rest[summed:], strict=True))
            return called(lambda *args: torch.func.functional_call(norm, values, args), operations, x, *rest[:summed])

        inputs = (x, *residual, *norm.parameters())
        assert torch.autograd.gradcheck(compute, inputs)
        assert torch.autograd.gradgradcheck(compute, inputs)


def test_maps_of_one_element_have_gradients_with_a_learned_eps():
    norm = made(2, learn_eps=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_what_it_is_invariant_to_and_what_not():
    norm = FilterResponseNorm(4, 0.0, dtype=torch.float64, threshold=False)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    assert torch.equal(norm(4 * x), y)  # a power of two changes no bit of a mantissa
    reference.close(norm(3 * x), y)
    assert torch.equal(norm(-x), -y)
    assert (norm(x + 1) - y).abs().max() > 0.1
    reference.close(y.square().mean((2, 3)), np.ones((3, 4)))
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    reference.close((x * dx).sum((2, 3)), np.zeros((3, 4)))
    with_eps = FilterResponseNorm(4, 0.5, dtype=torch.float64, threshold=False)
    squares = x.detach().square().mean((2, 3))
    reference.close(with_eps(x).square().mean((2, 3)), squares / (squares + 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_know_nothing_of_each_other_nor_of_the_mode(dtype):
    norm = made(8, torch.float32)
    x, g = torch.randn(6, 8, 7, 9).to(dtype).requires_grad_(), torch.randn(6, 8, 7, 9).to(dtype)
    whole = norm(x)
    (dx,) = torch.autograd.grad(whole, x, g)
    assert torch.equal(norm.eval()(x), whole)
    for size in (1, 4):
        parts = [norm(part) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.autograd.grad(torch.cat(parts), x, g)[0], dx)


@over_ways
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0, 6e4])
def test_half_inputs_of_any_size(size, operations):
    """Half squares vanish below 1.7e-4 and overflow from 256 on; those of the widened input do neither."""
    norm = made(dtype=torch.float32, threshold=False)
    x = (size * (0.5 + 0.5 * torch.rand(2, 4, 8, 8)) * torch.randn(2, 4, 8, 8).sign()).half().requires_grad_()
    g = (0.01 * torch.randn(2, 4, 8, 8)).half()
    y = called(norm, operations, x)
    y.backward(g)
    parameters = numbers(norm.weight, norm.bias)
    assert_near(y, reference.filter_response(*numbers(x), *parameters, norm.eps), 64, size=4)
    dx, dgamma, dbeta = reference.filter_response_backward(*numbers(x, g, norm.weight), norm.eps)
    assert_near(x.grad, dx, 64, size=2 * np.abs(g.double().numpy()).max() / (size / 2))
    sums = np.abs(g.double().numpy()).sum((0, 2, 3)).max() * 4
    assert_near(norm.weight.grad, dgamma, 128, size=sums)
    assert_near(norm.bias.grad, dbeta, 128, size=sums)


def test_the_gradient_at_the_threshold_is_the_thresholds():
    """Maps of zeros sit on it at the start, and dx is 1 / sqrt(eps) = 1000 times what comes in: as at 0 of a ReLU."""
    for residual in (None, torch.zeros(2, 3, 4, 4)):
        norm = FilterResponseNorm(3)
        x, g = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
        norm(x, residual).backward(g)
        assert not x.grad.any()
        assert torch.equal(norm.tau.grad, g.sum((0, 2, 3)))
        assert not norm.bias.grad.any()


def test_what_is_not_a_number_stays_so():
    norm = FilterResponseNorm(2)
    x = torch.randn(2, 2, 3, 3)
    x[0, 1, 1, 1], x[1, 0, 0, 0] = math.nan, math.inf
    for z in (norm(x), norm(x, torch.zeros_like(x)), called(norm, True, x)):
        assert z[0, 1].isnan().all()
        assert z[1, 0, 0, 0].isnan()
        assert z[0, 0].isfinite().all()
    x.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad.isnan().all()


def kept_bytes(compute, x) -> int:
    """Of storages that are kept for the backward, those of parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_input_and_a_number_per_map_are_all_that_is_kept(dtype):
    norm = made(8, torch.float32)
    x, residual = (torch.randn(4, 8, 16, 16).to(dtype).requires_grad_() for _ in range(2))
    input_bytes, per_map = x.numel() * dtype.itemsize, 4 * 8 * 4
    assert kept_bytes(norm, x) == input_bytes + per_map
    assert kept_bytes(lambda x: norm(x, residual), x) == input_bytes + per_map + x.numel()
    plain = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    assert kept_bytes(plain, x) > 2 * input_bytes


@pytest.mark.parametrize("residual", [torch.randn(3, 4, 1, 1), torch.randn(3, 4, 5, 6, dtype=torch.float64)])
def test_a_residual_of_another_shape_or_dtype_is_added_as_by_torch(residual):
    norm, bare = made(dtype=torch.float32), made(dtype=torch.float32, threshold=False)
    bare.load_state_dict({key: value for key, value in norm.state_dict().items() if key != "tau"})
    x = torch.randn(3, 4, 5, 6)
    want = torch.maximum(bare(x) + residual, norm.tau.view(-1, 1, 1))
    z = norm(x, residual)
    assert z.dtype == want.dtype
    # One more rounding to float32 on either side, of sums of at most 8.
    torch.testing.assert_close(z, want, rtol=0, atol=2 * reference.rounding_bound(FP32, 30) * 8)


def test_maps_of_one_element_need_a_learned_eps():
    norm = FilterResponseNorm(4)
    for shape in ((3, 4), (3, 4, 1), (3, 4, 1, 1)):
        for mode in (True, False):
            with pytest.raises(ValueError, match=r"maps of one element \(3, 4.*leaves the signs; set learn_eps=True"):
                norm.train(mode)(torch.randn(shape))
    assert issubclass(type(_error(lambda: norm(torch.randn(3, 4)))), DataError)
    assert norm(torch.randn(3, 4, 1, 2)).shape == (3, 4, 1, 2)
    learned = FilterResponseNorm(4, learn_eps=True, threshold=False)
    assert learned.learned_eps.shape == (1,)
    x = torch.tensor([[0.01, 0.02, -0.01, 1.0]])
    assert_near(learned(x), x.double().numpy() / np.sqrt(x.double().numpy() ** 2 + 1e-6 + 1e-4), 1)
    assert learned(x).abs().min() < 0.8  # not the sign


def _error(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_other_inputs_are_refused():
    norm = FilterResponseNorm(4)
    with pytest.raises(DataError, match="expected 4 channels on axis 1"):
        norm(torch.randn(2, 3, 5, 5))
    with pytest.raises(DataError, match="expected 2D or 3D or 4D or 5D input"):
        norm(torch.randn(4))
    with pytest.raises(DataError, match="expected a real floating-point input"):
        norm(torch.ones(2, 4, 3, 3, dtype=torch.int64))


def test_empty_inputs_and_strides_pass():
    norm = made(dtype=torch.float32)
    for shape in ((0, 4, 5, 5), (2, 4, 0, 5)):
        x = torch.randn(shape, requires_grad=True)
        norm(x).sum().backward()
        assert x.grad.shape == shape
        assert not norm.bias.grad.any()
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own call, for jvp
def test_gradients_per_sample_and_tangents():
    norm = made(dtype=torch.float64)
    x, v = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(2))
    parameters = dict(norm.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(norm, parameters, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    total = torch.autograd.grad(norm(x).square().sum(), list(norm.parameters()))
    for name, gradient in zip(parameters, total, strict=True):
        reference.close(per_sample[name].sum(0), gradient)
    _, tangent = torch.func.jvp(norm, (x,), (v,))
    step = 1e-6  # central differences: an error of step^2 times a third derivative, and rounding of u / step
    np.testing.assert_allclose(
        tangent.detach(), ((norm(x + step * v) - norm(x - step * v)) / (2 * step)).detach(), atol=1e-7
    )


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning"
)  # dynamo
def test_compiled_it_is_the_same_layer():
    norm = made(dtype=torch.float32)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x, g = torch.randn(3, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 5, 6)
    want = torch.autograd.grad(norm(x), [x, *norm.parameters()], g)
    got = torch.autograd.grad(compiled(x), [x, *norm.parameters()], g)
    assert torch.equal(compiled(x), norm(x))
    for mine, its in zip(got, want, strict=True):
        assert torch.equal(mine, its)


# --- the method -----------------------------------------------------------------------------------------------------


def swapped(model: nn.Module) -> nn.Module:
    """Batch norms replaced by hand, every activation left where it is."""
    for norm in [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        one_dimension = isinstance(norm, nn.BatchNorm1d)
        model = replace_module(
            model, norm, FilterResponseNorm(norm.num_features, threshold=False, learn_eps=one_dimension)
        )
    return model


def relus(model: nn.Module) -> int:
    return sum(isinstance(module, nn.ReLU) for module in model.modules())


def thresholds(model: nn.Module) -> int:
    return sum(isinstance(m, FilterResponseNorm) and m.tau is not None for m in model.modules())


# Thresholds and ReLU modules after conversion. Blocks of these networks, but for the first and last two, call F.relu.
COUNTS = {"resnet": (7, 0), "vgg": (4, 0), "mlp": (2, 0), "mobilenet": (1, 0), "pre-activation resnet": (1, 0)}


@pytest.mark.parametrize("network", NETWORKS)
def test_thresholds_start_as_the_relus_whose_place_they_take(network):
    original = NETWORKS[network]()
    converted, report = convert(original, "frn")
    assert not [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not report.refused
    if network in COUNTS:
        assert (thresholds(converted), relus(converted)) == COUNTS[network]
    by_hand = swapped(copy.deepcopy(original))
    by_hand.load_state_dict({k: v for k, v in converted.state_dict().items() if not k.endswith("tau")})
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(converted.eval()(x), by_hand.eval()(x))


def test_the_report_says_what_became_of_every_relu():
    _, report = convert(small_resnet(width=4, blocks=2), "frn")
    reasons = {row.name: row.reason for row in report.changed}
    became = "BatchNorm2d became FilterResponseNorm; "
    assert reasons["norm"] == became + "its threshold stands for the ReLU 'act'"
    assert reasons["blocks.1.norm2"] == became + "its threshold stands after the addition, for the ReLU 'blocks.1.act'"
    assert reasons["blocks.1.shortcut.1"].startswith(became + "no threshold: the other side of the sum is a norm too")
    _, report = convert(NETWORKS["mobilenet"](), "frn")
    reasons = Counter(row.reason.partition("; ")[2] for row in report.changed)
    assert reasons == {"its threshold stands for the ReLU '2'": 1, "no threshold, as no ReLU follows": 6}
    _, report = convert(NETWORKS["densenet"](), "frn")
    functional = "no threshold: the ReLU after it is written as a function in forward, which convert does not edit"
    assert sum(row.reason.endswith(functional) for row in report.changed) == 2
    _, report = convert(mlp(hidden=[8]), "frn")
    assert [row.reason for row in report.changed] == [
        "BatchNorm1d became FilterResponseNorm, with a learned eps; its threshold stands for the ReLU '3'"
    ]


def test_a_threshold_before_a_relu_would_never_move():
    """Why there is none: max(max(y, tau), 0) has no gradient for a tau of 0."""
    norm = FilterResponseNorm(3)
    F.relu(norm(torch.randn(2, 3, 4, 4))).sum().backward()
    assert not norm.tau.grad.any()


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_which_norms_are_replaced_and_what_is_kept():
    fused, _ = convert(small_resnet(width=4, blocks=1), "l1")
    model = nn.Sequential(
        nn.BatchNorm2d(4, eps=0.5), nn.SyncBatchNorm(4), L1BatchNorm2d(4, relu=True), SyncL1BatchNorm(4),
        nn.BatchNorm3d(4, affine=False), nn.BatchNorm1d(4), Doubled(4), nn.GroupNorm(1, 4), fused,
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    nn.init.zeros_(model[1].weight)
    model[0].eval()
    converted, report = convert(model, "frn")
    assert [type(m) for m in converted[:8]] == [FilterResponseNorm] * 6 + [Doubled, nn.GroupNorm]
    assert {row.name for row in report.refused} == {"6", "7"}
    assert [m.tau is not None for m in converted[:6]] == [False, False, True, False, False, False]
    assert [m.learned_eps is not None for m in converted[:6]] == [False] * 5 + [True]
    assert (converted[0].eps, converted[0].training, converted[1].training) == (1e-6, False, True)
    assert not converted[0].weight.requires_grad
    assert converted[0].bias.requires_grad
    assert not converted[1].weight.any()
    assert converted[4].weight is None
    last = converted[8].blocks[0]
    assert last.norm2.awaits_residual
    assert last.norm2.tau is not None
    x = torch.randn(2, 1, 8, 8)
    plain, _ = convert(small_resnet(width=4, blocks=1), "frn")
    plain.load_state_dict(converted[8].state_dict())
    assert torch.equal(plain(x), converted[8](x))
    for value in (True, False):
        chosen, _ = convert(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2)), "frn", learn_eps=value, eps=1e-3)
        assert [m.learned_eps is not None for m in chosen] == [value, value]
        assert chosen[0].eps == 1e-3


def test_a_hooked_norm_keeps_its_relu():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(float(output.detach().min())))
    converted, report = convert(model, "frn")
    converted(torch.randn(2, 1, 8, 8))
    assert seen[0] < 0
    assert isinstance(converted[2], nn.ReLU)
    assert "hooks on the norm" in report.changed[0].reason


def test_options_that_make_no_sense_are_refused():
    for eps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"frn: eps is .*must be a positive number"):
            convert(small_resnet(width=4), "frn", eps=eps)
    with pytest.raises(UnsupportedError, match=r"found no batch norm to replace in Sequential: 0: is a GroupNorm"):
        convert(nn.Sequential(nn.GroupNorm(1, 2)), "frn")
    with pytest.raises(UnsupportedError, match="FilterResponseNorm, not a batch norm"):
        convert(convert(mlp(hidden=[4]), "frn")[0], "frn")


@pytest.mark.parametrize("mode", MODES)
def test_parameters_stay_wide_and_a_step_lands_in_every_mode(mode):
    model, _ = convert(NETWORKS["vgg"](), "frn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(mode, init_scale=2.0**8)
    precision.prepare(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        with precision.forward():
            loss = F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % CLASSES)
        assert precision.step(loss)
    norms = [module for module in model.modules() if is_norm(module)]
    assert len(norms) == 4
    assert {param.dtype for norm in norms for param in norm.parameters()} == {torch.float32}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.rpartition(".")[2] in ("tau", "learned_eps")} <= moved
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))


def test_a_run_resumes_in_the_same_bytes(tmp_path: Path):
    words = ["method.name=frn", "model.args.width=4", "model.args.blocks=1", "data.batch_size=256", "run.device=cpu"]
    config = parse_config("", [*words, "run.epochs=1", "precision.mode=fp16-kahan"])
    whole = Trainer(config).fit(tmp_path / "whole")
    Trainer(config).fit(tmp_path / "parts", stop_after_steps=3)
    resumed = Trainer(config).fit(tmp_path / "parts", resume=True)
    assert resumed.losses == whole.losses
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert stored[0] == stored[1]


def test_the_fold_says_in_one_sentence_why_the_norm_stays():
    for learn_eps, why in ((False, "takes its statistics from each sample"), (True, "computes its statistics from")):
        layers = [nn.Conv2d(1, 4, 3), made(4, torch.float32, learn_eps=learn_eps), nn.Conv2d(4, 2, 3)]
        _, report = fold(nn.Sequential(*layers).eval(), (torch.randn(2, 1, 8, 8),))
        (row,) = [row for row in report.refused if row.name == "1"]
        assert row.reason.startswith(why)
        assert row.reason.endswith("no constants stand for it")
        assert report.facts["norms_left"] == 1


def squares_of(model: onnx.ModelProto) -> set[int]:
    """Element types of what is squared."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {types[node.input[0]] for node in model.graph.node if node.op_type == "Pow"}


@pytest.fixture
def striding() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return convert(model, "frn")[0].eval()


def test_squares_of_a_half_file_stay_wide(striding, tmp_path):
    x = torch.randn(4, 1, 12, 12)
    bundle = export(striding, (x,), tmp_path / "kept", precision="fp16")
    assert bundle.parity.passed
    assert squares_of(onnx.load(bundle.folder / "model.fp16.onnx")) == {TensorProto.FLOAT}
    bundle = export(striding, (x,), tmp_path / "whole", precision="fp16", opset=23)
    model = onnx.load(bundle.folder / "model.fp16.onnx")
    (norm,) = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    # Its definition: computed in float32 unless the attribute says something else.
    assert {a.name: a.i for a in norm.attribute}.get("stash_type", 1) == TensorProto.FLOAT
    assert bundle.parity.passed


def test_maps_of_free_size_are_traced(striding):
    free = ({0: "batch", 2: "height", 3: "width"},)
    folded, _ = fold(striding, (torch.randn(2, 1, 12, 12),), dynamic_shapes=free)
    x = torch.randn(3, 1, 9, 14)
    # The same operations in another order: sums of 36 products, a mean of 35 squares.
    torch.testing.assert_close(folded(x), striding(x), rtol=0, atol=reference.rounding_bound(FP32, 100) * 4)
