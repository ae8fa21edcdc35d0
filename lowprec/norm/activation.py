"""The ReLU, and the addition before it, that a norm computes in one pass with itself.

A norm with an `act` is relu(norm(x)), or relu(norm(x) + residual) when it is called with a residual. In networks whose
code writes the addition itself (`out = self.bn2(out); out += identity`), `lowprec.convert` sets `awaits_residual`: the
norm then returns a `PendingSum` instead of a tensor, and the addition that follows, recognised by Python's own
operators, finishes it. So the network's code stays as it is, and one kernel does the work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowprec.errors import UnsupportedError

_ADDITIONS = (
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
    operator.add, operator.iadd,  # what torch.compile makes of the operators
)  # fmt: skip


class AddReLU(nn.Module):
    """relu(x), or relu(x + residual): a child of the norm, so that a trace shows it as a layer of its own.

    Args:
        awaits_residual: as of a norm; for an `AddReLU` that is left where a norm was.
    """

    def __init__(self, awaits_residual: bool = False) -> None:
        super().__init__()
        self.awaits_residual = awaits_residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | PendingSum:
        """The plain operations, for evaluation and for norms that no kernel computes."""
        if self.awaits_residual and residual is None:
            return PendingSum(partial(self, x), type(self).__name__)
        return torch.relu(x if residual is None else x + residual)


class PendingSum:
    """What a norm returns that waits for its residual: `pending + residual` is the finished tensor.

    Anything else that is done with it raises `UnsupportedError`: silently giving the norm alone would leave out the
    ReLU that was moved into it.

    Args:
        finish: from the residual to the result.
        name: of the norm, for the error.
    """

    def __init__(self, finish: Callable[[Tensor], Tensor], name: str) -> None:
        self._finish = finish
        self._name = name

    def __add__(self, residual: Tensor) -> Tensor:
        """Finishes the sum; also what `+=`, a sum with the other order, `torch.add` and `Tensor.add` come to."""
        if not isinstance(residual, (Tensor, fx.Proxy)):  # a proxy where methods read the network's structure
            raise self._unexpected(f"added to a {type(residual).__name__}")
        return self._finish(residual)

    __radd__ = __add__
    __iadd__ = __add__
    add = __add__
    add_ = __add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """What torch calls when a function of its own gets a pending sum as an argument."""
        pending = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, cls))
        if func not in _ADDITIONS or len(args) != 2 or kwargs:
            raise pending._unexpected(f"given to {getattr(func, '__name__', func)}")
        # Not `pending + ...`: torch.compile would come back here with it.
        finished: Tensor = pending._finish(args[1] if args[0] is pending else args[0])
        return finished

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what protocols look for and may not find
            raise AttributeError(name)
        raise self._unexpected(f"asked for .{name}")

    def _unexpected(self, use: str) -> UnsupportedError:
        return UnsupportedError(
            f"the output of {self._name} was {use}, but convert let the norm compute the addition and the ReLU that "
            f"followed it there; convert with fuse=False"
        )
