"""What methods do to gradients between their average and the optimizer: preconditioning, adaptive clipping.

The right moment is after unscaling and averaging and before clipping and momentum. Where a `Precision` makes the steps
it calls them there. In any other loop the optimizer's own hook does, which is after the caller's clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer


class GradientTransform(Protocol):
    """One method on one optimizer."""

    waits: bool
    """Whether `apply` must not be called for a step that will not land, so that a GPU has to be waited for."""

    def apply(self) -> None:
        """Changes gradients in place, float32 and unscaled, found at `master_of(param).grad`."""

    def discard(self) -> None:
        """Forgets what belongs to gradients that are dropped, after a step or without one."""


class GradientTransforms:
    """Those of one optimizer; see `transforms_of`."""

    def __init__(self) -> None:
        self.managed = False
        """Whether a `Precision` calls them."""
        self._transforms: list[GradientTransform] = []

    @property
    def wait(self) -> bool:
        """Whether one of them waits to know that the step lands."""
        return any(transform.waits for transform in self._transforms)

    def add(self, optimizer: Optimizer, transform: GradientTransform) -> list[Callable[[], None]]:
        """Adds one; returns what takes it off."""
        self._transforms.append(transform)

        def apply(*_: Any) -> None:
            if not self.managed:
                with torch.no_grad():
                    transform.apply()

        def discard(*_: Any) -> None:
            if not self.managed:
                transform.discard()

        pre, post = optimizer.register_step_pre_hook(apply), optimizer.register_step_post_hook(discard)
        return [pre.remove, post.remove, lambda: self._transforms.remove(transform)]

    @torch.no_grad()
    def apply(self) -> None:
        """In the order in which they were added."""
        for transform in self._transforms:
            transform.apply()

    def discard(self) -> None:
        """Forgets what belongs to gradients that are dropped."""
        for transform in self._transforms:
            transform.discard()


_known: WeakKeyDictionary[Any, GradientTransforms] = WeakKeyDictionary()


def transforms_of(optimizer: Optimizer) -> GradientTransforms:
    """The transforms of `optimizer`, none at first."""
    return _known.setdefault(optimizer, GradientTransforms())
