"""What is known of a tensor's channels before it is measured, and what operations make of that.

Three ways to know it: mean and variance in closed form, noise that has them, or mean and variance as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowprec.norm.gaussian import LEAST_VARIANCE, elementwise_moments, position_moments, relu_moments

# Functions that states tell apart: changes of type, dropouts, and ReLU in all its spellings.
CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.to, torch.Tensor.contiguous, torch.Tensor.type)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
RELUS = (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)

_STATE = "lowprec_moments"  # the attribute of a tensor that holds its state


class State(ABC):
    """What is known of the channels of a tensor (N, C, ...); one method per kind of operation."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """C."""

    @abstractmethod
    def moments(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of each of `channels` channels; None where that cannot be said."""

    def same(self, call: Call) -> State | None:
        """An operation that is taken to leave the moments: pooling, dropout, a change of type."""
        return self

    def picked(self, call: Call) -> State | None:
        """Some of the samples and positions, of all channels in their order."""
        index = call.args[1]
        plain = isinstance(index, tuple) and all(isinstance(part, slice) for part in index)
        return self.same(call) if plain and index[1:2] in ((), (slice(None),)) else None

    @abstractmethod
    def shuffled(self, call: Call) -> State | None:
        """Channels in another order."""

    @abstractmethod
    def elementwise(self, call: Call) -> State | None:
        """A function of each element."""

    @abstractmethod
    def weighted(self, call: Call) -> State | None:
        """A convolution or a linear layer."""

    @abstractmethod
    def added(self, call: Call) -> State | None:
        """A sum of two tensors or of a tensor and a number; tensors are taken to be independent."""

    @abstractmethod
    def padded(self, call: Call) -> State | None:
        """Zeros around, or further channels of zeros."""

    @abstractmethod
    def joined(self, call: Call) -> State | None:
        """A concatenation of channels."""

    @abstractmethod
    def flattened(self, call: Call) -> State | None:
        """All axes but the first in one."""


class Call:
    """One operation: the function, its arguments, what it gave, and the states of the tensors among the arguments."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out

    def named(self, *names: str, **defaults: Any) -> list[Any]:
        """The arguments called `names`, whether given by place or by name."""
        given = {**defaults, **dict(zip(names, self.args, strict=False)), **self.kwargs}
        return [given[name] for name in names]


class Moments(State):
    """Mean and variance, (C,), carried through operations in closed form: what infinitely many samples would give."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.variance = mean, variance

    @property
    def channels(self) -> int:
        """C."""
        return self.mean.numel()

    def moments(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """These."""
        return self.mean, self.variance

    def elementwise(self, call: Call) -> State | None:
        """In closed form for ReLU, else by quadrature."""
        if call.func in RELUS:
            return Moments(*relu_moments(self.mean, self.variance))
        rest = [_wide(arg, self.mean) for arg in call.args[1:]]
        kwargs = {**call.kwargs, "inplace": False} if "inplace" in call.kwargs else call.kwargs
        return Moments(*elementwise_moments(lambda x: call.func(x, *rest, **kwargs), self.mean, self.variance))

    def weighted(self, call: Call) -> State | None:
        """Exact for independent elements, zero padding included."""
        if call.func is F.linear:
            _, weight, bias = (_wide(arg, self.mean) for arg in call.named("input", "weight", "bias", bias=None))
            mean, variance = weight @ self.mean, weight.square() @ self.variance
        else:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            x, weight, bias, *geometry = call.named(*names, **defaults)
            weight, bias = _wide(weight, self.mean), _wide(bias, self.mean)
            mean, variance = position_moments(self.mean, self.variance, weight, x.shape[2:], *geometry)
        return Moments(mean if bias is None else mean + bias, variance)

    def added(self, call: Call) -> State | None:
        """Sums of both."""
        other = _other(call)
        if isinstance(other, Moments) and other.channels == self.channels:
            return type(self)(self.mean + other.mean, self.variance + other.variance)
        return type(self)(self.mean + other, self.variance) if isinstance(other, (int, float)) else None

    def shuffled(self, call: Call) -> State | None:
        """The same of both."""
        mean, variance = (call.func(value.view(1, -1, 1, 1), *call.args[1:], **call.kwargs).flatten()
                          for value in (self.mean, self.variance))  # fmt: skip
        return type(self)(mean, variance)

    def padded(self, call: Call) -> State | None:
        """Channels of mean and variance 0."""
        pads = list(call.args[1] if len(call.args) > 1 else call.kwargs["pad"])
        spatial = 2 * (call.args[0].dim() - 2)
        low, high = [*pads[spatial : spatial + 2], 0, 0][:2]
        if low < 0 or high < 0:
            return None
        return type(self)(F.pad(self.mean, (low, high)), F.pad(self.variance, (low, high)))

    def joined(self, call: Call) -> State | None:
        """One after the other."""
        parts = [part for part in _parts(call) if isinstance(part, Moments)]
        if not parts or len(parts) != len(_parts(call)):
            return None
        return type(self)(torch.cat([part.mean for part in parts]), torch.cat([part.variance for part in parts]))

    def flattened(self, call: Call) -> State | None:
        """Each channel as often as it had positions."""
        if call.out.dim() != 2 or call.out.shape[1] % self.channels:
            return None
        times = call.out.shape[1] // self.channels
        return type(self)(self.mean.repeat_interleave(times), self.variance.repeat_interleave(times))


class Carried(Moments):
    """Mean and variance as the last norm had them: weights and activations are left to a learned transition."""

    def moments(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """The first `channels`, the missing ones zero."""
        missing = channels - self.channels
        return F.pad(self.mean, (0, missing)), F.pad(self.variance, (0, missing))

    def elementwise(self, call: Call) -> State | None:
        """As it was."""
        return self

    def weighted(self, call: Call) -> State | None:
        """As it was."""
        return self


class Sample(State):
    """Noise with those moments, sent through the same operations: the released code's way."""

    rows = 64
    """Samples where there are no positions to average over."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    @classmethod
    def drawn(cls, mean: Tensor, variance: Tensor, positions: Sequence[int]) -> Sample:
        """Normal noise: one image (1, C, positions...), or `rows` of (C,)."""
        shape = (1 if positions else cls.rows, mean.numel(), *positions)
        ones = (1, -1, *[1] * len(positions))
        noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        return cls(mean.view(ones) + variance.clamp(min=LEAST_VARIANCE).sqrt().view(ones) * noise)

    @property
    def channels(self) -> int:
        """C."""
        return self.noise.shape[1]

    def moments(self, channels: int) -> tuple[Tensor, Tensor] | None:
        """Of the noise, over samples and positions."""
        axes = [0, *range(2, self.noise.dim())]
        if self.noise.numel() == self.channels:
            return None
        variance, mean = torch.var_mean(self.noise, axes, correction=0)
        return mean, variance

    def _through(self, call: Call) -> State | None:
        args = [self.noise, *(_wide(arg, self.noise) for arg in call.args[1:])]
        kwargs = {name: _wide(value, self.noise) for name, value in call.kwargs.items() if name != "inplace"}
        return Sample(call.func(*args, **kwargs))

    def same(self, call: Call) -> State | None:
        """Pools and slices are taken of the noise; dropout leaves it."""
        return self if call.func in (*CASTS, *DROPOUTS) else self._through(call)

    elementwise = weighted = shuffled = padded = flattened = _through

    def added(self, call: Call) -> State | None:
        """The sum of both noises."""
        other = _other(call)
        if isinstance(other, Sample) and other.noise.shape == self.noise.shape:
            return Sample(self.noise + other.noise)
        return Sample(self.noise + other) if isinstance(other, (int, float)) else None

    def joined(self, call: Call) -> State | None:
        """One after the other."""
        parts = [part for part in _parts(call) if isinstance(part, Sample)]
        if not parts or len(parts) != len(_parts(call)):
            return None
        return Sample(torch.cat([part.noise for part in parts], 1))


def state_of(x: Any) -> State | None:
    """What is known of `x` in the running forward."""
    return getattr(x, _STATE, None)


def set_state(x: Tensor, state: State | None) -> None:
    """Notes what is known of `x`."""
    if state is not None:
        setattr(x, _STATE, state)
    elif hasattr(x, _STATE):
        delattr(x, _STATE)


def _wide(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _other(call: Call) -> Any:
    """The second summand: its state, or the number; None if it has neither."""
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) != 2:
        return None
    other = call.args[1]
    return state_of(other) if isinstance(other, Tensor) else other


def _parts(call: Call) -> list[State | None]:
    """The states of what is concatenated; none where that is along another axis than the channels'."""
    tensors, dim = call.named("tensors", "dim", dim=0)
    return [state_of(tensor) for tensor in tensors] if dim in (1, 1 - tensors[0].dim()) else []
