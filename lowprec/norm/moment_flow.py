"""What is known of a tensor's channels before it is measured: moments that travel from norm to norm.

A Kalman norm predicts the moments of its input from those of the norm before it. What lies between the two is read off
the operations as they run, by a torch function mode that is open while the network trains: every tensor that a known
operation makes from a tensor with a state gets a state itself. So it works for residual sums, widening shortcuts and
control flow alike, and needs no graph. An operation that is not known ends the way: the next norm measures and predicts
nothing, like the first one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowprec.norm.gaussian import elementwise_moments, position_moments, relu_moments

_STATE = "lowprec_moments"


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
        """An operation that is taken to leave the moments: pooling, dropout, reading some of the positions."""
        return self

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
        if call.func in _RELUS:
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
        return cls(mean.view(ones) + variance.clamp(min=0).sqrt().view(ones) * noise)

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
        return self if call.func is F.dropout or call.func in _CASTS else self._through(call)

    elementwise = weighted = padded = flattened = _through

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


_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.to, torch.Tensor.contiguous, torch.Tensor.type)
_RELUS = (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)
_KINDS: dict[str, tuple[Any, ...]] = {
    "elementwise": (
        F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.gelu, F.silu, F.mish, F.elu, F.selu,
        F.celu, F.softplus, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid, torch.prelu,
        torch.Tensor.tanh, torch.Tensor.sigmoid, *_RELUS,
    ),
    "weighted": (F.conv1d, F.conv2d, F.conv3d, F.linear),
    "added": (torch.add, torch.Tensor.add, torch.Tensor.add_),
    "same": (
        F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, F.dropout, F.dropout1d, F.dropout2d,
        F.dropout3d, F.channel_shuffle, torch.Tensor.__getitem__, *_CASTS,
    ),
    "padded": (F.pad,),
    "joined": (torch.cat, torch.concat),
    "flattened": (torch.flatten, torch.Tensor.flatten),
}  # fmt: skip
_METHODS = {func: kind for kind, funcs in _KINDS.items() for func in funcs}


class MomentFlow(TorchFunctionMode):
    """Gives states to what known operations make of tensors that have one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _METHODS.get(func)
        first = args[0] if args else None
        if kind == "joined" and args:
            first = args[0][0]
        state = state_of(first)
        before = args if kind is not None and state is not None else ()
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        if not before or state is None or kind is None:
            if (
                state is not None and isinstance(first, Tensor) and out is first
            ):  # changed in place by something unknown
                set_state(out, None)
            return out
        with _plainly(out):
            new = getattr(state, kind)(Call(func, args, kwargs, out))
        fits = new is not None and out.dim() > 1 and (isinstance(new, Carried) or new.channels == out.shape[1])
        set_state(out, new if fits else None)
        return out


def _plainly(out: Tensor) -> ExitStack:
    """Without modes and without autocast."""
    stack = ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(torch.autocast(out.device.type, enabled=False))
    return stack


class FlowHooks:
    """Opens a flow around the training forwards of a network."""

    def __init__(self) -> None:
        self._open: list[MomentFlow] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowHooks:
        return memo.setdefault(id(self), FlowHooks())  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": []}

    @property
    def is_open(self) -> bool:
        """Whether a flow is open."""
        return bool(self._open)

    def install(self, model: nn.Module) -> None:
        """After hooks that are there, so that operations are seen as the network's code calls them."""
        model.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Opens."""
        if module.training and torch.is_grad_enabled():
            self._open.append(MomentFlow())
            self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Closes."""
        if self._open:
            self._open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
