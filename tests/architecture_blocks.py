"""Building blocks that the networks of `architectures` share: layers by short names, and every wiring.

The vocabulary: `conv` is a padded convolution without bias, `cn` a convolution and its norm, `cna` that and an
activation, `na` a norm and an activation (what a pre-activation block begins with).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = int | tuple[int, int]
Act = Callable[..., nn.Module]
VOCABULARY = 11


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def conv(i: int, o: int, k: Kernel = 3, s: int = 1, g: int = 1, d: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    kernel = k if isinstance(k, tuple) else (k, k)
    padding = (d * (kernel[0] - 1) // 2, d * (kernel[1] - 1) // 2)
    return nn.Conv2d(i, o, kernel, s, padding, d, g, bias)


def make_act(act: Act, channels: int) -> nn.Module:
    return act(channels) if act is nn.PReLU else act()


def cn(i: int, o: int, k: Kernel = 3, s: int = 1, g: int = 1, d: int = 1, bias: bool = False) -> nn.Sequential:
    return chain(conv(i, o, k, s, g, d, bias), nn.BatchNorm2d(o))


def cna(
    i: int, o: int, k: Kernel = 3, s: int = 1, g: int = 1, d: int = 1, bias: bool = False, act: Act = nn.ReLU
) -> nn.Sequential:
    return chain(conv(i, o, k, s, g, d, bias), nn.BatchNorm2d(o), make_act(act, o))


def cna1(i: int, o: int, k: int = 1, act: Act = nn.ReLU) -> nn.Sequential:
    """The same over points or time: Conv1d, BatchNorm1d, activation."""
    return chain(nn.Conv1d(i, o, k, padding=k // 2), nn.BatchNorm1d(o), make_act(act, o))


def na(channels: int, act: Act = nn.ReLU) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), make_act(act, channels)


def lna(i: int, o: int, act: Act = nn.ReLU) -> nn.Sequential:
    """Linear, BatchNorm1d, activation."""
    return chain(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), make_act(act, o))


def head(channels: int, classes: int = 10) -> nn.Sequential:
    return chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def up() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="nearest")


class Sum(nn.Module):
    """Adds what its branches make of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return cast(Tensor, total)


class Cat(nn.Module):
    """Concatenates what its branches make of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def plus(*body: nn.Module) -> Sum:
    """x + body(x)."""
    return Sum(nn.Identity(), chain(*body))


class Times(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LayerScale(nn.Module):
    """Multiplies by a learned factor per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Shift(nn.Module):
    """Adds one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Pick(nn.Module):
    """Some of the channels, from `start` to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


class PadChannels(nn.Module):
    """The shortcut without weights: channels of zeros before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.pad = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad)


class Subsample(nn.Module):
    """Every second pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


class Shuffle(nn.Module):
    """ShuffleNet's exchange of channels between groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: x times a gate per channel."""

    def __init__(self, c: int, act: Act = nn.ReLU, gate: Act = nn.Sigmoid) -> None:
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act(), gate()
        self.fc1, self.fc2 = nn.Conv2d(c, max(c // 4, 4), 1), nn.Conv2d(max(c // 4, 4), c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class TokenNorm(nn.BatchNorm1d):
    """Batch norm over the features of tokens (N, L, C), by way of (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ToTokens(nn.Module):
    """(N, C, H, W) to (N, HW, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class MeanTokens(nn.Module):
    """(N, L, C) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attention(nn.Module):
    """Multi-head self-attention over (N, L, C)."""

    def __init__(self, c: int, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(c, 3 * c), nn.Linear(c, c), heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(y.transpose(1, 2).reshape(n, length, c)))


def shortcut(i: int, o: int, s: int = 1) -> nn.Module:
    return nn.Identity() if i == o and s == 1 else cn(i, o, 1, s)


def basic(i: int, o: int, s: int = 1, act: Act = nn.ReLU, after: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """He et al. 2016a: two 3x3 convolutions, the activation after the sum; `after` ends the branch (attention)."""
    end = () if after is None else (after(o),)
    return chain(Sum(chain(cna(i, o, 3, s, act=act), cn(o, o, 3), *end), shortcut(i, o, s)), make_act(act, o))


def bottleneck(
    i: int, o: int, s: int = 1, mid: int = 0, middle: nn.Module | None = None, short: nn.Module | None = None
) -> nn.Module:
    """He et al. 2016a: 1x1, 3x3 (or `middle`), 1x1, the activation after the sum."""
    mid = mid or o // 4
    body = chain(cna(i, mid, 1), middle or cna(mid, mid, 3, s), cn(mid, o, 1))
    return chain(Sum(body, short or shortcut(i, o, s)), nn.ReLU())


class PreActivation(nn.Module):
    """He et al. 2016b: norm and activation first; a shortcut with weights reads the activated tensor."""

    def __init__(self, pre: nn.Module, body: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.pre, self.body, self.projection = pre, body, projection

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        return cast(Tensor, self.body(y) + (x if self.projection is None else self.projection(y)))


def preact_basic(i: int, o: int, s: int = 1, act: Act = nn.ReLU) -> nn.Module:
    projection = None if i == o and s == 1 else conv(i, o, 1, s)
    return PreActivation(chain(*na(i, act)), chain(conv(i, o, 3, s), *na(o, act), conv(o, o, 3)), projection)


def preact_bottleneck(i: int, o: int, s: int = 1) -> nn.Module:
    mid, projection = o // 4, None if i == o and s == 1 else conv(i, o, 1, s)
    body = chain(conv(i, mid, 1), *na(mid), conv(mid, mid, 3, s), *na(mid), conv(mid, o, 1))
    return PreActivation(chain(*na(i)), body, projection)


def inverted(i: int, o: int, s: int, t: int, act: Act, k: int = 3, attention: nn.Module | None = None) -> nn.Module:
    """Sandler et al. 2018: expand, depthwise, (attention), a linear projection; a sum where the shape stays."""
    mid = i * t
    body = [cna(i, mid, 1, act=act), cna(mid, mid, k, s, mid, act=act), attention or nn.Identity(), cn(mid, o, 1)]
    return plus(*body) if s == 1 and i == o else chain(*body)


def separable(i: int, o: int, k: int = 3, s: int = 1, act: Act = nn.ReLU) -> nn.Sequential:
    """Howard et al. 2017: depthwise and pointwise, each with norm and activation."""
    return chain(cna(i, i, k, s, i, act=act), cna(i, o, 1, act=act))


def stages(block: Callable[..., nn.Module], w: int, *plan: tuple[int, int, int], **options: object) -> nn.Sequential:
    """One block for each (inputs, outputs, stride), the channels times `w`."""
    return chain(*(block(i * w, o * w, s, **options) for i, o, s in plan))


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Puts `make(layer)` for every layer of one kind."""
    for name, child in module.named_children():
        setattr(module, name, make(child) if isinstance(child, kind) else replace(child, kind, make))
    return module


def resnet_stem(w: int) -> nn.Module:
    """He et al. 2016a: 7x7 with stride, norm, ReLU, max-pool."""
    return chain(cna(3, 8 * w, 7, 2), nn.MaxPool2d(3, 2, 1))


# Modules of one family each, in the order of `architectures`


class FrozenNorm(nn.Module):
    """Wu et al. 2019, Detectron2: x * scale + bias from four buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class NormGate(nn.Module):
    """Liu et al. 2021, NAM: x times the sigmoid of its norm, weighted by the size of gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.norm.weight.abs() / self.norm.weight.abs().sum()
        return x * torch.sigmoid(self.norm(x) * weight.view(1, -1, 1, 1))


class SelectiveKernel(nn.Module):
    """Li et al. 2019: two branches summed with softmax weights computed from their sum."""

    def __init__(self, c: int, s: int, g: int = 2) -> None:
        super().__init__()
        self.small, self.large = cna(c, c, 3, s, g), cna(c, c, 3, s, g, 2)
        self.squeeze, self.select = chain(nn.AdaptiveAvgPool2d(1), cna(c, c // 2, 1)), nn.Conv2d(c // 2, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.select(self.squeeze(branches.sum(1)))
        weights = weights.view(weights.shape[0], 2, -1, 1, 1).softmax(1)
        return (branches * weights).sum(1)


class Hierarchy(nn.Module):
    """Gao et al. 2019, Res2Net: each slice goes through a convolution together with the result of the one before."""

    def __init__(self, c: int, s: int, first: bool, scale: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList([cna(c // scale, c // scale, 3, s) for _ in range(scale - 1)])
        self.pool, self.first = nn.AvgPool2d(3, s, 1) if first else nn.Identity(), first

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.convs) + 1, 1)
        done: list[Tensor] = []
        for part, layer in zip(parts, self.convs, strict=False):
            done.append(layer(part if self.first or not done else done[-1] + part))
        return torch.cat([*done, self.pool(parts[-1])], 1)


class NormFreeBlock(nn.Module):
    """Brock et al. 2021: x + alpha * gain * 2 * gate(branch(beta * act(x))), every activation scaled."""

    def __init__(self, i: int, o: int, s: int, alpha: float = 0.2, beta: float = 0.9) -> None:
        super().__init__()
        mid = o // 2
        self.act, self.alpha, self.beta = chain(nn.ReLU(), Times(1.7139588594436646)), alpha, beta
        branch = (conv(i, mid, 1, bias=True), self.act, conv(mid, mid, 3, s, bias=True), self.act)
        self.body = chain(*branch, conv(mid, o, 1, bias=True), SqueezeExcite(o), Times(2.0))
        pool = nn.AvgPool2d(2) if s == 2 else nn.Identity()
        self.short = None if i == o and s == 1 else chain(pool, conv(i, o, 1, bias=True))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x) * self.beta
        return self.body(y) * self.scale * self.alpha + (x if self.short is None else self.short(y))


class Standardise(nn.Module):
    """Qiao et al. 2019, Brock et al. 2021: weights of mean 0 and norm 1 per output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) * flat.shape[1] + 1e-4).sqrt()
        return flat.reshape(weight.shape)


class FixupBlock(nn.Module):
    """Zhang et al. 2019: the basic block; the shortcut's convolution reads x + bias1a."""

    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.bias1a, self.body = Shift(), chain(conv(i, o, 3, s), Shift(), nn.ReLU(), Shift(), conv(o, o))
        self.scale, self.bias2b = nn.Parameter(torch.ones(1)), Shift()
        self.short = None if i == o and s == 1 else conv(i, o, 1, s)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bias1a(x)
        return F.relu(self.bias2b(self.body(y) * self.scale) + (x if self.short is None else self.short(y)))


class DenseBlock(nn.Module):
    """Huang et al. 2017: every layer reads all that came before; from a list, or one concatenation after the other."""

    def __init__(self, layers: list[nn.Module], nested: bool) -> None:
        super().__init__()
        self.layers, self.nested = nn.ModuleList(layers), nested

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            y = layer(torch.cat(features, 1))
            features = [torch.cat([*features, y], 1)] if self.nested else [*features, y]
        return features[0] if self.nested else torch.cat(features, 1)


class DualPath(nn.Module):
    """Chen et al. 2017: a residual stream and a dense one, both read through one norm on their concatenation."""

    def __init__(self, i: int, residual: int, grow: int, s: int, project: bool) -> None:
        super().__init__()
        mid, end = residual, residual + grow
        branch = (*na(i), conv(i, mid, 1), *na(mid), conv(mid, mid, 3, s, 2))
        self.body = chain(*branch, *na(mid), conv(mid, end, 1))
        self.project = chain(*na(i), conv(i, end + grow, 1, s)) if project else None
        self.residual = residual

    def forward(self, pair: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = pair if isinstance(pair, Tensor) else torch.cat(pair, 1)
        if self.project is not None:
            y = self.project(x)
            stream, dense = y[:, : self.residual], y[:, self.residual :]
        else:
            stream, dense = pair
        y = self.body(x)
        return stream + y[:, : self.residual], torch.cat([dense, y[:, self.residual :]], 1)


class Join(nn.Module):
    """The two streams as one tensor."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(pair, 1)


class BothSigns(nn.Module):
    """Shang et al. 2016, C.ReLU as in PVANET (Kim et al. 2016): x and -x, each with scale and shift, under ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2 * channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(2 * channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([x, -x], 1) * self.scale + self.shift)


class TaskNorms(nn.Module):
    """Bilen and Vedaldi 2017: convolutions shared by two tasks, norms and classifiers of their own."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c = 16 * w
        self.stem, self.first, self.second = cna(3, c, 3, 2), conv(c, c), conv(c, c, 3, 2)
        self.norms = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(c), nn.BatchNorm2d(c)]) for _ in range(2)])
        self.heads = nn.ModuleList([head(c), head(c)])

    def forward(self, x: Tensor) -> Tensor:
        y, logits = self.first(self.stem(x)), []
        for (norm1, norm2), end in zip(self.norms, self.heads, strict=True):
            logits.append(end(F.relu(norm2(self.second(F.relu(norm1(y)))))))
        return torch.cat(logits, 1)


class RepMixer(nn.Module):
    """Vasu et al. 2023b, FastViT: x + scale * (mixer(x) - norm(x))."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mixer, self.norm = Sum(nn.BatchNorm2d(c), cn(c, c, 1, 1, c), cn(c, c, 3, 1, c)), nn.BatchNorm2d(c)
        self.scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (self.mixer(x) - self.norm(x))


def leaky(i: int, o: int, k: int = 3, s: int = 1) -> nn.Module:
    return cna(i, o, k, s, act=nn.LeakyReLU)


class YoloNeck(nn.Module):
    """Jocher et al. 2020: pyramid pooling, upsampling and concatenation, two scales of predictions as one list."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c, d = 8 * w, 16 * w
        self.c3, self.c4 = chain(leaky(3, c, 3, 2), leaky(c, c, 3, 2)), chain(leaky(c, d, 3, 2), csp(d, d))
        pools = Cat(nn.Identity(), nn.MaxPool2d(5, 1, 2), nn.MaxPool2d(9, 1, 4))
        self.pool = chain(leaky(d, c, 1), pools, leaky(3 * c, d, 1))
        self.lateral, self.top, self.down = chain(leaky(d, c, 1), up()), csp(2 * c, c), leaky(c, c, 3, 2)
        self.bottom, self.heads = csp(c + d, d), nn.ModuleList([nn.Conv2d(c, 7, 1), nn.Conv2d(d, 7, 1)])

    def forward(self, x: Tensor) -> Tensor:
        c3 = self.c3(x)
        c4 = self.pool(self.c4(c3))
        p3 = self.top(torch.cat([self.lateral(c4), c3], 1))
        p4 = self.bottom(torch.cat([self.down(p3), c4], 1))
        return torch.cat([end(p).flatten(2) for end, p in zip(self.heads, (p3, p4), strict=True)], 2)


def csp(i: int, o: int) -> nn.Module:
    """YOLOv5's first BottleneckCSP: a norm on the concatenation of two bare convolutions."""
    mid = o // 2
    through = chain(leaky(i, mid, 1), plus(leaky(mid, mid, 1), leaky(mid, mid)), conv(mid, mid, 1))
    return chain(Cat(through, conv(i, mid, 1)), *na(o, nn.LeakyReLU), leaky(o, o, 1))


class PoolMixer(nn.Module):
    """Yu et al. 2022: the average of the neighbours minus the pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class TransformerLayer(nn.Module):
    """Vaswani et al. 2017 in either order, any norm."""

    def __init__(self, c: int, norm: Callable[[int], nn.Module], pre: bool, inner: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.pre = norm(c), norm(c), Attention(c), pre
        middle = (TokenNorm(2 * c),) if inner else ()
        self.ffn = chain(nn.Linear(c, 2 * c), *middle, nn.GELU(), nn.Linear(2 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.ffn(x))


class LinearNorm(nn.Module):
    """Graham et al. 2021: linear, and a norm over flattened tokens."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(i, o, bias=False), nn.BatchNorm1d(o)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


class LevitAttention(nn.Module):
    """Graham et al. 2021 without position biases: hardswish before the projection; queries of every `s`-th pixel."""

    def __init__(self, i: int, o: int, s: int = 1, heads: int = 2, key: int = 4) -> None:
        super().__init__()
        self.key, self.value, self.heads, self.stride = key, 2 * key, heads, s
        self.q, self.kv = LinearNorm(i, heads * key), LinearNorm(i, 3 * heads * key)
        self.proj = chain(nn.Hardswish(), LinearNorm(2 * heads * key, o))

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        side = int(length**0.5)
        coarse = (
            x if self.stride == 1 else x.view(n, side, side, c)[:, :: self.stride, :: self.stride].reshape(n, -1, c)
        )
        q = self.q(coarse).view(n, -1, self.heads, self.key).permute(0, 2, 1, 3) * self.key**-0.5
        k, v = self.kv(x).view(n, length, self.heads, -1).split([self.key, self.value], 3)
        weights = (q @ k.permute(0, 2, 3, 1)).softmax(-1)
        return self.proj((weights @ v.permute(0, 2, 1, 3)).transpose(1, 2).reshape(n, coarse.shape[1], -1))


class Embedding(nn.Module):
    """Words and positions."""

    def __init__(self, c: int, longest: int = 128) -> None:
        super().__init__()
        self.words, self.position = nn.Embedding(VOCABULARY, c), nn.Parameter(torch.zeros(1, longest, c))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.position[:, : tokens.shape[1]]


class ClassToken(nn.Module):
    """Dosovitskiy et al. 2021: a learned token first, positions added."""

    def __init__(self, c: int, longest: int = 257) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, c)), nn.Parameter(torch.zeros(1, longest, c))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return x + self.position[:, : x.shape[1]]


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Fuse(nn.Module):
    """Sun et al. 2019, HRNet: a block per resolution, then each gets the other, upsampled or strided."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.fine, self.coarse = basic(c, c), basic(d, d)
        self.rise, self.fall = chain(cn(d, c, 1), up()), cn(c, d, 3, 2)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        fine, coarse = self.fine(pair[0]), self.coarse(pair[1])
        return F.relu(fine + self.rise(coarse)), F.relu(self.fall(fine) + coarse)


class HighResolution(nn.Module):
    """Sun et al. 2019: two resolutions side by side, concatenated at the end."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c, d = 8 * w, 16 * w
        self.stem, self.start = chain(cna(3, c, 3, 2), basic(c, c)), nn.ModuleList([cna(c, c), cna(c, d, 3, 2)])
        self.fuse, self.end = chain(Fuse(c, d), Fuse(c, d)), chain(cna(c + d, c, 1), nn.Conv2d(c, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        fine, coarse = self.fuse((self.start[0](x), self.start[1](x)))
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.end(torch.cat([fine, coarse], 1))


class UNet(nn.Module):
    """Ronneberger et al. 2015 with norms: down by max-pool, up by `rise`, concatenation with what went down."""

    def __init__(self, widths: tuple[int, int, int], down: list[nn.Module], rise: list[nn.Module]) -> None:
        super().__init__()
        a, b, _ = widths
        self.down, self.rise = nn.ModuleList(down), nn.ModuleList(rise)
        self.join = nn.ModuleList([chain(cna(2 * b, b), cna(b, b)), chain(cna(2 * a, a), cna(a, a))])
        self.end = nn.Conv2d(a, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for rise, join, skip in zip(self.rise, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, rise(x)], 1))
        return self.end(x)


class ResUNet(nn.Module):
    """Zhang et al. 2018b: pre-activation units whose shortcuts read the raw tensor, strides down, upsampling up."""

    def __init__(self, w: int) -> None:
        super().__init__()
        a, b, c = 8 * w, 16 * w, 32 * w
        self.first = Sum(chain(cna(3, a), conv(a, a)), cn(3, a, 1))
        self.second, self.bridge, self.up = self._unit(a, b, 2), self._unit(b, c, 2), up()
        self.join2, self.join1, self.end = self._unit(c + b, b), self._unit(b + a, a), nn.Conv2d(a, 1, 1)

    @staticmethod
    def _unit(i: int, o: int, s: int = 1) -> nn.Module:
        return Sum(chain(*na(i), conv(i, o, 3, s), *na(o), conv(o, o)), cn(i, o, 1, s))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        middle = self.second(fine)
        x = self.join2(torch.cat([self.up(self.bridge(middle)), middle], 1))
        return torch.sigmoid(self.end(self.join1(torch.cat([self.up(x), fine], 1))))


class Pyramid(nn.Module):
    """Lin et al. 2017: lateral 1x1, top-down sums, 3x3; one head for both levels."""

    def __init__(self, w: int) -> None:
        super().__init__()
        a, b, c = 8 * w, 16 * w, 12 * w
        self.c2, self.c3 = chain(resnet_stem(w), basic(a, a)), basic(a, b, 2)
        self.lateral, self.out = nn.ModuleList([cn(a, c, 1), cn(b, c, 1)]), nn.ModuleList([cn(c, c), cn(c, c)])
        self.up, self.head = up(), chain(conv(c, c, bias=True), nn.ReLU(), conv(c, 5, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        c2 = self.c2(x)
        p3 = self.lateral[1](self.c3(c2))
        p2 = self.lateral[0](c2) + self.up(p3)
        return torch.cat([self.head(self.out[0](p2)).flatten(2), self.head(self.out[1](p3)).flatten(2)], 2)


class DeepLab(nn.Module):
    """Chen et al. 2017b: dilated branches and a global one, upsampled and concatenated."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c, d = 16 * w, 8 * w
        self.body = chain(resnet_stem(w), basic(8 * w, c), cna(c, c, 3, d=2))
        self.branches = nn.ModuleList([cna(c, d, 1), cna(c, d, 3, d=2), cna(c, d, 3, d=4)])
        self.globally = chain(nn.AdaptiveAvgPool2d(1), cna(c, d, 1))
        self.end = chain(cna(4 * d, d, 1), nn.Dropout(), nn.Conv2d(d, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        whole = F.interpolate(self.globally(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = self.end(torch.cat([*(branch(y) for branch in self.branches), whole], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Siamese(nn.Module):
    """Chang et al. 2019: one set of convolutions for two inputs, norms for each; their distance is classified."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c = 8 * w
        self.convs = nn.ModuleList([conv(3, c, 3, 2), conv(c, 2 * c, 3, 2)])
        self.norms = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(c), nn.BatchNorm2d(2 * c)]) for _ in range(2)])
        self.pool, self.end = chain(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(2 * c, 2)

    def forward(self, pair: Tensor) -> Tensor:
        found = []
        for x, norms in zip(pair.chunk(2, 1), self.norms, strict=True):
            for layer, norm in zip(self.convs, norms, strict=True):
                x = F.relu(norm(layer(x)))
            found.append(self.pool(x))
        return self.end((found[0] - found[1]).abs())


class AlignedPoints(nn.Module):
    """Qi et al. 2017: a small network predicts a rotation of the points, the identity added; a maximum over points."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c, d = 8 * w, 16 * w
        self.points, self.matrix = chain(cna1(3, c), cna1(c, d)), chain(lna(d, c), nn.Linear(c, 9))
        self.register_buffer("identity", torch.eye(3).flatten())
        self.features = chain(cna1(3, c), cna1(c, d), nn.Conv1d(d, 2 * d, 1), nn.BatchNorm1d(2 * d))
        self.end = chain(lna(2 * d, d), nn.Dropout(), nn.Linear(d, 10))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(torch.max(self.points(x), 2)[0]) + self.identity
        x = torch.bmm(x.transpose(1, 2), matrix.view(-1, 3, 3)).transpose(1, 2)
        return self.end(self.features(x).amax(2))


class Chomp(nn.Module):
    """Bai et al. 2018: cuts the padding's end off, which leaves a causal convolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class LastStep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, -1]


class WaveNet(nn.Module):
    """Van den Oord et al. 2016: gated dilated convolutions, a residual stream and a sum of skips."""

    def __init__(self, c: int, layers: int = 3) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, c, 1)
        gated = [chain(nn.Conv1d(c, 2 * c, 2, dilation=2**n, bias=False), nn.BatchNorm1d(2 * c)) for n in range(layers)]
        self.gated = nn.ModuleList(gated)
        self.stay = nn.ModuleList([nn.Conv1d(c, c, 1) for _ in range(layers)])
        self.skip = nn.ModuleList([nn.Conv1d(c, c, 1) for _ in range(layers)])
        self.end = chain(nn.BatchNorm1d(c), nn.ReLU(), nn.Conv1d(c, c, 1), nn.ReLU(), nn.Conv1d(c, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), None
        for number, (gated, stay, skip) in enumerate(zip(self.gated, self.stay, self.skip, strict=True)):
            signal, gate = gated(F.pad(x, (2**number, 0))).chunk(2, 1)
            y = torch.tanh(signal) * torch.sigmoid(gate)
            x, total = x + stay(y), skip(y) if total is None else total + skip(y)
        return self.end(total)


class Transposed(nn.Module):
    """A body over (N, C, L) for tokens (N, L, C)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = chain(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)


class SpeakerBlock(nn.Module):
    """Desplanques et al. 2020, SE-Res2Block: convolution, ReLU, norm, in this order."""

    def __init__(self, c: int, dilation: int, scale: int = 4) -> None:
        super().__init__()
        part = c // scale
        self.first, self.last = self._layer(c, c, 1), self._layer(c, c, 1)
        self.convs = nn.ModuleList([self._layer(part, part, 3, dilation) for _ in range(scale - 1)])
        squeeze = (nn.AdaptiveAvgPool1d(1), nn.Conv1d(c, max(c // 4, 4), 1), nn.ReLU())
        self.gate = chain(*squeeze, nn.Conv1d(max(c // 4, 4), c, 1), nn.Sigmoid())

    @staticmethod
    def _layer(i: int, o: int, k: int, d: int = 1) -> nn.Module:
        return chain(nn.Conv1d(i, o, k, padding=d * (k - 1) // 2, dilation=d), nn.ReLU(), nn.BatchNorm1d(o))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).chunk(len(self.convs) + 1, 1)
        done: list[Tensor] = []
        for part, layer in zip(parts, self.convs, strict=False):
            done.append(layer(done[-1] + part if done else part))
        y = self.last(torch.cat([*done, parts[-1]], 1))
        return y * self.gate(y) + x


class Speaker(nn.Module):
    """Desplanques et al. 2020: blocks read the sum of all before, attentive statistics, an embedding with norms."""

    def __init__(self, w: int) -> None:
        super().__init__()
        c = 16 * w
        self.stem = chain(nn.Conv1d(20, c, 5, padding=2), nn.ReLU(), nn.BatchNorm1d(c))
        self.blocks, self.join = nn.ModuleList([SpeakerBlock(c, 2), SpeakerBlock(c, 3)]), nn.Conv1d(2 * c, c, 1)
        weigh = (nn.Conv1d(3 * c, 8 * w, 1), nn.ReLU(), nn.BatchNorm1d(8 * w), nn.Tanh(), nn.Conv1d(8 * w, c, 1))
        self.weigh, self.end = chain(*weigh, nn.Softmax(2)), chain(nn.BatchNorm1d(2 * c), nn.Linear(2 * c, c))
        self.norm = nn.BatchNorm1d(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = self.blocks[0](x)
        second = self.blocks[1](x + first)
        x = F.relu(self.join(torch.cat([first, second], 1)))
        spread = x.var(2, keepdim=True).clamp(min=1e-4).sqrt()
        weights = self.weigh(torch.cat([x, x.mean(2, keepdim=True).expand_as(x), spread.expand_as(x)], 1))
        mean = (x * weights).sum(2)
        spread = ((x.square() * weights).sum(2) - mean.square()).clamp(min=1e-4).sqrt()
        return self.norm(self.end(torch.cat([mean, spread], 1)))
