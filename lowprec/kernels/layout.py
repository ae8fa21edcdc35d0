"""The two memory layouts that the kernels know, and how one bit per element is packed in each.

*planes*: (N, C, S) contiguous, each channel of each sample in one piece. *rows*: (M, C) with the channel last, which is
channels_last and a plain (N, C). Everything else is copied into planes first. Bits are little endian and every plane
(rows: every row) starts at a byte, so that no byte belongs to two channels' loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def is_rows(x_NCX: Tensor) -> bool:
    """Whether the channel is the innermost axis; a contiguous tensor with one element per channel counts as rows."""
    try:
        return _remembered(x_NCX.shape, x_NCX.stride())
    except TypeError:  # symbolic sizes have no hash
        return _is_rows(x_NCX.shape, x_NCX.stride())


@lru_cache(maxsize=1024)
def _remembered(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return _is_rows(shape, strides)


def _is_rows(shape: Sequence[int], strides: Sequence[int]) -> bool:
    if len(shape) > 2 and _is_dense(shape, strides, range(len(shape))) and any(size != 1 for size in shape[2:]):
        return False
    return _is_dense(shape, strides, (0, *range(2, len(shape)), 1))


def _is_dense(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the elements fill memory without a gap, with the axes in this order from the outermost."""
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def canonical(x_NCX: Tensor) -> Tensor:
    """`x_NCX` itself in one of the two layouts, else a contiguous copy."""
    return x_NCX if is_rows(x_NCX) else x_NCX.contiguous()


def laid_out_as(x_NCX: Tensor, like_NCX: Tensor) -> Tensor:
    """`x_NCX` in the layout of `like_NCX`, which is canonical; a copy only where it has to be one."""
    if x_NCX.stride() == like_NCX.stride():
        return x_NCX
    if not is_rows(like_NCX) or like_NCX.dim() == 2:
        return x_NCX.contiguous()
    return x_NCX.movedim(1, -1).contiguous().movedim(-1, 1)


def bits_shape(x_NCX: Tensor) -> tuple[int, ...]:
    """Shape of the bytes that hold one bit for every element of `x_NCX`."""
    samples, channels, length = x_NCX.shape[0], x_NCX.shape[1], x_NCX.numel() // _product(x_NCX.shape[:2])
    if is_rows(x_NCX):
        return (samples * length, _bytes(channels))
    return (samples, channels, _bytes(length))


def pack(flags_NCX: Tensor, like_NCX: Tensor) -> Tensor:
    """Boolean `flags_NCX` as bits in the order of `like_NCX`'s layout."""
    rows = is_rows(like_NCX)
    flags = flags_NCX.movedim(1, -1).reshape(-1, flags_NCX.shape[1]) if rows else flags_NCX.flatten(2)
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8))
    powers_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.reshape(*flags.shape[:-1], -1, 8) * powers_8).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, like_NCX: Tensor) -> Tensor:
    """The inverse of `pack`."""
    powers_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    flags = (bits.unsqueeze(-1) & powers_8).flatten(-2) != 0
    if is_rows(like_NCX):
        rows = flags[:, : like_NCX.shape[1]]
        return rows.reshape(*like_NCX.movedim(1, -1).shape).movedim(-1, 1)
    length = like_NCX.numel() // _product(like_NCX.shape[:2])
    return flags[..., :length].reshape(like_NCX.shape)


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _product(shape: torch.Size) -> int:
    return shape[0] * shape[1]
