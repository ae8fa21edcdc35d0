"""The compiled CPU kernels, called through ctypes: no torch headers, so one build serves every torch.

The library is built with the package where there is a C compiler (sources in `csrc/`). Where there is none the
reference computes the same, slower; `why_not()` says so, and `lowprec doctor` prints it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.functional import L1_CONSTANT, linf_constant
from lowprec.kernels.layout import bits_shape, is_rows
from lowprec.kernels.reference import Gradients, Normalised

_ABI = 1
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INSTRUCTION_SETS = ("portable", "avx2", "avx512")
_MOST_EXTREMES = 64
# Results above this size are written around the cache, which they would only empty.
_STREAM_BYTES = 16 << 20
_BITS_NONE, _BITS_SIGN, _BITS_ACTIVE = range(3)

_P, _I32, _I64, _F64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class _Shape(ctypes.Structure):
    """`struct shape` of csrc/norm.h."""

    _fields_ = (
        *((name, _I64) for name in ("samples", "channels", "length")),
        *((name, _I32) for name in ("rows", "type", "isa", "threads", "stream", "k")),
        ("constant", _F64),
    )


class _Forward(ctypes.Structure):
    """`struct forward` of csrc/norm.h."""

    _fields_ = (
        ("shape", _Shape),
        *((name, _P) for name in ("x", "residual", "weight", "bias", "y", "mean", "scale", "bits", "extremes")),
        ("eps", _F64),
        *((name, _I32) for name in ("relu", "bits_kind")),
    )


class _Backward(ctypes.Structure):
    """`struct backward` of csrc/norm.h."""

    _fields_ = (
        ("shape", _Shape),
        *((name, _P) for name in ("grad_y", "kept", "mean", "scale", "weight", "bias", "grad_mean", "grad_scale")),
        *((name, _P) for name in ("bits", "extremes", "dx", "dresidual", "dweight", "dbias")),
        *((name, _I32) for name in ("relu", "from_output")),
    )


class _Library:
    """The loaded library and the instruction set that it uses: the best that this processor has."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        found = library.lowprec_abi()
        if found != _ABI:
            raise OSError(f"{path} was built for another lowprec (interface {found}, not {_ABI}); install it again")
        present = library.lowprec_instruction_sets()
        self.available = [name for bit, name in enumerate(_INSTRUCTION_SETS) if present >> bit & 1]
        self.isa = len(self.available) - 1
        self.forward = library.lowprec_norm_forward
        self.backward = library.lowprec_norm_backward
        self.output_suffices = library.lowprec_output_suffices
        self.output_suffices.argtypes = (_P, _P, _I64, ctypes.c_float)
        with suppress(AttributeError):  # a torch without OpenMP; one thread then
            # torch's own threads: a second pool would compete with them for the cores
            library.lowprec_use_threads(ctypes.CDLL(None).GOMP_parallel)


@cache
def _load() -> _Library | str:
    """The library, or the reason why there is none."""
    spec = find_spec("lowprec.kernels._norm")
    if spec is None or spec.origin is None:
        return "the CPU kernels were not built; install a C compiler, then lowprec again"
    try:
        return _Library(spec.origin)
    except OSError as error:
        return f"the CPU kernels cannot be loaded: {error}"


def why_not() -> str | None:
    """Why the compiled kernels cannot be used here; None when they can."""
    library = _load()
    return library if isinstance(library, str) else None


def instruction_sets() -> list[str]:
    """What this processor can run, slowest first; empty without the library."""
    library = _load()
    return [] if isinstance(library, str) else list(library.available)


@contextmanager
def use(instruction_set: str) -> Iterator[None]:
    """Another instruction set than the best, inside the context; for tests.

    Raises:
        ConfigError: it is not one of `instruction_sets()`.
    """
    library = _load()
    if isinstance(library, str) or instruction_set not in library.available:
        raise ConfigError(f"no CPU kernels for {instruction_set!r} here; there are {instruction_sets()}")
    before, library.isa = library.isa, _INSTRUCTION_SETS.index(instruction_set)
    try:
        yield
    finally:
        library.isa = before


def can_run(x: Tensor, k: int) -> bool:
    """Whether there are compiled kernels for tensors like `x` and this many extremes."""
    return x.dtype in _TYPES and k <= _MOST_EXTREMES and x.numel() > 0 and not isinstance(_load(), str)


def output_suffices(weight: Tensor, bias: Tensor | None, limit: float) -> bool | None:
    """Whether |weight| > limit (|weight| + |bias|) in every channel; None where this cannot tell."""
    library = _load()
    if isinstance(library, str) or not _plain(weight) or (bias is not None and not _plain(bias)):
        return None
    return bool(library.output_suffices(weight.data_ptr(), _address(bias), weight.numel(), limit))


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    k: int,
    eps: float,
    relu: bool,
    from_output: bool,
) -> Normalised:
    """`reference.norm_forward`, compiled; x and residual in one canonical layout."""
    plan = _plan(x.shape, x.stride(), x.dtype, k)
    kind = _BITS_ACTIVE if relu and not from_output else _BITS_SIGN if from_output and k == 0 else _BITS_NONE
    out = Normalised(
        torch.empty_like(x),
        torch.empty(plan.channels),
        torch.empty(plan.channels),
        torch.empty(plan.bits_shape if kind else 0, dtype=torch.uint8),
        torch.empty((plan.channels, plan.k) if k else 0, dtype=torch.int64),
    )
    weight, bias = _float(weight), _float(bias)
    arguments = _Forward(
        plan.shape(), x.data_ptr(), _address(residual), _address(weight), _address(bias),
        *(tensor.data_ptr() for tensor in out), eps, relu, kind,
    )  # fmt: skip
    _run("forward", arguments)
    return out


def norm_backward(
    grad_y: Tensor,
    kept: Tensor,
    mean: Tensor,
    scale: Tensor,
    bits: Tensor,
    extremes: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_mean: Tensor | None,
    grad_scale: Tensor | None,
    k: int,
    relu: bool,
    from_output: bool,
    has_residual: bool,
) -> Gradients:
    """`reference.norm_backward`, compiled; grad_y and kept in one canonical layout."""
    residual = torch.empty_like(kept) if relu and has_residual else kept.new_empty(0)
    out = Gradients(torch.empty_like(kept), torch.empty_like(scale), torch.empty_like(scale), residual)
    channel_values = [_float(value) for value in (mean, scale, weight, bias, grad_mean, grad_scale)]
    arguments = _Backward(
        _plan(kept.shape, kept.stride(), kept.dtype, k).shape(), grad_y.data_ptr(), kept.data_ptr(),
        *(_address(value) for value in channel_values), _address(bits), _address(extremes),
        _address(out.x), _address(residual if residual.numel() else None), _address(out.weight), _address(out.bias),
        relu, from_output,
    )  # fmt: skip
    _run("backward", arguments)
    return out


@dataclass(frozen=True)
class _Plan:
    """What a call needs to know of its tensors, worked out once for every kind of tensor."""

    fields: tuple[int, int, int, bool, int]  # samples, channels, length, rows, type of `_Shape`
    streamable_bytes: int  # of a result whose rows are whole cache lines, else 0
    k: int
    constant: float
    bits_shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.fields[1]

    def shape(self) -> _Shape:
        library = _load()
        assert isinstance(library, _Library)
        stream = self.streamable_bytes > _STREAM_BYTES
        return _Shape(*self.fields, library.isa, torch.get_num_threads(), stream, self.k, self.constant)


@lru_cache(maxsize=1024)
def _plan(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, k: int) -> _Plan:
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    rows, channels, count = is_rows(like), shape[1], like.numel() // shape[1]
    samples = count if rows else shape[0]
    row_bytes = (channels if rows else count // samples) * like.element_size()
    return _Plan(
        fields=(samples, channels, count // samples, rows, _TYPES[dtype]),
        streamable_bytes=like.numel() * like.element_size() if row_bytes % 64 == 0 else 0,
        k=min(k, count),
        constant=linf_constant(count) if k else L1_CONSTANT,
        bits_shape=bits_shape(like),
    )


def _float(value_C: Tensor | None) -> Tensor | None:
    if value_C is None or _plain(value_C):
        return value_C
    return value_C.detach().float().contiguous()


def _plain(value_C: Tensor) -> bool:
    return value_C.dtype == torch.float32 and value_C.is_contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, arguments: Any) -> None:
    library = _load()
    if getattr(library, name)(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the working space of lowprec's norm {name}")
