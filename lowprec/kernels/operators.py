"""The fused norm as two registered operators, so that compile, export and autograd see through it.

    lowprec::norm           x, weight, bias, residual, ... -> y, mean, scale, bits, extremes
    lowprec::norm_backward  -> dx, dweight, dbias, dresidual

Statistics are returned, not written. On a CPU the compiled kernels (`native`) run, on a CUDA device the Triton ones
(`triton_norm`), and where neither is there, or for float64, the reference. Formulas and meanings: `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowprec.functional import accumulation_dtype, cast
from lowprec.kernels import native, reference
from lowprec.kernels.layout import bits_shape, canonical, laid_out_as
from lowprec.kernels.reference import Gradients, Normalised
from lowprec.packages import is_installed

_LIBRARY: Any = torch.library.Library("lowprec", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int k, float eps, bool relu, bool from_output)"
    " -> (Tensor y, Tensor mean, Tensor scale, Tensor bits, Tensor extremes)",
    tags=_TAGS,
)
_LIBRARY.define(
    "norm_backward(Tensor grad_y, Tensor kept, Tensor mean, Tensor scale, Tensor bits, Tensor extremes, Tensor? weight,"
    " Tensor? bias, Tensor? grad_mean, Tensor? grad_scale, int k, bool relu, bool from_output, bool has_residual)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=_TAGS,
)


def fused_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    k: int = 0,
    eps: float = 1e-5,
    relu: bool = False,
    from_output: bool = False,
) -> Normalised:
    """y = relu(weight * (x - mean) / S + bias + residual) with the statistics of this batch.

    Args:
        x: (N, C, ...) with more than one element per channel; float32, bfloat16, float16 or float64.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        residual: of x's shape and dtype, added before the ReLU, or None.
        k: 0 for the L1 scale, else the scale of the k largest deviations (1: L-infinity).
        eps: added to the scale.
        relu: whether there is a ReLU.
        from_output: keep y and one bit per element for the backward instead of x; needs `relu`, no residual, and a
            weight for which `choice.output_suffices`.

    Source of the scales: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018.
    """
    call: Any = torch.ops.lowprec.norm if _traced(x) else _FusedNorm.apply
    return Normalised(*call(x, weight, bias, residual, k, eps, relu, from_output))


_switched_off = False  # a plain global: torch.compile can guard it


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, norms compute in operations of torch alone: for traces whose readers know no others."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def kernels_apply(x: Tensor) -> bool:
    """Whether `fused_norm` can be used on `x`: not inside vmap and not in forward-mode differentiation."""
    if _switched_off:
        return False
    if torch.compiler.is_compiling():
        return True
    mapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not mapped and forward_ad.unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]


def _forward(x: Tensor, weight: Any, bias: Any, residual: Any, *options: Any) -> Normalised:
    x = canonical(x)
    residual = None if residual is None else laid_out_as(residual, x)
    result: Normalised = _kernels(x, options[0]).norm_forward(x, weight, bias, residual, *options)
    # Autograd lets nobody write into an output that is a view, and an in-place ReLU or sum may come next.
    return result._replace(y=result.y.clone()) if result.y._is_view() else result


def _backward(grad_y: Tensor, kept: Tensor, *rest: Any) -> Gradients:
    kept, k = canonical(kept), rest[-4]
    result: Gradients = _kernels(kept, k).norm_backward(laid_out_as(grad_y, kept), kept, *rest)
    return result


def _kernels(x: Tensor, k: int) -> Any:
    """The module that has the two functions for tensors like `x`."""
    if x.device.type == "cpu" and native.can_run(x, k):
        return native
    if x.device.type == "cuda" and (triton_norm := _triton()) is not None and triton_norm.can_run(x, k):
        return triton_norm
    return reference


@cache
def _triton() -> Any:
    """The Triton kernels; None where Triton is not installed."""
    if not is_installed("triton"):
        return None
    from lowprec.kernels import triton_norm

    return triton_norm


def _fake_forward(
    x: Tensor, weight: Any, bias: Any, residual: Any, k: int, eps: float, relu: bool, from_output: bool
) -> Normalised:
    x = canonical(x)
    channels, count = x.shape[1], x.numel() // x.shape[1]
    has_bits = (relu and not from_output) or (from_output and k == 0)
    return Normalised(
        torch.empty_like(x),
        x.new_empty(channels, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(channels, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(bits_shape(x) if has_bits else 0, dtype=torch.uint8),
        x.new_empty((channels, min(k, count)) if k else 0, dtype=torch.int64),
    )


def _fake_backward(grad_y: Tensor, kept: Tensor, mean: Tensor, scale: Tensor, *rest: Any) -> Gradients:
    *_, relu, _from_output, has_residual = rest
    kept = canonical(kept)
    residual = torch.empty_like(kept) if relu and has_residual else kept.new_empty(0)
    return Gradients(torch.empty_like(kept), torch.empty_like(scale), torch.empty_like(scale), residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Normalised) -> None:
    x, weight, bias, residual, k, _, relu, from_output = inputs
    y, mean, scale, bits, extremes = output
    ctx.save_for_backward(y if from_output else x, mean, scale, bits, extremes, weight, bias)
    ctx.options = (k, relu, from_output, residual is not None)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_mean: Any, grad_scale: Any, *_: Any) -> tuple[Any, ...]:
    kept, mean, scale, bits, extremes, weight, bias = ctx.saved_tensors
    _, relu, _, has_residual = ctx.options
    if grad_y is None:
        grad_y = torch.zeros_like(kept)
    # Twice differentiable: the reference is made of differentiable operations, the kernels are not.
    run: Any
    if torch.is_grad_enabled():
        run = reference.norm_backward
    else:
        run = torch.ops.lowprec.norm_backward if _traced(kept) else _backward
    gradients = Gradients(
        *run(grad_y, kept, mean, scale, bits, extremes, weight, bias, grad_mean, grad_scale, *ctx.options)
    )
    return (
        gradients.x,
        None if weight is None else cast(gradients.weight, weight.dtype),
        None if bias is None else cast(gradients.bias, bias.dtype),
        (gradients.residual if relu else grad_y) if has_residual else None,
        None, None, None, None,
    )  # fmt: skip


class _FusedNorm(torch.autograd.Function):
    """The operator without the dispatcher, whose layers of Python are dear beside a small kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """As `lowprec::norm`."""
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """As the backward of `lowprec::norm`."""
        return _autograd(ctx, *grads)


def _traced(x: Tensor) -> bool:
    """Whether somebody who wants to see an operator looks on: a compiler, an exporter, a dispatch mode."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


for _name, _function in (("norm", _forward), ("norm_backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("lowprec::norm", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("lowprec::norm_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("lowprec::norm", _autograd, setup_context=_setup_context, lib=_LIBRARY)
