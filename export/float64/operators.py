"""Convolution and pooling in numpy, where onnx's own reference evaluation is too slow.

onnx's ReferenceEvaluator is the truth for every other operator. These few are replaced for a measured reason: its
MaxPool and ConvTranspose loop in Python over every output (hours for an ImageNet network), its Conv builds an im2col
copy by fancy indexing, and its pools that round their length up (ceil_mode) give lengths and means that neither
onnxruntime nor torch nor onnx's own shape inference gives. Each is checked against the original or against torch.

Shape suffixes: N sample, C input channel, O output channel, G group, S all spatial axes, K all kernel axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from lowprec.export.float64.exact import EXACT_OPERATORS
from lowprec.export.float64.repaired import repaired_operators

Array = NDArray[Any]
# Values in one block of gathered windows: 2^22 float64 are 32 MiB, large enough for BLAS, small beside the activations.
_BLOCK_VALUES = 2**22


def resolve_pads(
    auto_pad: str | None,
    pads: Sequence[int] | None,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis.

    SAME_*: output length ceil(length / stride), so the total is (out - 1) * stride + dilation * (kernel - 1) + 1 -
    length, the odd one after (SAME_UPPER) or before (SAME_LOWER). VALID: none. Otherwise `pads` as given.
    Source: ONNX operator specification, Conv, attribute auto_pad.
    """
    axes = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
            for n, k, s, d in zip(spatial, kernel, strides, dilations, strict=True)
        ]
        small = [total // 2 for total in totals]
        large = [total - half for total, half in zip(totals, small, strict=True)]
        return (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    if auto_pad == "VALID" or not pads:
        return [0] * axes, [0] * axes
    return list(pads[:axes]), list(pads[axes:])


def overhang(
    padded: Sequence[int], after: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """How far the last window of a pool that rounds its length up reaches beyond each padded axis.

    Length ceil((padded - reach) / stride) + 1, one less where the last window would start in the padding after.
    Source: ONNX operator specification, MaxPool, attribute ceil_mode.
    """
    extra = []
    for n, a, k, s, d in zip(padded, after, kernel, strides, dilations, strict=True):
        reach = d * (k - 1) + 1
        steps = math.ceil((n - reach) / s)
        steps -= steps * s >= n - a and steps > 0
        extra.append(max(0, steps * s + reach - n))
    return extra


def windows(x_NCS: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """A read-only view (N, C, out..., kernel...) of every window of an array that is padded already."""
    spatial = x_NCS.shape[2:]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(spatial, kernel, strides, dilations, strict=True)]
    steps = x_NCS.strides[2:]
    return as_strided(
        x_NCS,
        (*x_NCS.shape[:2], *out, *kernel),
        (
            *x_NCS.strides[:2],
            *(step * s for step, s in zip(steps, strides, strict=True)),
            *(step * d for step, d in zip(steps, dilations, strict=True)),
        ),
        writeable=False,
    )


def pad_spatial(x_NCS: Array, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Array:
    """Pads the spatial axes with `fill`; the array itself when there is nothing to pad."""
    if not any(before) and not any(after):
        return x_NCS
    widths = [(0, 0), (0, 0), *zip(before, after, strict=True)]
    return np.pad(x_NCS, widths, constant_values=fill)


def convolve(x_NCS: Array, w_OCK: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    """Cross-correlation of a padded input, as ONNX's Conv: y[n,o,s] = sum over c,k of w[o,c,k] x[n,c,s*stride+k*dil].

    One BLAS product per group and sample, accumulated in the arrays' own type (float64 here).

    Args:
        x_NCS: (N, G*C, spatial...), padded already.
        w_OCK: (G*O, C, kernel...).
        strides: one per spatial axis.
        dilations: one per spatial axis.
        groups: G.
    """
    kernel = w_OCK.shape[2:]
    view = windows(x_NCS, kernel, strides, dilations)
    axes, out = len(kernel), view.shape[2 : 2 + len(kernel)]
    samples, outputs, depth = x_NCS.shape[0], w_OCK.shape[0], w_OCK.shape[1]
    terms, places = depth * math.prod(kernel), math.prod(out)
    y = np.empty((samples, outputs, places), np.result_type(x_NCS, w_OCK))
    block = max(1, _BLOCK_VALUES // max(1, terms * places))
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    for group in range(groups):
        rows = slice(group * outputs // groups, (group + 1) * outputs // groups)
        w_OT = w_OCK[rows].reshape(-1, terms)
        part = view[:, group * depth : (group + 1) * depth].transpose(order)
        for start in range(0, samples, block):
            columns_NTS = part[start : start + block].reshape(-1, terms, places)
            np.matmul(w_OT, columns_NTS, out=y[start : start + block, rows])
    return y.reshape(samples, outputs, *out)


def dilate_with_zeros(x_NCS: Array, strides: Sequence[int]) -> Array:
    """Puts stride - 1 zeros between neighbours along each spatial axis."""
    spatial = [(n - 1) * s + 1 for n, s in zip(x_NCS.shape[2:], strides, strict=True)]
    spread = np.zeros((*x_NCS.shape[:2], *spatial), x_NCS.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x_NCS
    return spread


def transposed_kernel(w_COK: Array, groups: int) -> Array:
    """The kernel of the plain convolution that computes a transposed one: flipped, groups' axes swapped.

    (G*C, O, kernel...) -> (G*O, C, kernel...).
    """
    per_group = w_COK.reshape(groups, w_COK.shape[0] // groups, *w_COK.shape[1:])
    flipped = np.flip(per_group, axis=tuple(range(3, per_group.ndim))).swapaxes(1, 2)
    return flipped.reshape(-1, *flipped.shape[2:])


def add_bias(y_NOS: Array, bias: Array | None) -> Array:
    """Adds (O,) along axis 1."""
    return y_NOS if bias is None else y_NOS + bias.reshape(-1, *[1] * (y_NOS.ndim - 2))


class Conv(OpRun):
    """Conv of any rank, group, stride, dilation and padding."""

    op_domain = ""

    def _run(
        self, X: Array, W: Array, B: Array | None = None, auto_pad: str | None = None,
        dilations: Sequence[int] | None = None, group: int | None = None, kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
    ) -> tuple[Array]:  # fmt: skip
        kernel = W.shape[2:]
        steps, spread = strides or [1] * len(kernel), dilations or [1] * len(kernel)
        before, after = resolve_pads(auto_pad, pads, X.shape[2:], kernel, steps, spread)
        y = convolve(pad_spatial(X, before, after), W, steps, spread, group or 1)
        return (add_bias(y, B),)


class ConvTranspose(OpRun):
    """Transposed convolution: zeros between the inputs, then a plain convolution with the flipped kernel."""

    op_domain = ""

    def _run(
        self, X: Array, W: Array, B: Array | None = None, auto_pad: str | None = None,
        dilations: Sequence[int] | None = None, group: int | None = None, kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None, output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
    ) -> tuple[Array]:  # fmt: skip
        kernel, axes = W.shape[2:], W.ndim - 2
        steps, spread = strides or [1] * axes, dilations or [1] * axes
        extra = output_padding or [0] * axes
        reach = [d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
        before = list(pads[:axes]) if pads else [0] * axes
        after = list(pads[axes:]) if pads else [0] * axes
        y = pad_spatial(dilate_with_zeros(X, steps), reach, [r + e for r, e in zip(reach, extra, strict=True)])
        y = convolve(y, transposed_kernel(W, group or 1), [1] * axes, spread, group or 1)
        crop = tuple(slice(b, n - a) for b, a, n in zip(before, after, y.shape[2:], strict=True))
        return (add_bias(y[(slice(None), slice(None), *crop)], B),)


class MaxPool(OpRun):
    """MaxPool with one output; padding never wins."""

    op_domain = ""

    def _run(
        self, x: Array, auto_pad: str | None = None, ceil_mode: int | None = None,
        dilations: Sequence[int] | None = None, kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None, storage_order: int | None = None, strides: Sequence[int] | None = None,
    ) -> tuple[Array]:  # fmt: skip
        kernel = list(kernel_shape or ())
        steps, spread = strides or [1] * len(kernel), dilations or [1] * len(kernel)
        before, after = resolve_pads(auto_pad, pads, x.shape[2:], kernel, steps, spread)
        fill = -np.inf if x.dtype.kind == "f" else float(np.iinfo(x.dtype).min)
        padded = pad_spatial(x, before, after, fill)
        if ceil_mode:
            padded = pad_spatial(
                padded, [0] * len(kernel), overhang(padded.shape[2:], after, kernel, steps, spread), fill
            )
        return (windows(padded, kernel, steps, spread).max(axis=tuple(range(-len(kernel), 0))),)


class AveragePool(OpRun):
    """AveragePool; the divisor counts padding only where count_include_pad says so."""

    op_domain = ""

    def _run(
        self, x: Array, auto_pad: str | None = None, ceil_mode: int | None = None,
        count_include_pad: int | None = None, dilations: Sequence[int] | None = None,
        kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:  # fmt: skip
        kernel = list(kernel_shape or ())
        steps, spread = strides or [1] * len(kernel), dilations or [1] * len(kernel)
        before, after = resolve_pads(auto_pad, pads, x.shape[2:], kernel, steps, spread)
        window_axes, none = tuple(range(-len(kernel), 0)), [0] * len(kernel)
        padded = pad_spatial(x, before, after)
        ones = pad_spatial(np.ones((1, 1, *x.shape[2:]), x.dtype), before, after, float(count_include_pad or 0))
        extra = overhang(padded.shape[2:], after, kernel, steps, spread) if ceil_mode else none
        total, count = (
            windows(pad_spatial(part, none, extra), kernel, steps, spread).sum(axis=window_axes)
            for part in (padded, ones)
        )
        return (total / count,)


def float64_operators(model: onnx.ModelProto) -> list[type[OpRun]]:
    """The replacements that serve every node of their kind in this model.

    An operator stays with onnx's own implementation when one of its nodes asks for what the replacement leaves out:
    a second output (indices), or a transposed convolution sized by output_shape or auto_pad.
    """
    plain: dict[tuple[str, str], object] = {
        ("ConvTranspose", "auto_pad"): b"NOTSET",
        ("ConvTranspose", "output_shape"): None,
    }
    left = set()
    for node in model.graph.node:
        for attribute in node.attribute:
            key = (node.op_type, attribute.name)
            if key in plain and onnx.helper.get_attribute_value(attribute) != plain[key]:
                left.add(node.op_type)
        if node.op_type == "MaxPool" and len([name for name in node.output if name]) > 1:
            left.add(node.op_type)
    table: list[type[OpRun]] = [Conv, ConvTranspose, MaxPool, AveragePool]
    kept = [operator for operator in table if operator.__name__ not in left]
    return [*kept, *EXACT_OPERATORS, *repaired_operators(model)]
