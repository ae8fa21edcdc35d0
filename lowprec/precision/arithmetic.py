"""Half storage, wide accumulation: what tensor cores compute, also on a CPU and at nearly float32 speed.

torch's own half kernels on a CPU are one to two orders of magnitude slower than float32 (a 64->64 3x3 convolution: 120
times forward), and whether they accumulate in half is an implementation detail. Here the definition is explicit: a
product takes operands of half precision, is computed in float32, and its result is rounded once to half,

    conv(x, w, b) = half( conv_float32( float32(half(x)), float32(half(w)), float32(half(b)) ) ),

in the backward as well, because autograd differentiates the casts: incoming gradients are half, products of gradients
are computed in float32 and rounded to half. A torch-function mode is the seam, not a dispatch mode: it works above
autograd, so that nothing of the backward has to be written by hand, and it exists only while a block runs.
One table per rule, below; what is in none of them runs as torch has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# fmt: off (one name per line would hide the groups)
PRODUCTS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "linear",
    "bilinear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "mv",
    "dot",
    "vdot",
    "inner",
    "outer",
    "ger",
    "addmm",
    "addmv",
    "addbmm",
    "addr",
    "baddbmm",
    "chain_matmul",
    "multi_dot",
    "einsum",
    "tensordot",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
)
# fmt: on
"""Functions whose operands are half, whose arithmetic is float32 and whose result is half."""

WIDE = ("layer_norm", "group_norm", "rms_norm", "relu", "relu_")
"""Functions computed in float32 and rounded to the type of their first operand.

The norms because their parameters are float32 and not every kernel mixes types; relu, which rounds nothing, because its
half backward is 20 times slower than float32's on a CPU. Batch and instance norm are absent: torch's kernels take half
inputs with float32 parameters, accumulate in float32 and round once.
"""

# fmt: off
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow", "__pow__", "__rpow__", "softplus", "norm", "vector_norm", "frobenius_norm",
    "nuclear_norm", "renorm", "dist", "pdist", "cdist", "prod", "sum", "cumsum", "cumprod", "logsumexp", "softmax",
    "log_softmax", "softmin", "layer_norm", "group_norm", "rms_norm", "cosine_similarity", "nll_loss",
    "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss",
    "gaussian_nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss",
    "margin_ranking_loss", "multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss",
    "hinge_embedding_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss", "cosine_embedding_loss",
    "ctc_loss",
)
# fmt: on
"""Functions that autocast runs in float32, with a float32 result.

Source: torch.amp's list for CUDA (docs/source/amp.md, "CUDA Ops that can autocast to float32"), and the Python
functions built on those.
"""

_HOMES: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch.linalg)
_NARROWABLE = (torch.float16, torch.bfloat16, torch.float32)

_active: ContextVar[HalfArithmetic | None] = ContextVar("lowprec_half_arithmetic", default=None)


def functions_named(names: Iterable[str]) -> dict[Callable[..., Any], str]:
    """All callables that torch offers under these names: as a function, a Tensor method and a functional.

    Raises:
        AttributeError: this version of torch has none of that name.
    """
    found: dict[Callable[..., Any], str] = {}
    for name in names:
        callables = [getattr(home, name) for home in _HOMES if hasattr(home, name)]
        if not callables:
            raise AttributeError(f"torch {torch.__version__} has no function {name!r}")
        found.update(dict.fromkeys(callables, name))
    return found


_PRODUCTS = functions_named(PRODUCTS)
_WIDE = functions_named(WIDE)
_FLOAT32 = functions_named(FLOAT32)


class HalfArithmetic(TorchFunctionMode):
    """Runs torch functions with half operands and float32 accumulation while the context is open.

    On a CPU products follow the definition in the module docstring, bit for bit. On other devices the native kernels
    are that already, and only operands whose types differ are cast. A product none of whose operands is half (a
    float32 island that the model makes on purpose) is left alone, unless `autocast` is set.

    Entering it while one is open already does nothing, so a model's own hook and a surrounding block do not add up.

    Args:
        autocast: also narrows float32 operands of products, and runs the functions of `FLOAT32` in float32.
        dtype: the half type.
    """

    def __init__(self, autocast: bool = False, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.autocast = autocast
        self.dtype = dtype
        self._tokens: list[Token[HalfArithmetic | None] | None] = []

    def __enter__(self) -> HalfArithmetic:
        if _active.get() is not None:
            self._tokens.append(None)
            return self
        super().__enter__()  # type: ignore[no-untyped-call]
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, *error: Any) -> None:
        token = self._tokens.pop()
        if token is not None:
            _active.reset(token)
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.autocast and func in _FLOAT32:
            return func(*_widened(args, self.dtype), **_widened(kwargs, self.dtype))
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        if func in _WIDE:
            return self._wide(func, args, kwargs)
        return func(*args, **kwargs)

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
        narrow = [tensor.dtype == self.dtype for tensor in operands]
        castable = all(tensor.dtype in _NARROWABLE for tensor in operands)
        if not operands or not castable or not (self.autocast or any(narrow)) or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if not all(narrow):
            args, kwargs = cast_floats((args, kwargs), self.dtype)
        if operands[0].device.type != "cpu":
            return func(*args, **kwargs)
        args, kwargs = cast_floats((args, kwargs), torch.float32)
        return cast_floats(func(*args, **kwargs), self.dtype)

    def _wide(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = tensors_in((args, kwargs))
        if not operands or operands[0].dtype != self.dtype or not self._must_widen(operands):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = _widened(args, self.dtype), _widened(kwargs, self.dtype)
        result = cast_floats(func(*wide_args, **wide_kwargs), self.dtype)
        in_place = _WIDE[func].endswith("_") or kwargs.get("inplace", len(args) > 1 and args[1] is True)
        return operands[0].copy_(result) if in_place else result

    def _must_widen(self, operands: list[Tensor]) -> bool:
        mixed = any(tensor.is_floating_point() and tensor.dtype != self.dtype for tensor in operands)
        return mixed or operands[0].device.type == "cpu"


def cast_floats(tree: Any, dtype: torch.dtype) -> Any:
    """`tree` with every floating tensor in it cast to `dtype`; other leaves, and their order, stay.

    Walks dicts, lists, tuples (named ones too) and dataclasses; a subclass of dict is rebuilt by its own class.
    """
    return _mapped(tree, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in `tree`, in the order in which they appear."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(tree, note)
    return found


def _widened(tree: Any, narrow: torch.dtype) -> Any:
    return _mapped(tree, lambda tensor: tensor.float() if tensor.dtype == narrow else tensor)


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        items = [_mapped(item, function) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _mapped(getattr(tree, field.name), function) for field in fields(tree)})
    if isinstance(tree, dict):
        return type(tree)({key: _mapped(value, function) for key, value in tree.items()})
    return tree
