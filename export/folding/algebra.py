"""The algebra of folding: per-channel affines before and after a linear operation become its own constants.

Plain numpy in float64 on weights alone, so that one copy serves traced modules and ONNX files, and so that the caller
rounds once. The obvious alternative, torch's `fuse_conv_bn_weights`, computes in the weight's dtype, has no transposed
convolution with groups, and is silent when a constant overflows.

Shape letters: O output channels, I input channels *per group*, G groups, M output channels per group (O = G * M),
C all input channels (C = G * I), K everything behind them (the flattened kernel window, of any rank).

Padding does not matter to an affine on the output, which acts after the sum over the window. On the input a scale
passes any padding of zeros, a shift only a window that reads none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lowprec.affine import ChannelAffine
from lowprec.export.weight_file import let_go

Array = NDArray[np.float64]
LinearKind = Literal["conv", "conv_transpose", "linear", "embedding"]

_BLOCK = 1 << 22
"""Elements that are rounded at a time."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """A weight with factors that are multiplied in where it is read: float64 copies of all weights would be most of
    the memory that a fold takes.

    Args:
        stored: in any floating type; at least two axes.
        factors: float64, each of two axes that broadcast against the weight's first two.
    """

    stored: NDArray[Any]
    factors: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.stored.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.stored.ndim

    def times(self, factor: Array) -> Scaled:
        """The weight with one more factor; factors of one shape are kept as their product."""
        for index, known in enumerate(self.factors):
            if known.shape == factor.shape:
                return Scaled(self.stored, (*self.factors[:index], known * factor, *self.factors[index + 1 :]))
        return Scaled(self.stored, (*self.factors, factor))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        values = self._rows(slice(None)).astype(dtype or np.float64, copy=False)
        let_go(self.stored)
        return values

    def rounded(self, dtype: DTypeLike) -> NDArray[Any]:
        """The weight rounded once, with no float64 copy of all of it."""
        result, start = np.empty(self.shape, dtype), 0
        with np.errstate(over="ignore"):
            for block in self.blocks():
                result[start : start + len(block)] = block
                start += len(block)
        return result

    def blocks(self) -> Iterator[Array]:
        """The weight in float64, some rows at a time."""
        step = max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            yield self._rows(slice(start, start + step))
        let_go(self.stored)

    def largest(self) -> Array:
        """Largest absolute weight of every window, of the first two axes' lengths."""
        found: Array = np.abs(self.stored).reshape(*self.shape[:2], -1).max(2).astype(np.float64)
        for factor in self.factors:
            found *= np.abs(factor)
        let_go(self.stored)
        return found

    def _rows(self, rows: slice) -> Array:
        block = np.array(self.stored[rows], np.float64, order="C")
        for factor in self.factors:
            part = factor if len(factor) == 1 else factor[rows]
            block *= part.reshape(part.shape + (1,) * (self.ndim - 2))
        return block


Stored = NDArray[Any] | Scaled
"""A weight as it is held: in any floating type, or not yet multiplied out. `numpy.asarray` reads both."""


def blocks_of(weight: Stored) -> Iterator[Array]:
    """A weight in float64, a piece at a time, in the order of its elements."""
    if isinstance(weight, Scaled):
        yield from weight.blocks()
        return
    flat = weight.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield np.asarray(flat[start : start + _BLOCK], np.float64)


def transposed(weight: Stored) -> Stored:
    """A weight of two axes with these exchanged."""
    if isinstance(weight, Scaled):
        return Scaled(weight.stored.T, tuple(factor.T for factor in weight.factors))
    return weight.T


def scaled(weight: Stored, factor: Array) -> Scaled:
    """weight * factor, to be multiplied out where it is read."""
    return (weight if isinstance(weight, Scaled) else Scaled(weight, ())).times(factor)


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel meets its input, one number per axis of the kernel.

    Args:
        stride: steps between outputs.
        padding: zeros (before, after).
        dilation: steps between taps.
        varies: whether the padding depends on the length of the input, so that no numbers describe it.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    varies: bool = False

    @classmethod
    def plain(cls, axes: int) -> Window:
        """Stride 1, no padding, dilation 1."""
        return cls((1,) * axes, ((0, 0),) * axes, (1,) * axes)

    @property
    def pads(self) -> bool:
        """Whether zeros are read at the borders."""
        return self.varies or any(map(any, self.padding))


def fold_into_conv(weight_OIK: Stored, bias_O: Array | None, affine_O: ChannelAffine) -> tuple[Stored, Array]:
    """Constants of `affine(conv(x))` as one convolution: W'[o] = a[o] * W[o], b'[o] = a[o] * b[o] + c[o].

    Groups, depthwise included, need no case: the first axis of the weight lists all output channels.

    Args:
        weight_OIK: (O, I, *kernel).
        bias_O: (O,) or None for none.
        affine_O: O channels.

    Returns:
        The new weight and bias, float64.

    Source: Jacob et al., CVPR 2018, eq. 14.
    """
    return scaled(weight_OIK, affine_O.scale.reshape(-1, 1)), _fold_bias(bias_O, affine_O)


def fold_into_linear(weight_OC: Stored, bias_O: Array | None, affine_O: ChannelAffine) -> tuple[Stored, Array]:
    """Constants of `affine(x @ W.T + b)`, channels last: W'[o] = a[o] * W[o], b'[o] = a[o] * b[o] + c[o].

    Args:
        weight_OC: (O, C), as torch stores it.
        bias_O: (O,) or None for none.
        affine_O: O channels.
    """
    return fold_into_conv(weight_OC, bias_O, affine_O)


def fold_into_conv_transpose(
    weight_CMK: Stored, bias_O: Array | None, affine_O: ChannelAffine, groups: int
) -> tuple[Stored, Array]:
    """Constants of `affine(conv_transpose(x))`: W'[g*I+i, m] = a[g*M+m] * W[g*I+i, m].

    A transposed weight lists *input* channels first and holds only M = O / G output channels on its second axis, which
    mean different channels in each group: the axis to scale is found by splitting the first one into (G, I).

    Args:
        weight_CMK: (C, M, *kernel), as torch and ONNX store it.
        bias_O: (O,) or None for none.
        affine_O: O = groups * M channels.
        groups: G.
    """
    factor = _per_row(affine_O.scale.reshape(groups, 1, -1), weight_CMK.shape[0])
    return scaled(weight_CMK, factor), _fold_bias(bias_O, affine_O)


def fold_affine(
    kind: LinearKind, weight: Stored, bias_O: Array | None, affine_O: ChannelAffine, groups: int = 1
) -> tuple[Stored, Array | None]:
    """The fold for one kind of linear operation: dispatches to the functions above.

    An embedding's table (V, O) has no bias; its rows take scale and shift.
    """
    if kind == "conv_transpose":
        return fold_into_conv_transpose(weight, bias_O, affine_O, groups)
    if kind == "embedding":
        table = scaled(weight, affine_O.scale.reshape(1, -1))
        return np.asarray(table) + affine_O.shift if affine_O.shift.any() else table, None
    return fold_into_conv(weight, bias_O, affine_O) if kind == "conv" else fold_into_linear(weight, bias_O, affine_O)


def unfold_input(
    kind: LinearKind, weight: Stored, bias_O: Array | None, affine_C: ChannelAffine, groups: int = 1
) -> tuple[Stored, Array | None]:
    """Constants of `linear(affine(x))` as one linear operation: W'[o,c] = W[o,c] a[c], b'[o] = b[o] + sum W[o,c] t[c].

    Args:
        kind: which; not an embedding, which reads indices.
        weight: in torch's layout of that kind.
        bias_O: (O,) or None for none.
        affine_C: C input channels; its shift must be zero where the window reads zero padding.
        groups: G.
    """
    if kind == "conv_transpose":
        factor = affine_C.scale.reshape(-1, 1)
    else:
        factor = _per_row(affine_C.scale.reshape(groups, 1, -1), weight.shape[0])
    result = scaled(weight, factor)
    if not affine_C.shift.any():
        return result, bias_O
    weight_GXYK = _by_group(kind, np.asarray(weight, np.float64), groups)
    shape_G1I1 = (groups, 1, -1, 1) if kind != "conv_transpose" else (groups, -1, 1, 1)
    axis = 2 if kind != "conv_transpose" else 1
    added_O = (weight_GXYK * affine_C.shift.reshape(shape_G1I1)).sum((axis, 3)).reshape(-1)
    return result, added_O if bias_O is None else added_O + bias_O


def channel_magnitudes(kind: LinearKind, weight: Stored, groups: int = 1) -> tuple[Array, Array]:
    """Largest absolute weight of each output channel (O,) and of each input channel (C,), which a table has not."""
    largest = weight.largest() if isinstance(weight, Scaled) else Scaled(weight, ()).largest()
    if kind == "embedding":
        return largest.max(0), np.zeros(0)
    largest_GXY = largest.reshape(groups, -1, largest.shape[1])
    first, second = largest_GXY.max(2).reshape(-1), largest_GXY.max(1).reshape(-1)
    return (second, first) if kind == "conv_transpose" else (first, second)


def widen_groups(weight_OIK: Array, groups: int, fewer: int) -> Array:
    """The weight of the same convolution written with fewer groups, zeros between the blocks.

    Args:
        weight_OIK: (O, I, *kernel) in `groups` groups.
        groups: G.
        fewer: a divisor of G.
    """
    outputs, per_group, *kernel = weight_OIK.shape
    ratio = groups // fewer
    blocks = weight_OIK.reshape(groups, outputs // groups, per_group, -1)
    wide = np.zeros((groups, outputs // groups, ratio * per_group, blocks.shape[-1]))
    for group in range(groups):
        start = group % ratio * per_group
        wide[group, :, start : start + per_group] = blocks[group]
    return wide.reshape(outputs, ratio * per_group, *kernel)


def output_channels(kind: LinearKind, weight: Stored, groups: int = 1) -> int:
    """How many output channels O a linear operation has, read off its weight."""
    if kind == "embedding":
        return int(weight.shape[1])
    return int(weight.shape[1]) * groups if kind == "conv_transpose" else int(weight.shape[0])


def input_channels(kind: LinearKind, weight: Stored, groups: int = 1) -> int:
    """How many input channels C a linear operation has, read off its weight."""
    return int(weight.shape[0]) if kind == "conv_transpose" else int(weight.shape[1]) * groups


def _by_group(kind: LinearKind, weight: Array, groups: int) -> Array:
    """The weight as (G, M, I, K), or as (G, I, M, K) for a transposed convolution."""
    first, second = weight.shape[:2]
    return weight.reshape(groups, first // groups, second, -1)


def _per_row(scale_G1I: Array, rows: int) -> Array:
    """A group's factors for each of its rows, (rows, I); (1, I) for all rows where there is one group."""
    groups, _, length = scale_G1I.shape
    spread_GRI = np.broadcast_to(scale_G1I, (groups, 1 if groups == 1 else rows // groups, length))
    return spread_GRI.reshape(-1, length)


def _fold_bias(bias_O: Array | None, affine_O: ChannelAffine) -> Array:
    if bias_O is None:
        return affine_O.shift.copy()
    return np.asarray(bias_O, np.float64) * affine_O.scale + affine_O.shift


def squeezed(constants: Array) -> Array:
    """The same constants with length 1 along every axis on which they do not vary."""
    for axis in range(constants.ndim):
        first = constants.take([0], axis) if constants.shape[axis] else constants
        if (constants == first).all():
            constants = first
    return constants
