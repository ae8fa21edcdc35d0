"""Random networks for the fold test: a program of a few lines, drawn step by step, that is an `nn.Module` and its text.

A program is Python source, so that a failing example is read, pasted and cut down by hand: `repr(network)` is the whole
of it. Each line runs on an example as it is drawn, so shapes are always valid and nothing has to predict them. Choices
come from a function that picks one of several, the first being the simplest: hypothesis gives one that it can shrink, a
seeded generator gives one for fixed samples.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.norm import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, ScaleBatchNorm

Choose = Callable[[Sequence[Any]], Any]

TINY = 1e-4
MOST_CHANNELS = 6
MOST_ELEMENTS = 1500  # of one sample, so that a case takes a tenth of a second


@dataclass(frozen=True)
class Line:
    """One statement of a program.

    Args:
        kind: which entry of `KINDS` drew it.
        code: the statement, in terms of x, earlier values and layers of m.
        layers: (name, source) of the layers that are made for it.
    """

    kind: str
    code: str
    layers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Program:
    """A network and how it is called.

    Args:
        lines: in order.
        outputs: names of what is returned.
        shape: of the example input.
        tokens: whether the input is indices into an embedding.
        dtype: of the network.
        channels_last: whether network and inputs are in that memory format.
        fresh_batch: the batch size of the inputs on which results are compared.
        seed: of weights and inputs.
    """

    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: bool = False
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    fresh_batch: int = 3
    seed: int = 0

    @property
    def kinds(self) -> set[str]:
        return {line.kind for line in self.lines}

    @property
    def has_tiny_gammas(self) -> bool:
        return any(repr("tiny") in source for line in self.lines for _, source in line.layers)

    def inputs(self, batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + seed)
        shape = (batch, *self.shape[1:])
        if self.tokens:
            return torch.randint(0, VOCABULARY, shape, generator=generator)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def network(self) -> "RandomNetwork":
        return RandomNetwork(self)

    def __str__(self) -> str:
        made = [f"    m.{name} = {source}" for line in self.lines for name, source in line.layers]
        lines = [f"    {line.code}" for line in self.lines]
        head = (
            f"# x: {'indices ' if self.tokens else ''}{self.shape}, {self.dtype}, "
            f"compared at batch {self.fresh_batch}, seed {self.seed}{', channels last' if self.channels_last else ''}"
        )
        return "\n".join(
            [head, "def __init__(m):", *made, "def forward(m, x):", *lines, f"    return {', '.join(self.outputs)}"]
        )


class RandomNetwork(nn.Module):
    """What a program computes, in evaluation mode, with random weights."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        for line in program.lines:
            for name, source in line.layers:
                setattr(self, name, _made(source, self))
        self.to(program.dtype)
        fill(self, program.seed)
        if program.channels_last:
            put_channels_last(self)
        self.eval()
        body = "\n    ".join([*(line.code for line in program.lines), f"return {', '.join(program.outputs)}"])
        namespace: dict[str, Any] = {}
        exec(f"def forward(m, x):\n    {body}", _NAMES, namespace)
        self._forward = namespace["forward"]

    def forward(self, x):
        return self._forward(self, x)

    def __repr__(self):
        return str(self.program)


def put_channels_last(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.to(memory_format=torch.channels_last)


def gammas(norm: nn.Module, style: str, shift: bool = True) -> nn.Module:
    """Says how `fill` is to fill a norm's gammas, and whether it has a shift."""
    norm.gammas, norm.has_shift = style, shift
    return norm


def tied(layer: nn.Module, other: nn.Module) -> nn.Module:
    """A layer with the weight of another."""
    layer.weight = other.weight
    return layer


def constant(*shape: int) -> nn.Parameter:
    """A constant of both signs, filled by `fill`."""
    return nn.Parameter(torch.ones(shape))


# What programs call.
_NAMES = {
    "torch": torch,
    "F": F,
    "nn": nn,
    **{made.__name__: made for made in (gammas, tied, constant, L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d)},
}
_RUNNING_NORMS = (nn.modules.batchnorm._NormBase, ScaleBatchNorm)
NORM_LAYERS = (*_RUNNING_NORMS, nn.GroupNorm, nn.LayerNorm)


def _made(source: str, owner: nn.Module) -> Any:
    return eval(source, {**_NAMES, "m": owner})


@torch.no_grad()
def fill(network: nn.Module, seed: int) -> None:
    """Random weights, in place: those of linear operations keep the size of what they are given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, spread: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * spread)

    def away_from_zero(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        normal(parameter, 1 / math.sqrt(fan_in))
    for name, parameter in network.named_parameters():
        if "." not in name:  # of a `constant`, by which some operations divide
            away_from_zero(parameter, 0.4, 1.6)
            parameter.mul_((torch.rand(parameter.shape, generator=generator) < 0.7).to(parameter.dtype) * 2 - 1)
    for layer in network.modules():
        if not isinstance(layer, _RUNNING_NORMS):
            continue
        for name, buffer in layer.named_buffers():
            if name in ("running_var", "running_scale"):
                away_from_zero(buffer, 0.5, 2.0)
            elif name == "running_mean":
                normal(buffer, 0.5 * layer.has_shift)
        if layer.weight is not None:
            away_from_zero(layer.weight, 0.4, 1.6)
            normal(layer.bias, 0.5 * layer.has_shift)
            where = int(torch.randint(len(layer.weight), (), generator=generator))
            if layer.gammas == "mixed":
                layer.weight[where] *= -1
            elif layer.gammas in ("tiny", "zero"):
                layer.weight[where] = TINY if layer.gammas == "tiny" else 0.0


VOCABULARY = 7


class Drawing:
    """A program as it is drawn: the lines so far, and their values for the example.

    Args:
        choose: picks one of several; the first is the simplest.
        x: the example input.
        channels_last: the memory format of the layers.
    """

    def __init__(self, choose: Choose, x: Tensor, channels_last: bool = False):
        self.choose = choose
        self.lines: list[Line] = []
        self.values: dict[str, Tensor] = {"x": x} if x.is_floating_point() else {}
        self.kind = ""
        self._owner = nn.Module()
        self._channels_last = channels_last
        self._names = {"x": x, "m": self._owner}
        self._made: list[tuple[str, str]] = []
        self._count = 0

    def perhaps(self) -> bool:
        return self.choose([False, True])

    def seldom(self) -> bool:
        return self.choose([False, False, False, True])

    def operand(self, fits: Callable[[Tensor], bool] = lambda value: True) -> str | None:
        """One of the values that fit, more often a late one."""
        found = [name for name, value in self.values.items() if fits(value)][::-1]
        return self.choose([*found[:1] * 5, *found[:4], *found]) if found else None

    def layer(self, source: str) -> str:
        """Makes a layer; returns how a line calls it."""
        self._count += 1
        name = f"{source.replace('gammas(', '').split('(')[0].removeprefix('nn.').lower()}{self._count}"
        made = _made(source, self._owner)
        setattr(self._owner, name, made)
        self._owner.double().eval()
        if self._channels_last:
            put_channels_last(self._owner)
        fill(self._owner, 0)
        self._made.append((name, source))
        return f"m.{name}"

    def layers(self, kind: type | tuple[type, ...]) -> list[tuple[str, Any]]:
        """The layers so far that are of a kind, by how a line calls them."""
        return [(f"m.{name}", layer) for name, layer in self._owner.named_children() if isinstance(layer, kind)]

    @torch.no_grad()
    def add(self, expression: str, count: int = 1) -> str:
        """Appends a line that gives a value, or a tuple of `count`; returns the name of the first."""
        first = len(self._names) - 2  # x and m
        names = [f"v{first + index}" for index in range(count)]
        self._append(f"{', '.join(names)} = {expression}")
        self.values.update({name: self._names[name] for name in names})
        return names[0]

    @torch.no_grad()
    def change(self, name: str, statement: str) -> None:
        """Appends a line that changes a value in place."""
        self._append(statement)
        self.values[name] = self.values.pop(name)  # the latest one now

    def draw(self, name: str, v: str) -> str:
        """Appends what a kind makes of a value; returns the latest value."""
        outer, self.kind = self.kind, name
        KINDS[name].draw(self, v)
        self.kind = outer
        return list(self.values)[-1]

    def is_alone(self, name: str) -> bool:
        """Whether no other value shares the memory of one, so that it may be changed in place."""
        memory = self._names[name].untyped_storage().data_ptr()
        return name != "x" and sum(v.untyped_storage().data_ptr() == memory for v in self._tensors()) == 1

    def _tensors(self) -> list[Tensor]:
        return [value for value in self._names.values() if isinstance(value, Tensor)]

    def _append(self, code: str) -> None:
        exec(code, _NAMES, self._names)
        self.lines.append(Line(self.kind, code, tuple(self._made)))
        self._made.clear()


@dataclass(frozen=True)
class Kind:
    """What a line, or a few, may be.

    Args:
        draw: appends it to a drawing, given an operand.
        fits: of which values it can be made.
        weight: how often it is drawn.
    """

    draw: Callable[[Drawing, str], None]
    fits: Callable[[Tensor], bool]
    weight: int


KINDS: dict[str, Kind] = {}


def kind(fits: Callable[[Tensor], bool] = lambda value: True, weight: int = 1):
    def enter(draw: Callable[[Drawing, str], None]):
        KINDS[draw.__name__.strip("_")] = Kind(draw, fits, weight)
        return draw

    return enter


def _is_spatial(value: Tensor) -> bool:
    return 3 <= value.ndim <= 5


def _is_narrow(value: Tensor) -> bool:
    return _is_spatial(value) and value.shape[1] <= 2 * MOST_CHANNELS


def _has_room(value: Tensor) -> bool:
    return value[0].numel() * 2 <= MOST_ELEMENTS


def _axes(value: Tensor) -> int:
    return value.ndim - 2


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# Linear operations.


def _conv_source(d: Drawing, value: Tensor, keeps_shape: bool = False, plain: bool = False) -> str:
    """A convolution that fits a value; one that keeps its shape, or one with no other choice than its kernel."""
    axes, channels, space = _axes(value), value.shape[1], value.shape[2:]
    groups = d.choose(_divisors(channels)) if not plain else 1
    outputs = (
        channels if keeps_shape else groups * d.choose([n for n in (1, 2, 3) if n * groups <= MOST_CHANNELS] or [1])
    )
    same = keeps_shape or (not plain and d.seldom())
    dilation = d.choose([1, 1, 2]) if not plain else 1
    mode = d.choose(["zeros"] * 6 + ["reflect", "replicate", "circular"])
    if same:
        odd_only = keeps_shape and mode == "zeros" and d.perhaps()
        # One pixel at least must be left to reflect or to wrap around.
        widths = [[1, 2, 3] if length > 2 * dilation else [1] for length in space]
        kernel = [d.choose([k for k in width if k % 2 or not odd_only]) for width in widths]
        padding: Any = tuple(dilation * (k - 1) // 2 for k in kernel) if odd_only else "same"
        stride = 1
    else:
        padding = d.choose([1, 0, 1, 2])
        padding = padding if mode == "zeros" or min(space) > padding else 0
        widest = [(length + 2 * padding - 1) // dilation + 1 for length in space]
        kernel = [d.choose([k for k in (1, 2, 3) if k <= most]) for most in widest]
        stride = d.choose([1, 1, 2])
        if any(_misses(length, k, stride, padding, dilation) for length, k in zip(space, kernel, strict=True)):
            stride = 1
    given = {"groups": groups, "stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    plain_values = {"groups": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}
    rest = [f", {name}={value!r}" for name, value in given.items() if value != plain_values[name]]
    bias = "" if d.perhaps() else ", bias=False"
    return f"nn.Conv{axes}d({channels}, {outputs}, {tuple(kernel)}{''.join(rest)}{bias})"


def _misses(length: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether no window along an axis reads anything but padding; torch 2.13's float32 convolutions may crash there."""
    places = range(-padding, length + padding - dilation * (kernel - 1), stride)
    return not any(0 <= place + dilation * tap < length for place in places for tap in range(kernel))


@kind(_is_narrow, weight=3)
def conv(d: Drawing, v: str) -> None:
    d.add(f"{d.layer(_conv_source(d, d.values[v]))}({v})")


@kind(_is_narrow)
def conv_again(d: Drawing, v: str) -> None:
    """A convolution called a second time, or another one with its weight."""
    value = d.values[v]
    found = [
        (name, layer)
        for name, layer in d.layers((nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if layer.in_channels == value.shape[1]
        and layer.weight.ndim == value.ndim
        and _room(layer) <= min(value.shape[2:])
    ]
    if not found:
        conv(d, v)
        return
    name, layer = d.choose(found)
    if d.perhaps():
        arguments = f"{layer.in_channels}, {layer.out_channels}, {tuple(layer.kernel_size)}, groups={layer.groups}"
        name = d.layer(f"tied(nn.Conv{_axes(value)}d({arguments}), {name})")
    d.add(f"{name}({v})")


def _room(layer: nn.Module) -> int:
    """A length that any layer with this kernel fits, whatever its padding."""
    return max(dilation * (k - 1) for dilation, k in zip(layer.dilation, layer.kernel_size, strict=True)) + 3


@kind(lambda value: _is_narrow(value) and _has_room(value), weight=2)
def conv_transpose(d: Drawing, v: str) -> None:
    value = d.values[v]
    groups = d.choose(_divisors(value.shape[1]))
    outputs = groups * d.choose([n for n in (1, 2) if n * groups <= MOST_CHANNELS] or [1])
    widest = 3 if value.ndim < 5 else 2
    kernel = tuple(d.choose(range(1, widest + 1)) for _ in value.shape[2:])
    stride = d.choose([1, 2]) if value[0].numel() * 2 ** (value.ndim - 1) <= MOST_ELEMENTS else 1
    dilation = d.choose([1, 1, 2])
    extra = d.choose(range(max(stride, dilation)))
    shortest = min(
        (n - 1) * stride + dilation * (k - 1) + 1 + extra for n, k in zip(value.shape[2:], kernel, strict=True)
    )
    padding = d.choose([p for p in (0, 1) if shortest - 2 * p >= 1])
    source = (
        f"nn.ConvTranspose{_axes(value)}d({value.shape[1]}, {outputs}, {kernel}, {stride}, {padding}, {extra}, "
        f"{groups}, bias={d.perhaps()}, dilation={dilation})"
    )
    d.add(f"{d.layer(source)}({v})")


@kind(weight=2)
def linear(d: Drawing, v: str) -> None:
    outputs = d.choose(range(1, MOST_CHANNELS + 1))
    d.add(f"{d.layer(f'nn.Linear({d.values[v].shape[-1]}, {outputs}, bias={d.perhaps()})')}({v})")


@kind()
def matmul(d: Drawing, v: str) -> None:
    d.add(f"{v} @ {d.layer(f'constant({d.values[v].shape[-1]}, {d.choose([2, 3])})')}")


@kind(lambda value: value.ndim > 2 and value[0].numel() <= 200)
def flatten(d: Drawing, v: str) -> None:
    flat = d.add(f"{v}.flatten(1)")
    if d.perhaps():
        linear(d, flat)


# Norms.


def _norm_source(d: Drawing, value: Tensor) -> str:
    channels, axes = value.shape[1], max(_axes(value), 1)
    style = d.choose(["positive", "positive", "positive", "mixed", "mixed", "tiny", "zero", "none"])
    family = d.choose([f"nn.BatchNorm{axes}d", f"nn.BatchNorm{axes}d", f"L1BatchNorm{axes}d"])
    if value.ndim > 2 and d.choose([False] * 7 + [True]):
        source = f"nn.InstanceNorm{axes}d({channels}, affine={style != 'none'}, track_running_stats=True)"
    else:
        source = f"{family}({channels}{', affine=False' if style == 'none' else ''})"
    return f"gammas({source}, {style!r}{'' if d.choose([True, True, True, False]) else ', shift=False'})"


def _takes_batch_norm(value: Tensor) -> bool:
    return 2 <= value.ndim <= 5


@kind(_takes_batch_norm, weight=3)
def batch_norm(d: Drawing, v: str) -> None:
    d.add(f"{d.layer(_norm_source(d, d.values[v]))}({v})")


@kind(_takes_batch_norm)
def batch_norm_again(d: Drawing, v: str) -> None:
    value = d.values[v]
    names = [
        name
        for name, layer in d.layers(_RUNNING_NORMS)
        if layer.num_features == value.shape[1] and type(layer).__name__.endswith(f"{max(_axes(value), 1)}d")
        if value.ndim > 2 or not isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    ]
    if names:
        d.add(f"{d.choose(names)}({v})")
    else:
        batch_norm(d, v)


@kind(lambda value: _is_spatial(value) and value[0].numel() >= 2 * value.shape[1])
def group_norm(d: Drawing, v: str) -> None:
    channels = d.values[v].shape[1]
    d.add(f"{d.layer(f'nn.GroupNorm({d.choose(_divisors(channels))}, {channels})')}({v})")


@kind(lambda value: value.shape[-1] >= 2)
def layer_norm(d: Drawing, v: str) -> None:
    d.add(f"{d.layer(f'nn.LayerNorm({d.values[v].shape[-1]})')}({v})")


# Activations.

_ACTIVATIONS = ["ReLU", "LeakyReLU", "ReLU6", "GELU", "SiLU", "Hardswish", "Sigmoid", "Dropout", "Identity", "softmax"]


@kind()
def relu(d: Drawing, v: str) -> None:
    d.add(d.choose([f"F.relu({v})", f"{v}.clamp(min=0)", f"torch.clamp_min({v}, 0.0)"]))


@kind()
def activation(d: Drawing, v: str) -> None:
    which = d.choose(_ACTIVATIONS)
    d.add(f"{v}.softmax({d.choose([1, -1])})" if which == "softmax" else f"{d.layer(f'nn.{which}()')}({v})")


@kind(lambda value: value.ndim >= 2)
def prelu(d: Drawing, v: str) -> None:
    d.add(f"{d.layer(f'nn.PReLU({d.choose([1, d.values[v].shape[1]])})')}({v})")


@kind()
def absolute(d: Drawing, v: str) -> None:
    d.add(f"{v}.abs()")


@kind()
def relu_in_place(d: Drawing, v: str) -> None:
    if d.is_alone(v):
        d.change(v, d.choose([f"{v}.relu_()", f"F.relu({v}, inplace=True)", f"F.leaky_relu_({v}, 0.2)"]))
    else:
        d.add(f"F.relu({v})")


@kind()
def change_in_place(d: Drawing, v: str) -> None:
    other = d.operand(lambda value: value.shape == d.values[v].shape)
    if d.is_alone(v):
        d.change(v, d.choose([f"{v} += {other}", f"{v}.mul_(-0.5)", f"{v}.add_({other}, alpha=2)", f"{v} -= 1"]))
    else:
        d.add(f"{v} + {other}")


# Pools, interpolation, padding, reductions.


def _widest(value: Tensor) -> int:
    return min(value.shape[2:])


@kind(lambda value: _is_spatial(value) and _widest(value) >= 2, weight=2)
def max_pool(d: Drawing, v: str) -> None:
    kernel = d.choose([2, 3] if _widest(d.values[v]) > 2 else [2])
    padding, stride, ceil = d.choose([0, 1]), d.choose([1, 2]), d.perhaps()
    d.add(f"F.max_pool{_axes(d.values[v])}d({v}, {kernel}, {stride}, {padding}, ceil_mode={ceil})")


@kind(lambda value: _is_spatial(value) and _widest(value) >= 2, weight=2)
def average_pool(d: Drawing, v: str) -> None:
    axes = _axes(d.values[v])
    kernel = d.choose([2, 3] if _widest(d.values[v]) > 2 else [2])
    padding, stride, ceil, counts = d.choose([0, 1, 1]), d.choose([1, 2]), d.perhaps(), d.choose([True, False, True])
    divisor = ", divisor_override=3" if axes > 1 and d.choose([False] * 7 + [True]) else ""
    d.add(f"F.avg_pool{axes}d({v}, {kernel}, {stride}, {padding}, {ceil}, {counts}{divisor})")


@kind(_is_spatial)
def adaptive_pool(d: Drawing, v: str) -> None:
    which = d.choose(["avg", "avg", "max"])
    d.add(f"F.adaptive_{which}_pool{_axes(d.values[v])}d({v}, {d.choose([1, 2])})")


@kind(lambda value: _is_spatial(value) and value[0].numel() * 2 ** _axes(value) <= MOST_ELEMENTS)
def upsample(d: Drawing, v: str) -> None:
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[_axes(d.values[v])]
    mode = d.choose(["nearest", *smooth])
    aligned = ", align_corners=True" if mode != "nearest" and d.perhaps() else ""
    d.add(f"F.interpolate({v}, scale_factor=2, mode={mode!r}{aligned})")


@kind(lambda value: value.ndim >= 2 and _has_room(value))
def pad(d: Drawing, v: str) -> None:
    value = d.values[v]
    count = d.choose(range(1, value.ndim))  # of axes, from the last one; the first ones are channels
    widths = [d.choose([1, 0, 2]) for _ in range(2 * count)]
    d.add(f"F.pad({v}, {tuple(widths)}{d.choose(['', '', ', value=1.0'])})")


@kind(lambda value: _is_spatial(value) and _widest(value) >= 2 and _has_room(value))
def pad_by_itself(d: Drawing, v: str) -> None:
    widths = [d.choose([1, 0]) for _ in range(2 * _axes(d.values[v]))]
    d.add(f"F.pad({v}, {tuple(widths)}, mode={d.choose(['reflect', 'replicate', 'circular'])!r})")


@kind(lambda value: value.ndim >= 3)
def reduction(d: Drawing, v: str) -> None:
    rank = d.values[v].ndim
    axes = d.choose([tuple(range(2, rank)), (rank - 1,), (-1,), (1,), tuple(range(1, rank - 1))])
    keeps = d.perhaps()
    d.add(f"{v}.{d.choose(['mean', 'sum', 'amax', 'amin'])}({axes}, keepdim={keeps})")


@kind(lambda value: value.ndim >= 3)
def largest(d: Drawing, v: str) -> None:
    rank = d.values[v].ndim
    d.add(f"torch.{d.choose(['max', 'min'])}({v}, {d.choose([rank - 1, 1])}, keepdim={d.perhaps()})[0]")


# Movements.


@kind(lambda value: value.ndim >= 2 and _has_room(value))
def concatenation(d: Drawing, v: str) -> None:
    value = d.values[v]
    axis = d.choose([1, 1, value.ndim - 1])
    rest = value.shape[:axis], value.shape[axis + 1 :]
    other = d.operand(
        lambda value: (
            (value.shape[:axis], value.shape[axis + 1 :]) == rest
            and value.ndim > axis
            and value.shape[axis] <= 2 * MOST_CHANNELS
            and _has_room(value)
        )
    )
    if other is None:
        other = v
    d.add(
        f"torch.cat([{', '.join(d.choose([[v, other], [other, v], [v, v]]))}], {d.choose([axis, axis - value.ndim])})"
    )


@kind(lambda value: value.ndim >= 2 and value.shape[1] >= 2)
def split(d: Drawing, v: str) -> None:
    channels = d.values[v].shape[1]
    first = d.choose(range(1, channels))
    if d.perhaps():
        d.add(f"torch.split({v}, [{first}, {channels - first}], 1)", 2)
    else:
        d.add(f"{v}.chunk(2, 1)", 2)


@kind(lambda value: value.ndim >= 2 and value.shape[1] >= 2)
def part(d: Drawing, v: str) -> None:
    channels = d.values[v].shape[1]
    d.add(
        d.choose(
            [
                f"{v}[:, {d.choose(range(1, channels))}:]",
                f"{v}[:, ::2]",
                f"{v}[..., :-1]" if d.values[v].shape[-1] > 1 else f"{v}[:, 1:]",
                f"{v}[:, {[channels - 1, *range(channels - 1)]}]",
                f"{v}[:, {[0, 0, channels - 1]}]",
                *([f"{v}.select(1, {d.choose([0, 1])})", f"{v}.unbind(1)[-1]"] if d.values[v].ndim > 2 else []),
            ]
        )
    )


@kind(lambda value: value.ndim >= 3 and len(_divisors(value.shape[1])) > 2, weight=2)
def shuffle(d: Drawing, v: str) -> None:
    value = d.values[v]
    groups = d.choose(_divisors(value.shape[1])[1:-1])
    space = ", ".join(map(str, value.shape[2:]))
    viewed = f"{v}.reshape({v}.shape[0], {groups}, -1, {space}).transpose(1, 2)"
    d.add(d.choose([f"{viewed}.reshape({v}.shape[0], -1, {space})", f"{viewed}.flatten(1, 2)"]))


@kind(lambda value: value.ndim >= 2)
def reorder(d: Drawing, v: str) -> None:
    rank = d.values[v].ndim
    axis = d.choose([1, rank - 1])
    d.add(
        d.choose(
            [f"{v}.flip({axis})", f"torch.roll({v}, 1, {axis})", f"{v}.contiguous()", f"{v}.clone()", f"{v}.detach()"]
        )
    )


@kind(lambda value: value.ndim >= 3)
def permutation(d: Drawing, v: str) -> None:
    rank = d.values[v].ndim
    to_last, to_first = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    d.add(d.choose([f"{v}.permute{to_last}", f"{v}.permute{to_first}", f"{v}.transpose(1, -1)", f"{v}.movedim(-1, 1)"]))


@kind(lambda value: value.ndim >= 3)
def to_tokens(d: Drawing, v: str) -> None:
    d.add(f"{v}.flatten(2){d.choose(['.transpose(1, 2)', ''])}")


@kind(lambda value: value.ndim <= 4 or 1 in value.shape[1:])
def lengths_of_one(d: Drawing, v: str) -> None:
    value = d.values[v]
    ones = [axis for axis, length in enumerate(value.shape) if length == 1 and axis > 0]
    options = [f"{v}.unsqueeze({axis})" for axis in (1, -1) if value.ndim <= 4]
    options += [f"{v}.squeeze({axis})" for axis in ones if value.ndim > 2]
    if ones and _has_room(value):
        sizes = [-1] * value.ndim
        sizes[d.choose(ones)] = 2
        options.append(f"{v}.expand{tuple(sizes)}")
    d.add(d.choose(options or [f"{v}.contiguous()"]))


@kind(lambda value: value.ndim >= 2 and _has_room(value) and value.shape[1] <= MOST_CHANNELS)
def repetition(d: Drawing, v: str) -> None:
    counts = [1, 2] + [1] * (d.values[v].ndim - 2)
    stacked = f"torch.stack([{v}, {v}], {d.choose([1, 2])}).flatten(1, 2)"
    d.add(d.choose([f"{v}.repeat({counts})", f"{v}.repeat_interleave(2, 1)", stacked]))


@kind(lambda value: value.ndim == 4 and (value.shape[1] % 4 == 0 or not any(n % 2 for n in value.shape[2:])), weight=6)
def pixel_shuffle(d: Drawing, v: str) -> None:
    d.add(f"F.pixel_{'shuffle' if d.values[v].shape[1] % 4 == 0 else 'unshuffle'}({v}, 2)")


@kind(lambda value: value.ndim >= 3 and value.shape[1] % 2 == 0, weight=4)
def regrouped(d: Drawing, v: str) -> None:
    """Half of the channels are taken for samples, and are put back."""
    value = d.values[v]
    shape = ", ".join(map(str, (value.shape[1] // 2, *value.shape[2:])))
    folded = d.add(f"{v}.reshape(-1, {shape})")
    d.values.pop(folded)
    inner = d.choose(["norm", "relu", "linear"])
    call = {
        "norm": lambda: f"{d.layer(_norm_source(d, value[:, ::2]))}({folded})",
        "relu": lambda: f"F.relu({folded})",
        "linear": lambda: f"{d.layer(f'nn.Linear({value.shape[-1]}, {value.shape[-1]})')}({folded})",
    }[inner]()
    d.add(f"({call}).reshape({v}.shape)")


@kind(lambda value: value.ndim == 3 and value.shape[1] <= 2 * MOST_CHANNELS, weight=4)
def tokens(d: Drawing, v: str) -> None:
    """A norm over the last axis of a sequence, which batch norm takes as samples of one axis."""
    value = d.values[v]
    flat = f"{v}.{d.choose(['flatten(0, 1)', f'reshape(-1, {value.shape[2]})'])}"
    call = f"{d.layer(_norm_source(d, value.reshape(-1, value.shape[2])))}({flat})"
    d.add(f"{call}.unflatten(0, ({v}.shape[0], {value.shape[1]}))")


@kind(lambda value: value.ndim == 3, weight=4)
def samples_second(d: Drawing, v: str) -> None:
    """A sequence with its axis before that of the samples."""
    value = d.values[v]
    d.add(f"{d.layer(f'nn.Linear({value.shape[2]}, {d.choose([2, 3])})')}({v}.transpose(0, 1)).transpose(0, 1)")


# Sums and products.


def _same_shape(d: Drawing, v: str, others_only: bool = True) -> str | None:
    return d.operand(lambda value: value.shape == d.values[v].shape and (value is not d.values[v] or not others_only))


def _broadcasts(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor of the same rank is broadcast to another, of which it may be a gate."""
    return one.ndim == other.ndim and all(a in (b, 1) for a, b in zip(one.shape, other.shape, strict=True))


@kind()
def addition(d: Drawing, v: str) -> None:
    other = _same_shape(d, v) or _same_shape(d, v, False)
    alpha = d.choose(["", ", alpha=2", ", alpha=-0.5"])
    a, b = d.choose([(v, other), (other, v)])
    d.add(
        d.choose(
            [f"{v} + {other}", f"torch.add({a}, {b}{alpha})", f"torch.sub({a}, {b}{alpha})", f"torch.rsub({a}, {b})"]
        )
    )


@kind()
def broadcast(d: Drawing, v: str) -> None:
    other = d.operand(lambda value: _broadcasts(value, d.values[v]))
    d.add(d.choose([f"{v} + {other}", f"{other} - {v}", f"{v} * {other}", f"{other} * {v}"]))


@kind()
def double(d: Drawing, v: str) -> None:
    d.add(f"{v} + {v}")


@kind()
def product(d: Drawing, v: str) -> None:
    other = _same_shape(d, v) or v
    d.add(d.choose([f"{v} * {other}", f"{v} * {other}.sigmoid()", f"{v} / (1 + {other}.abs())"]))


@kind(lambda value: value.ndim >= 3)
def gate(d: Drawing, v: str) -> None:
    value = d.values[v]
    mean = d.add(f"{v}.mean({tuple(range(2, value.ndim))}, keepdim=True)")
    if value.ndim <= 5 and d.perhaps():
        channels = value.shape[1]
        mean = d.add(f"{d.layer(f'nn.Conv{_axes(value)}d({channels}, {channels}, 1)')}({mean})")
    a, b = d.choose([(v, f"{mean}.sigmoid()"), (f"torch.sigmoid({mean})", v)])
    d.add(d.choose([f"{a} * {b}", f"{v} / (0.5 + {mean}.sigmoid())"]))


@kind(lambda value: value.ndim >= 2)
def mean_over_samples(d: Drawing, v: str) -> None:
    """What all samples share, without an axis for them or with one of length 1.

    Half of it is taken away: where no sample differs, the whole would leave nothing but roundings to compare.
    """
    mean = d.choose([f"{v}.mean(0)", f"{v}.mean(0, keepdim=True)", f"{v}.amax(0)"])
    other = _same_shape(d, v, False)
    d.add(
        d.choose(
            [f"torch.sub({other}, {mean}, alpha=0.5)", f"{mean} + {other}", f"{mean} * {other}", f"{other} * {mean}"]
        )
    )


@kind(lambda value: value.ndim >= 2, weight=2)
def constants(d: Drawing, v: str) -> None:
    """By a number, by one per channel, per position or per feature, at either side."""
    value = d.values[v]
    channels, rank = value.shape[1], value.ndim
    shape = d.choose(
        [(channels, *[1] * (rank - 2)), (), (1, channels, *[1] * (rank - 2)), value.shape[-1:], value.shape[1:]]
    )
    k = d.layer(f"constant{tuple(shape)}") if shape else d.choose(["0.5", "-2.0", "3"])
    d.add(
        d.choose(
            [
                *[f"{v} * {k}", f"{v} + {k}", f"{v} / {k}", f"{v} - {k}", f"{k} - {v}", f"{k} * {v}", f"-{v}"],
                f"torch.add({v}, {k}, alpha=2)",
                f"torch.rsub({v}, {k}, alpha=3)",
            ]
        )
    )


# Patterns that networks are made of.


@kind(_is_narrow, weight=3)
def branches(d: Drawing, v: str) -> None:
    """Parallel convolutions, norms and the identity, added, as in re-parametrised networks."""
    value = d.values[v]
    count = d.choose([2, 3])
    made = []
    for _ in range(count):
        which = d.choose(["conv", "conv-norm", "norm", "identity"])
        name = v
        if which.startswith("conv"):
            name = d.add(f"{d.layer(_conv_source(d, value, keeps_shape=True))}({v})")
        if which.endswith("norm"):
            name = d.add(f"{d.layer(_norm_source(d, value))}({name})")
        made.append(name)
    d.add(f"{made[0]} {d.choose(['+', '+', '-'])} {' + '.join(made[1:])}")


@kind(_is_narrow, weight=6)
def pre_activated(d: Drawing, v: str) -> None:
    """A residual branch, or a dense one, that begins with a norm."""
    value = d.values[v]
    norm = d.add(f"{d.layer(_norm_source(d, value))}({v})")
    active = d.add(f"F.{d.choose(['relu', 'relu', 'gelu'])}({norm})")
    name = d.add(f"{d.layer(_conv_source(d, value, keeps_shape=True))}({active})")
    dense = _has_room(value) and d.seldom()
    d.add(f"torch.cat([{v}, {name}], 1)" if dense else f"{v} + {name}")


@kind(_takes_batch_norm)
def own_norm(d: Drawing, v: str) -> None:
    """A tensor with its own norm."""
    norm = d.add(f"{d.layer(_norm_source(d, d.values[v]))}({v})")
    a, b = d.choose([(v, norm), (norm, v)])
    d.add(d.choose([f"{a} + {b}", f"{a} - {b}", f"torch.add({a}, {b}, alpha=3)"]))


@kind(_is_narrow, weight=20)
def norm_between_convs(d: Drawing, v: str) -> None:
    """What gauges are for: something that lets shifts and scales pass, or some of them, between two convolutions."""
    before = set(d.values)
    if d.choose([True, True, True, False]):
        v = d.add(f"{d.layer(_conv_source(d, d.values[v]))}({v})")
    for _ in range(d.choose([1, 1, 2])):
        fitting = [name for name in d.choose([_POOLS, _POOLS, _PASSING]) if KINDS[name].fits(d.values[v])]
        if fitting:
            v = d.draw(d.choose(fitting), v)
    if _takes_batch_norm(d.values[v]):
        v = d.draw("batch_norm", v)
    v = d.draw("conv" if _is_narrow(d.values[v]) else "linear", v)
    if d.choose([True, True, False]):  # nobody else reads what lies between
        d.values = {name: value for name, value in d.values.items() if name in before or name == v}


_POOLS = [
    *["average_pool"] * 4,
    "max_pool",
    "max_pool",
    "upsample",
    "reduction",
    "pad",
    "pad_by_itself",
    "adaptive_pool",
]
_PASSING = [
    *["concatenation", "split", "shuffle", "reorder", "relu", "part", "addition", "prelu", "repetition", "constants"],
    *["permutation", "to_tokens", "flatten", "largest", "lengths_of_one", "gate"],
]
_CHAIN = ["norm_between_convs", "pre_activated", *_POOLS, *_PASSING, "batch_norm", "conv", "linear"]


LONGEST = 14
_NORMS = ("BatchNorm", "InstanceNorm")
_LENGTHS = {2: 1, 3: 9, 4: 7, 5: 4}


def draw_program(choose: Choose) -> Program:
    """A network of 3 to `LONGEST` lines."""
    rank = choose([4, 4, 3, 2, 5, 0])
    token_input = rank == 0
    if token_input:
        shape: tuple[int, ...] = (2, choose(range(1, 6)))
    else:
        space = [choose(range(_LENGTHS[rank], 1, -1)) for _ in range(rank - 2)]
        shape = (2, choose(range(1, MOST_CHANNELS + 1)), *space)
    channels_last = rank == 4 and choose([False, False, True])
    dtype = choose([torch.float64] * 5 + [torch.float32])
    start = Program((), (), shape, token_input, torch.float64, channels_last, seed=choose(range(1000)))
    d = Drawing(choose, start.inputs(2, 0), channels_last)
    if token_input:
        d.kind = "embedding"
        d.add(f"{d.layer(f'nn.Embedding({VOCABULARY}, {choose([3, 4, 2])})')}(x)")
    length = choose(range(3, LONGEST + 1))
    while len(d.lines) < length:
        # Late values are read more often; which kinds there are depends on the value.
        v = d.operand()
        names = choose([list(KINDS), list(KINDS), _CHAIN])
        fitting = [[name] * KINDS[name].weight for name in names if KINDS[name].fits(d.values[v])]
        d.draw(choose([name for names in fitting for name in names]), v)
    outputs = _outputs(d, choose)
    if not any(
        norm in source for line in _read_lines(d.lines, outputs) for _, source in line.layers for norm in _NORMS
    ):
        _add_head(d)
        outputs = (list(d.values)[-1], *outputs[1:])
    return Program(
        _read_lines(d.lines, outputs),
        outputs,
        shape,
        token_input,
        dtype,
        channels_last,
        fresh_batch=choose([3, 1, 5]),
        seed=start.seed,
    )


def _add_head(d: Drawing) -> None:
    """A norm, and a linear operation behind it: a network without a norm would be a wasted example."""
    for name, fits in (("batch_norm", _takes_batch_norm), ("linear", lambda value: True)):
        last = list(d.values)[-1]
        if fits(d.values[last]):
            d.draw("conv" if name == "linear" and _is_narrow(d.values[last]) else name, last)


def _outputs(d: Drawing, choose: Choose) -> tuple[str, ...]:
    """The last value; sometimes another one beside it, or all that nobody reads."""
    *others, last = [name for name in d.values if name != "x"]
    style = choose(["last", "last", "last", "another", "unread"])
    if style == "another" and others:
        return (last, choose(others[::-1]))
    if style == "unread":
        read = set().union(*(_names_read(line) for line in d.lines))
        return (last, *(name for name in others if name not in read))
    return (last,)


def _names_read(line: Line) -> set[str]:
    return set(re.findall(r"\bv\d+\b", line.code.partition(" = ")[2] or line.code))


def _read_lines(lines: Sequence[Line], outputs: Sequence[str]) -> tuple[Line, ...]:
    """Without the lines that no output depends on; layers stay where a later line calls them too."""
    read, found = set(outputs), []
    for line in reversed(lines):
        names = re.findall(r"\bv\d+\b", line.code.partition(" = ")[0])
        made = set(names if " = " in line.code else names[:1])  # what is changed in place is named first
        calls = {name for kept in found for name in re.findall(r"\bm\.(\w+)", f"{kept.code} {kept.layers}")}
        if made & read:
            read |= _names_read(line)
            found.append(line)
        elif any(name in calls for name, _ in line.layers):
            found.append(Line(line.kind, "pass", line.layers))
    return tuple(found[::-1])


def sampled_programs(count: int, seed: int = 0) -> list[Program]:
    """Fixed samples."""
    return [draw_program(random.Random(seed * 100_000 + index).choice) for index in range(count)]
