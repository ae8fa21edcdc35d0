"""Half storage with wide accumulation: every table entry runs, and computes what the definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference_half as reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.formats import FP16, FP32
from lowprec.precision import arithmetic
from lowprec.precision.arithmetic import HalfArithmetic, cast_floats, functions_named, tensors_in

T = torch.randn


def _rnn(gates: int) -> tuple[Any, ...]:
    weights = [T(gates * 3, 4) * 0.1, T(gates * 3, 3) * 0.1, T(gates * 3) * 0.1, T(gates * 3) * 0.1]
    return weights, True, 1, 0.0, False, False, False


def _cell(gates: int) -> tuple[Tensor, ...]:
    return T(gates * 3, 4) * 0.1, T(gates * 3, 3) * 0.1, T(gates * 3) * 0.1, T(gates * 3) * 0.1


def _attention() -> tuple[Any, ...]:
    x = T(5, 2, 8)
    return x, x, x, 8, 2, T(24, 8), T(24), None, None, False, 0.0, T(8, 8), T(8)


def _native_attention() -> tuple[Any, ...]:
    x = T(2, 5, 8)
    return x, x, x, 8, 2, T(24, 8), T(24), T(8, 8), T(8)


PRODUCT_CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "conv1d": lambda: (T(2, 3, 9), T(4, 3, 3), T(4)),
    "conv2d": lambda: (T(2, 3, 9, 9), T(4, 3, 3, 3), T(4)),
    "conv3d": lambda: (T(2, 3, 5, 5, 5), T(4, 3, 3, 3, 3)),
    "conv_transpose1d": lambda: (T(2, 3, 9), T(3, 4, 3)),
    "conv_transpose2d": lambda: (T(2, 3, 9, 9), T(3, 4, 3, 3), T(4)),
    "conv_transpose3d": lambda: (T(2, 3, 5, 5, 5), T(3, 4, 3, 3, 3)),
    "convolution": lambda: (T(2, 3, 9), T(4, 3, 3), T(4), [1], [0], [1], False, [0], 1),
    "linear": lambda: (T(5, 6), T(7, 6), T(7)),
    "bilinear": lambda: (T(5, 3), T(5, 4), T(2, 3, 4), T(2)),
    "matmul": lambda: (T(5, 6), T(6, 7)),
    "__matmul__": lambda: (T(5, 6), T(6, 7)),
    "__rmatmul__": lambda: (T(6, 7), T(5, 6)),
    "mm": lambda: (T(5, 6), T(6, 7)),
    "bmm": lambda: (T(2, 5, 6), T(2, 6, 7)),
    "mv": lambda: (T(5, 6), T(6)),
    "dot": lambda: (T(6), T(6)),
    "vdot": lambda: (T(6), T(6)),
    "inner": lambda: (T(5, 6), T(7, 6)),
    "outer": lambda: (T(5), T(6)),
    "ger": lambda: (T(5), T(6)),
    "addmm": lambda: (T(5, 7), T(5, 6), T(6, 7)),
    "addmv": lambda: (T(5), T(5, 6), T(6)),
    "addbmm": lambda: (T(5, 7), T(2, 5, 6), T(2, 6, 7)),
    "addr": lambda: (T(5, 6), T(5), T(6)),
    "baddbmm": lambda: (T(2, 5, 7), T(2, 5, 6), T(2, 6, 7)),
    "chain_matmul": lambda: (T(5, 6), T(6, 7), T(7, 2)),
    "multi_dot": lambda: ([T(5, 6), T(6, 7), T(7, 2)],),
    "einsum": lambda: ("ij,jk->ik", T(5, 6), T(6, 7)),
    "tensordot": lambda: (T(5, 6), T(6, 7), 1),
    "scaled_dot_product_attention": lambda: (T(2, 2, 5, 4), T(2, 2, 5, 4), T(2, 2, 5, 4)),
    "multi_head_attention_forward": _attention,
    "_native_multi_head_attention": _native_attention,
    "lstm": lambda: (T(5, 2, 4), [T(1, 2, 3), T(1, 2, 3)], *_rnn(4)),
    "gru": lambda: (T(5, 2, 4), T(1, 2, 3), *_rnn(3)),
    "rnn_tanh": lambda: (T(5, 2, 4), T(1, 2, 3), *_rnn(1)),
    "rnn_relu": lambda: (T(5, 2, 4), T(1, 2, 3), *_rnn(1)),
    "lstm_cell": lambda: (T(2, 4), [T(2, 3), T(2, 3)], *_cell(4)),
    "gru_cell": lambda: (T(2, 4), T(2, 3), *_cell(3)),
    "rnn_tanh_cell": lambda: (T(2, 4), T(2, 3), *_cell(1)),
    "rnn_relu_cell": lambda: (T(2, 4), T(2, 3), *_cell(1)),
}

WIDE_CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "layer_norm": lambda: (T(4, 6), (6,), T(6), T(6)),
    "group_norm": lambda: (T(4, 6, 3), 2, T(6), T(6)),
    "rms_norm": lambda: (T(4, 6), (6,), T(6)),
    "relu": lambda: (T(4, 6),),
    "relu_": lambda: (T(4, 6),),
}


class Entry(NamedTuple):
    name: str
    function: Callable[..., Any]


def _entries(names: tuple[str, ...]) -> list[Entry]:
    return [Entry(name, function) for function, name in functions_named(names).items()]


def _ident(entry: Entry) -> str:
    return f"{entry.name}-{getattr(entry.function, '__module__', None) or 'Tensor'}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_product_has_a_case() -> None:
    assert set(arithmetic.PRODUCTS) == set(PRODUCT_CASES)
    assert set(arithmetic.WIDE) == set(WIDE_CASES)


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated")  # torch's; it is in the table all the same
@pytest.mark.parametrize("entry", _entries(arithmetic.PRODUCTS), ids=_ident)
def test_a_product_is_bit_for_bit_half_operands_float32_arithmetic_half_result(entry: Entry) -> None:
    args = cast_floats(PRODUCT_CASES[entry.name](), torch.float16)
    expected = tensors_in(cast_floats(entry.function(*cast_floats(args, torch.float32)), torch.float16))
    with HalfArithmetic():
        found = tensors_in(entry.function(*args))
    assert [tensor.dtype for tensor in found] == [torch.float16] * len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated")
@pytest.mark.parametrize("entry", _entries(arithmetic.PRODUCTS), ids=_ident)
def test_autocast_rounds_float32_operands_and_keeps_float64(entry: Entry) -> None:
    args = PRODUCT_CASES[entry.name]()
    rounded = cast_floats(cast_floats(args, torch.float16), torch.float32)
    expected = tensors_in(cast_floats(entry.function(*rounded), torch.float16))
    with HalfArithmetic(autocast=True):
        found = tensors_in(entry.function(*args))
        if entry.name != "_native_multi_head_attention":  # has no float64 kernel
            wide = tensors_in(entry.function(*cast_floats(args, torch.float64)))
            assert all(tensor.dtype == torch.float64 for tensor in wide)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("entry", _entries(arithmetic.WIDE), ids=_ident)
def test_a_wide_function_takes_mixed_types_and_rounds_once(entry: Entry) -> None:
    first, *rest = WIDE_CASES[entry.name]()
    x = first.half()
    expected = entry.function(x.float(), *rest).half()
    with HalfArithmetic():
        found = entry.function(x, *rest)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float16


@pytest.mark.parametrize("entry", _entries(arithmetic.FLOAT32), ids=_ident)
def test_every_float32_entry_is_offered_by_torch_and_is_no_product(entry: Entry) -> None:
    assert callable(entry.function)
    assert entry.name not in arithmetic.PRODUCTS


def test_autocast_runs_softmax_sums_and_losses_in_float32() -> None:
    x, target = (T(4, 6) * 8).half(), torch.tensor([0, 1, 2, 3])
    with HalfArithmetic(autocast=True):
        assert F.softmax(x, 1).dtype == x.softmax(1).dtype == torch.softmax(x, 1).dtype == torch.float32
        loss = F.cross_entropy(x, target)
        total = torch.full((1000,), 100.0, dtype=torch.float16).sum()
    assert torch.equal(loss, F.cross_entropy(x.float(), target))
    assert float(total) == 100_000  # overflows in half
    with HalfArithmetic():
        assert F.softmax(x, 1).dtype == torch.float16


def test_conv_agrees_with_a_float64_reference_to_one_rounding_of_the_result() -> None:
    x, w = T(2, 3, 7, 7).half(), T(4, 3, 3, 3).half()
    with HalfArithmetic():
        found = F.conv2d(x, w).double().numpy()
    exact = reference.conv2d(x.double().numpy(), w.double().numpy())
    magnitude = reference.conv2d(np.abs(x.double().numpy()), np.abs(w.double().numpy()))
    # one half rounding of the result, and K = 27 float32 roundings of the sum (products of halves are exact)
    bound = FP16.unit_roundoff * np.abs(exact) * (1 + FP16.eps) + 27 * FP32.unit_roundoff * 2 * magnitude
    assert (np.abs(found - exact) <= bound + FP16.min_subnormal / 2).all()


def test_the_backward_rounds_incoming_and_outgoing_gradients_to_half() -> None:
    x = T(5, 6).half().requires_grad_()
    w = T(7, 6).half().requires_grad_()
    dy = T(5, 7).half()
    with HalfArithmetic():
        F.linear(x, w).backward(dy)
    dx, dw = reference.linear_gradients(*(tensor.detach().double().numpy() for tensor in (x, w, dy)))
    assert x.grad is not None
    assert w.grad is not None
    for found, exact in ((x.grad, dx), (w.grad, dw)):
        assert found.dtype == torch.float16
        # within float32 of the sum's error before the rounding: the neighbour at most where a tie is near
        wrong = found.double().numpy() != reference.half(exact)
        assert np.allclose(found.double().numpy()[wrong], exact[wrong], rtol=FP16.eps)
        assert wrong.mean() < 0.05


def test_weight_gradients_under_autocast_are_float32_values_that_fit_in_half() -> None:
    x, w = T(5, 6), T(7, 6).requires_grad_()
    with HalfArithmetic(autocast=True):
        y = F.linear(x, w)
    y.backward(torch.ones_like(y))
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert torch.equal(w.grad, w.grad.half().float())


def test_float32_islands_are_left_alone_unless_autocast_is_on() -> None:
    a, b = T(5, 6), T(6, 7)
    with HalfArithmetic():
        assert torch.equal(a @ b, torch.matmul(a.clone(), b))
        assert (a @ b).dtype == torch.float32
        assert (a.half() @ b).dtype == torch.float16


def test_nested_contexts_count_once() -> None:
    a = T(3, 3)
    with HalfArithmetic():
        with HalfArithmetic(autocast=True):
            assert (a @ a).dtype == torch.float32
        assert (a.half() @ a).dtype == torch.float16
    with pytest.raises(RuntimeError):  # closed again: torch refuses mixed types
        a.half() @ a


def test_relu_in_place_writes_into_its_argument() -> None:
    for apply in (torch.relu_, Tensor.relu_, nn.ReLU(inplace=True), lambda x: F.relu(x, True)):
        base = T(8).half().requires_grad_()
        x = base * 1
        with HalfArithmetic():
            y = apply(x)
        assert y is x
        y.sum().backward()
        assert base.grad is not None
        assert torch.equal(base.grad, (base > 0).half())


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 3, batch_first=True), lambda: nn.GRU(4, 3), lambda: nn.RNN(4, 3)])
def test_recurrent_modules_train_in_half(make: Callable[[], nn.Module]) -> None:
    module = make().half()
    with HalfArithmetic():
        output, _ = module(T(2, 5, 4).half())
    output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_layer_runs_in_half(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).half().train(train)
    with HalfArithmetic(), torch.set_grad_enabled(train):
        assert layer(T(2, 5, 8).half()).dtype == torch.float16


def test_trees_keep_their_types() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: int

    tree = {"a": [T(2), 3], "b": Pair(T(2), 4), "c": (torch.ones(2, dtype=torch.long), None)}
    cast = cast_floats(tree, torch.float16)
    assert isinstance(cast["b"], Pair)
    assert cast["a"][0].dtype == cast["b"].left.dtype == torch.float16
    assert cast["c"][0].dtype == torch.long
    assert tree["a"][0].dtype == torch.float32  # type: ignore[index]


def test_an_unknown_function_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no function 'conv9d'"):
        functions_named(["conv9d"])
