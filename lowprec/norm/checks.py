"""What an input must be: the refusals of torch's batch norms, and clear ones where torch's are not.

The errors are a `LowprecError` and the built-in type that code written for torch catches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.errors import DataError, UnsupportedError


class InputValueError(DataError, ValueError):
    """An input of the wrong shape."""


class InputTypeError(DataError, TypeError):
    """An input of the wrong type."""


class VmapError(UnsupportedError, RuntimeError):
    """A norm with running statistics in training under `torch.func.vmap`."""


def check_input(x: Tensor, ranks: tuple[int, ...], channels: int) -> None:
    """Refuses what is not (N, C, ...) of one of the ranks, with that many channels, of a real floating type."""
    if x.dim() not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise InputValueError(f"expected {expected} input (got {x.dim()}D input)")
    if x.shape[1] != channels:
        raise InputValueError(f"expected {channels} channels on axis 1, got input size {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputTypeError(f"expected a real floating-point input, got {x.dtype}; convert it first")


def check_count(x: Tensor) -> None:
    """Refuses one value per channel, which has no spread; an empty batch passes, as in torch."""
    if x.numel() == x.shape[1]:
        raise InputValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_not_mapped(x: Tensor) -> None:
    """Refuses a batched tensor of `torch.func.vmap`: its samples would all move the same running statistics."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
        raise VmapError(
            "a norm with running statistics was called in training under vmap, where every sample would move them; "
            "set track_running_stats=False or call eval()"
        )
