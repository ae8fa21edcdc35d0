"""The algebra of folding: a per-channel affine after a linear operation becomes that operation's own constants.

Plain numpy in float64 on weights alone, so that one copy serves traced modules and ONNX files, and so that the caller
rounds once. The obvious alternative, torch's `fuse_conv_bn_weights`, computes in the weight's dtype, has no transposed
convolution with groups, and is silent when a constant overflows.

Shape letters: O output channels, I input channels *per group*, G groups, M output channels per group (O = G * M),
C all input channels (C = G * I), K everything behind them (the flattened kernel window, of any rank).

Padding never matters here: an affine on the output acts after the sum over the window.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowprec.affine import ChannelAffine

Array = NDArray[np.float64]
LinearKind = Literal["conv", "conv_transpose", "linear"]


def fold_into_conv(weight_OIK: Array, bias_O: Array | None, affine_O: ChannelAffine) -> tuple[Array, Array]:
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
    column_OIK = affine_O.scale.reshape(-1, *(1,) * (weight_OIK.ndim - 1))
    return np.asarray(weight_OIK, np.float64) * column_OIK, _fold_bias(bias_O, affine_O)


def fold_into_linear(weight_OC: Array, bias_O: Array | None, affine_O: ChannelAffine) -> tuple[Array, Array]:
    """Constants of `affine(x @ W.T + b)`, channels last: W'[o] = a[o] * W[o], b'[o] = a[o] * b[o] + c[o].

    Args:
        weight_OC: (O, C), as torch stores it.
        bias_O: (O,) or None for none.
        affine_O: O channels.
    """
    return fold_into_conv(weight_OC, bias_O, affine_O)


def fold_into_conv_transpose(
    weight_CMK: Array, bias_O: Array | None, affine_O: ChannelAffine, groups: int
) -> tuple[Array, Array]:
    """Constants of `affine(conv_transpose(x))`: W'[g*I+i, m] = a[g*M+m] * W[g*I+i, m].

    A transposed weight lists *input* channels first and holds only M = O / G output channels on its second axis, which
    mean different channels in each group: the axis to scale is found by splitting the first one into (G, I).

    Args:
        weight_CMK: (C, M, *kernel), as torch and ONNX store it.
        bias_O: (O,) or None for none.
        affine_O: O = groups * M channels.
        groups: G.
    """
    channels, per_group = weight_CMK.shape[:2]
    weight_GIMK = np.asarray(weight_CMK, np.float64).reshape(groups, channels // groups, per_group, -1)
    scale_GIMK = affine_O.scale.reshape(groups, 1, per_group, 1)
    return (weight_GIMK * scale_GIMK).reshape(weight_CMK.shape), _fold_bias(bias_O, affine_O)


def fold_affine(
    kind: LinearKind, weight: Array, bias_O: Array | None, affine_O: ChannelAffine, groups: int = 1
) -> tuple[Array, Array]:
    """The fold for one kind of linear operation: dispatches to the three functions above."""
    if kind == "conv_transpose":
        return fold_into_conv_transpose(weight, bias_O, affine_O, groups)
    return fold_into_conv(weight, bias_O, affine_O) if kind == "conv" else fold_into_linear(weight, bias_O, affine_O)


def output_channels(kind: LinearKind, weight: Array, groups: int = 1) -> int:
    """How many output channels O a linear operation has, read off its weight."""
    return int(weight.shape[1]) * groups if kind == "conv_transpose" else int(weight.shape[0])


def _fold_bias(bias_O: Array | None, affine_O: ChannelAffine) -> Array:
    if bias_O is None:
        return affine_O.shift.copy()
    return np.asarray(bias_O, np.float64) * affine_O.scale + affine_O.shift
