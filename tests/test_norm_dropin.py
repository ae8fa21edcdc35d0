"""What users of torch's batch norms do with one, for every norm in NORMS; and what they do wrong."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import reference_norm as reference
import torch
from torch import nn

from lowprec.errors import ConfigError, DataError, LowprecError
from lowprec.formats import FP16, FP32, FP64
from lowprec.norm import (
    NORMS,
    L1BatchNorm2d,
    LInfBatchNorm1d,
    LInfBatchNorm2d,
    TopKBatchNorm1d,
    TopKBatchNorm2d,
    inference_affine,
)  # fmt: skip
from lowprec.norm.authors import load_authors_state_dict

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (6, 3, 4), 2: (4, 3, 3, 4), 3: (3, 3, 2, 3, 2)}
over_cases = pytest.mark.parametrize(("name", "dimension"), [(n, d) for n in NORMS for d in TORCH])
over_norms = pytest.mark.parametrize("name", NORMS)


def data(dimension=2, seed=0, dtype=torch.float32):
    return torch.randn(SHAPES[dimension], generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 1


def equal_states(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@over_cases
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_empty_and_one_element_batches_do_what_torch_does(name, dimension, size, tracking, training):
    x = torch.ones(size, 3, *[1] * dimension)
    outcomes = []
    for cls in (NORMS[name].classes[dimension], TORCH[dimension]):
        norm = cls(3, track_running_stats=tracking).train(training)
        try:
            y = norm(x.clone().requires_grad_())
            y.sum().backward()
            tracked = None if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
            outcomes.append((y.shape, y.dtype, norm.weight.grad.shape, tracked))
            if tracking:
                assert norm.running_mean.tolist() == [0, 0, 0]
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@over_cases
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_integer_and_complex_input_is_refused(name, dimension, dtype):
    norm = NORMS[name].classes[dimension](3)
    with pytest.raises(
        TypeError, match=r"expected a real floating-point input, got torch.*; convert it first"
    ) as caught:
        norm(torch.ones(SHAPES[dimension]).to(dtype))
    assert isinstance(caught.value, LowprecError)
    with pytest.raises(DataError, match="expected 3 channels on axis 1"):
        norm(torch.ones(2, 4, *[2] * dimension))


@over_norms
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_never_hidden(name, bad):
    for options in ({}, {"stats_dtype": torch.float16}, {"stats_dtype": torch.float16, "accumulation": "naive"}):
        norm, x = NORMS[name].classes[2](3, **options), data()
        x[1, 1, 0, 0] = bad
        y = norm(x)
        assert not torch.isfinite(y[:, 1]).any()
        assert torch.isfinite(y[:, [0, 2]]).all()
        assert not torch.isfinite(norm.running_mean[1])


@over_norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -333.3, 60000.0, 1e-7])
def test_any_constant_channel_gives_exactly_the_bias(name, dtype, value):
    norm, x = NORMS[name].classes[2](3), data(dtype=dtype)
    nn.init.constant_(norm.bias, 0.5)
    x[:, 1] = value
    assert norm(x)[:, 1].unique().tolist() == [0.5]


@over_cases
def test_pickle_and_torch_save_keep_everything(name, dimension):
    norm = NORMS[name].classes[dimension](3, eps=1e-3, momentum=None)
    norm(data(dimension))
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(norm)), torch.load(file, weights_only=False), copy.deepcopy(norm)):
        assert equal_states(norm, again)
        assert (again.eps, again.momentum) == (1e-3, None)
        assert torch.equal(again(data(dimension, 1)), copy.deepcopy(norm)(data(dimension, 1)))


@over_norms
def test_state_is_versioned_and_strict(name):
    norm = NORMS[name].classes[2](3)
    norm(data())
    state = norm.state_dict()
    assert state._metadata[""]["version"] == 2
    fresh = NORMS[name].classes[2](3)
    fresh.load_state_dict(state)
    assert equal_states(norm, fresh)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "running_mean"})
    state._metadata[""]["version"] = 3
    with pytest.raises(RuntimeError, match=r"its state has version 3, this lowprec reads up to 2; update lowprec"):
        fresh.load_state_dict(state)
    torchs = nn.BatchNorm2d(3).state_dict()
    if name == "l2":
        fresh.load_state_dict(torchs)
    else:
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"running_var"'):
            fresh.load_state_dict(torchs)


@over_cases
def test_meta_device_and_moves(name, dimension):
    norm = NORMS[name].classes[dimension](3, device="meta")
    assert {value.device.type for value in norm.state_dict().values()} == {"meta"}
    y = norm(torch.empty(SHAPES[dimension], device="meta"))
    assert y.shape == SHAPES[dimension]
    norm.to_empty(device="cpu").reset_parameters()
    assert equal_states(norm, NORMS[name].classes[dimension](3))


@over_norms
@pytest.mark.parametrize("options", [{}, {"stats_dtype": torch.float16}])
@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
def test_compiled_training_is_the_same_without_a_graph_break(name, options):
    # The backend that needs no compiler at run time; inductor may keep narrow statistics wide, see norm/rounded.py.
    norm = NORMS[name].classes[2](3, **options)
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = data(seed=seed).requires_grad_()
        x_plain = data(seed=seed).requires_grad_()
        y, y_plain = compiled(x), plain(x_plain)
        y.square().sum().backward()
        y_plain.square().sum().backward()
        # The same operations; a decomposition may order a reduction in another way.
        atol = reference.rounding_bound(FP32, 48) * 8
        torch.testing.assert_close(y, y_plain, rtol=0, atol=atol)
        torch.testing.assert_close(x.grad, x_plain.grad, rtol=0, atol=atol * float(x_plain.grad.abs().max() + 8))
    for value, expected in zip(norm.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=reference.rounding_bound(FP32, 48), atol=0)


@over_norms
def test_training_is_exported(name):
    norm = NORMS[name].classes[2](3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        program = torch.export.export(norm, (data(),))
    torch.testing.assert_close(program.module()(data(seed=1)), copy.deepcopy(norm)(data(seed=1)))


@over_norms
def test_vmap_works_without_running_statistics_and_is_refused_with_them(name):
    x = torch.stack([data(seed=0), data(seed=1)])
    norm = NORMS[name].classes[2](3, track_running_stats=False)
    atol = reference.rounding_bound(FP32, 48) * 8
    torch.testing.assert_close(torch.func.vmap(norm)(x), torch.stack([norm(part) for part in x]), rtol=0, atol=atol)
    tracking = NORMS[name].classes[2](3)
    with pytest.raises(LowprecError, match=r"under vmap.*set track_running_stats=False or call eval"):
        torch.func.vmap(tracking)(x)
    assert torch.equal(torch.func.vmap(tracking.eval())(x), torch.stack([tracking(part) for part in x]))


@pytest.mark.parametrize("dimension", TORCH)
def test_l2_is_torchs_batch_norm(dimension):
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        ours = NORMS["l2"].classes[dimension](3, dtype=torch.float64, **options)
        torchs = TORCH[dimension](3, dtype=torch.float64, **options)
        for seed in range(3):
            x, x_torch = (data(dimension, seed, torch.float64).requires_grad_() for _ in range(2))
            y, y_torch = ours(x), torchs(x_torch)
            (y * x.detach().sin()).sum().backward()
            (y_torch * x.detach().sin()).sum().backward()
            atol = reference.rounding_bound(FP64, 48) * 8
            torch.testing.assert_close(y, y_torch, rtol=0, atol=atol)
            torch.testing.assert_close(x.grad, x_torch.grad, rtol=0, atol=atol)
        states = ours.state_dict().values(), torchs.state_dict().values()
        for value, expected in zip(*states, strict=True):
            torch.testing.assert_close(value, expected, rtol=atol, atol=atol)
        torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=0, atol=atol)


def closed_form(x, upstream, k):
    """dx = (g - mean g - C/k sum(g y) (a - mean a)) / S of one channel, a = sign(d) on the k largest |d|, else 0."""
    n = len(x)
    mean, scale = (v[0] for v in reference.topk_statistics(x[:, None].numpy(), 0.0, k))
    d = x - mean
    chosen = torch.zeros(n, dtype=torch.float64)
    largest = d.abs().topk(min(k, n)).indices
    chosen[largest] = d[largest].sign()
    constant = (1 / (torch.tensor(n).double().log() / (torch.pi * torch.log(torch.tensor(2.0).double()))).sqrt()
                + 1 / (2 * torch.tensor(n).double().log()).sqrt()) / 2  # fmt: skip
    y = d / scale
    correction = constant / min(k, n) * (upstream * y).sum() * (chosen - chosen.mean())
    return (upstream - upstream.mean() - correction) / scale


@pytest.mark.parametrize("k", [1, 4, 10, 99])
def test_linf_and_topk_gradients_equal_the_closed_form(k):
    x, upstream = data(1, dtype=torch.float64)[:, 0].flatten().exp(), data(1, 3, torch.float64)[:, 1].flatten()
    norms = [TopKBatchNorm1d(1, eps=0.0, k=k, dtype=torch.float64)]
    norms += [LInfBatchNorm1d(1, eps=0.0, dtype=torch.float64)] if k == 1 else []
    for norm in norms:
        leaf = x[:, None].clone().requires_grad_()
        norm(leaf).backward(upstream[:, None])
        want = closed_form(x, upstream, k)
        bound = reference.rounding_bound(FP64, len(x)) * 10 * float(want.abs().max())
        torch.testing.assert_close(leaf.grad[:, 0], want, rtol=0, atol=bound)


@pytest.mark.parametrize("norm", [LInfBatchNorm1d(1, eps=0.0), TopKBatchNorm1d(1, eps=0.0, k=1)])
def test_of_equal_maxima_one_gets_the_gradient(norm):
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0], [2.0], [0.0], [0.0]], dtype=torch.float64)
    norm(x).backward(upstream)
    scale = norm.batch_moments(x.detach()).scale
    # g - mean(g) is what no maximum changes; the rest is one spike less its mean.
    rest = (x.grad * scale - (upstream - upstream.mean())).detach().flatten()
    spike = rest - rest.median()
    assert int((spike.abs() > 1e-6).sum()) == 1


@pytest.mark.parametrize("norm", [TopKBatchNorm1d(1, k=10), TopKBatchNorm1d(1, k=3)])
def test_k_beyond_the_batch_takes_all_of_it(norm):
    x = torch.tensor([[1.0], [2.0], [6.0]])
    full = TopKBatchNorm1d(1, k=3)
    assert torch.equal(norm(x), full(x))


def test_unusable_k_is_refused():
    for k in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=r"k=.* is not a positive number of elements; k=10"):
            TopKBatchNorm2d(3, k=k)
    assert "k=4" in repr(TopKBatchNorm2d(3, k=4))


class Theirs(nn.Module):
    """Inference of the authors' classes as published: running_var holds the reciprocal."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.register_buffer("running_mean", torch.randn(3))
        self.register_buffer("running_var", torch.rand(3) + 0.5)

    def forward(self, x):
        mean, reciprocal, weight, bias = (
            v.reshape(1, 3, 1, 1) for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) * reciprocal * weight + bias


@pytest.mark.parametrize("cls", [L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d])
def test_the_authors_checkpoints_are_read(cls):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 3, 1), Theirs())
    ours = nn.Sequential(nn.Conv2d(3, 3, 1), cls(3)).eval()
    load_authors_state_dict(ours, theirs.state_dict(), momentum=0.1)
    atol = reference.rounding_bound(FP32, 3) * 20
    torch.testing.assert_close(ours(data()), theirs(data()), rtol=0, atol=atol)
    assert ours[1].momentum == 0.9
    assert inference_affine(ours[1]) is not None
    other = copy.deepcopy(ours.state_dict())
    load_authors_state_dict(ours, other)  # ours, or their class that keeps the scale itself
    assert all(torch.equal(value, other[key]) for key, value in ours.state_dict().items())


def test_unusable_checkpoints_of_the_authors_are_refused():
    state, model = nn.Sequential(Theirs()).state_dict(), nn.Sequential(L1BatchNorm2d(3))
    for changed, reason in (
        (
            state | {"0.running_var": torch.zeros(3)},
            "0.running_var: a reciprocal scale must be a positive number, found 0",
        ),
        ({key: value for key, value in state.items() if "mean" not in key}, "lacks 0.running_mean"),
        (state | {"1.weight": torch.ones(3)}, "has besides 1.weight"),
        (state | {"0.weight": torch.ones(4)}, r"0.weight: the checkpoint has \(4,\), the model \(3,\)"),
    ):
        with pytest.raises(DataError, match=reason):
            load_authors_state_dict(model, changed)


@over_norms
def test_half_input_keeps_its_dtype_and_the_wide_result_rounded_once(name):
    norm, x = NORMS[name].classes[2](3), data(dtype=torch.float16)
    want = copy.deepcopy(norm)(x.float())
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), want, rtol=FP16.unit_roundoff, atol=FP16.min_subnormal)
