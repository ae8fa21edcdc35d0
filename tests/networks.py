"""Networks as people build them, each different in what a conversion can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.models.mobilenet import InvertedResidual
from lowprec.models.parts import parts_of

IN_PLACE = parts_of(nn.BatchNorm2d, lambda: nn.ReLU6(inplace=True))


def conv_norm(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Head(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def sequential() -> nn.Module:
    return nn.Sequential(conv_norm(1, 8), conv_norm(8, 12, 2), Head(12))


class Block(nn.Module):
    """Two norms, one ReLU object for both places and for all blocks."""

    def __init__(self, channels: int, relu: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def residual() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), relu, Block(8, relu), Block(8, relu), Head(8)
    )


class Dense(nn.Module):
    """Norm before convolution, and every layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        for index in range(3):
            self.add_module(f"norm{index}", nn.BatchNorm2d(4 + 4 * index))
            self.add_module(f"conv{index}", nn.Conv2d(4 + 4 * index, 4, 3, padding=1, bias=False))
        self.norm, self.head = nn.BatchNorm2d(16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for index in range(3):
            y = getattr(self, f"norm{index}")(torch.cat(features, 1))
            features.append(getattr(self, f"conv{index}")(F.relu(y)))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


def inverted_residual() -> nn.Module:
    return nn.Sequential(
        conv_norm(1, 8), InvertedResidual(8, 8, 1, 4, IN_PLACE), InvertedResidual(8, 8, 1, 2, IN_PLACE), Head(8)
    )


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip connection, an image out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv_norm(1, 6), conv_norm(6, 12, 2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(6)
        self.last, self.out = conv_norm(12, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        up = self.up_norm(self.up(self.down(y)))
        return self.out(self.last(torch.cat([y, up], 1)))


class Transformer(nn.Module):
    """Self-attention with batch norm over the features of all tokens, (N, C, L), and a LayerNorm beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2, self.last = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm1((x + self.attention(x, x, x)[0]).transpose(1, 2)).transpose(1, 2)
        x = self.norm2((x + self.down(F.gelu(self.up(x)))).transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(x).mean(1))


class SharedNorm(nn.Module):
    """One norm called twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.alias, self.head = self.norm, Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.alias(self.b(F.relu(self.norm(self.a(x)))))))


class Containers(nn.Module):
    """Norms in a list and in a dictionary, chosen by name in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.by_name = nn.ModuleDict({"clean": nn.BatchNorm2d(6), "noisy": nn.BatchNorm2d(6)})
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(self.by_name["clean"](x) + self.by_name["noisy"](x))


class Doubled(nn.BatchNorm2d):
    """A user's own: not to be replaced, because it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed() -> nn.Module:
    return nn.Sequential(conv_norm(1, 6), nn.Conv2d(6, 6, 3), Doubled(6), nn.GroupNorm(2, 6), Head(6))


def synchronised() -> nn.Module:
    """As `convert_sync_batchnorm` leaves it, beside a norm that was not synchronised."""
    model = nn.Sequential(conv_norm(1, 6), conv_norm(6, 6), Head(6))
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])
    return model


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), Head(6))
    model(torch.randn(2, 1, 8, 8))
    return model


def half() -> nn.Module:
    return sequential().half()


def double() -> nn.Module:
    return residual().double()


def channels_last() -> nn.Module:
    return inverted_residual().to(memory_format=torch.channels_last)


def frozen() -> nn.Module:
    """Fine-tuning: one norm in evaluation mode for good, without gradients."""
    model = sequential()
    model[0][1].requires_grad_(False)
    model[0][1].eval()
    model[0][1].running_mean.normal_()
    model[0][1].running_var.uniform_(0.5, 2)
    return model


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 8, 5, stride=2), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def tied() -> nn.Module:
    """Two convolutions with one weight and two norms without running statistics."""
    model = nn.Sequential(conv_norm(1, 6), conv_norm(6, 6), conv_norm(6, 6), Head(6))
    model[2][0].weight = model[1][0].weight
    for index in (1, 2):
        model[index][1] = nn.BatchNorm2d(6, track_running_stats=False)
    return model


class Branching(nn.Module):
    """Control flow that a tracer cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_norm(1, 6), conv_norm(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) if float(x.detach().mean()) >= 0 else x)


@dataclass(frozen=True)
class Network:
    """How to make one, and a batch for it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


def _images(dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, 1, 8, 8).to(dtype)


NETWORKS = {
    "sequential": Network(sequential, _images()),
    "residual, one relu": Network(residual, _images()),
    "dense": Network(Dense, _images()),
    "inverted residual": Network(inverted_residual, _images()),
    "u-net": Network(UNet, _images()),
    "transformer": Network(Transformer, lambda: torch.randint(11, (6, 7))),
    "shared norm": Network(SharedNorm, _images()),
    "containers": Network(Containers, _images()),
    "subclassed": Network(subclassed, _images()),
    "synchronised": Network(synchronised, _images()),
    "lazy": Network(lazy, _images()),
    "half": Network(half, _images(torch.float16)),
    "double": Network(double, _images(torch.float64)),
    "channels last": Network(channels_last, lambda: torch.randn(6, 1, 8, 8).to(memory_format=torch.channels_last)),
    "frozen": Network(frozen, _images()),
    "volume": Network(volume, lambda: torch.randn(6, 1, 4, 4, 4)),
    "signal": Network(signal, lambda: torch.randn(6, 1, 24)),
    "tied": Network(tied, _images()),
    "branching": Network(Branching, _images()),
}
