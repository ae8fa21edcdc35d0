"""Networks with ReLUs after norms: those whose structure lets a norm compute them, and those that forbid it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """As torchvision has it: one in-place ReLU for both places, the sum written with +=."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision has it: one in-place ReLU for three places."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 2
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(block(8, 8, 1), block(8, 8, 1))
        self.layer2 = nn.Sequential(block(8, 12, 2), block(12, 12, 1))
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layer2(self.layer1(x)), 1), 1))


class PreActivation(nn.Module):
    """Norm and ReLU before each convolution; nothing after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(1, 6), nn.Linear(6, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(conv(6, 6) for _ in range(4))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in (0, 2):
            y = self.convs[index](self.relu(self.norms[index](x)))
            x = x + self.convs[index + 1](self.relu(self.norms[index + 1](y)))
        return self.head(x.mean((2, 3)))


class DenseLayer(nn.Module):
    """As torchvision has it: takes the list of all earlier features."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, 8, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 4)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(y)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = conv(1, 4), nn.BatchNorm2d(12), nn.Linear(12, 3)
        self.layers = nn.ModuleList([DenseLayer(4), DenseLayer(8)])

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(F.relu(self.norm(torch.cat(features, 1)), inplace=True).mean((2, 3)))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 6), (6, 6), (6, 8)):
        layers += [conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Untraceable(nn.Module):
    """Its own forward depends on data; its blocks can be read, and share no ReLU with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = conv(1, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.layer, self.head = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 12, 1)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        if float(x.detach().sum()) >= 0:
            x = self.layer(x)
        return self.head(x.mean((2, 3)))


class Checkpointed(nn.Module):
    """Checkpoints a block, and a branch whose sum is outside of the checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.block = conv(1, 6), BasicBlock(6, 6, 1)
        self.branch, self.relu, self.head = nn.Sequential(conv(6, 6), nn.BatchNorm2d(6)), nn.ReLU(), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        x = self.relu(checkpoint(self.branch, x, use_reentrant=self.reentrant) + x)
        return self.head(x.mean((2, 3)))


class Repeated(nn.Module):
    """One block three times, and a Sequential whose one ReLU has a second place after another layer."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.stem = nn.Sequential(conv(1, 6), nn.BatchNorm2d(6), relu, conv(6, 6), nn.Identity(), relu)
        self.block, self.head = BasicBlock(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean((2, 3)))


class TwoBranches(nn.Module):
    """The other branch is written in place while the first one's norm waits; an Identity stands where a drop may be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.drop = conv(1, 6), conv(1, 6), nn.BatchNorm2d(6), nn.Identity()
        self.relu, self.head = nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        z = F.relu(self.b(x), inplace=True)
        return self.head(self.relu(self.drop(self.drop(y) + z)).mean((2, 3)))


# name: (what makes it, norms, of them with a ReLU alone, with an addition and a ReLU)
FUSABLE = {
    "basic blocks": (lambda: ResNet(BasicBlock), 10, 5, 4),
    "bottlenecks": (lambda: ResNet(Bottleneck), 14, 9, 4),
    "pre-activation": (PreActivation, 4, 4, 0),
    "dense": (DenseNet, 5, 4, 0),
    "vgg": (vgg, 3, 3, 0),
    "repeated": (Repeated, 3, 2, 1),
    "two branches": (TwoBranches, 1, 0, 1),
    "untraceable": (Untraceable, 6, 2, 2),
    "checkpointed": (lambda: Checkpointed(False), 3, 1, 1),
    "checkpointed, reentrant": (lambda: Checkpointed(True), 3, 1, 1),
}


class Pair(nn.Module):
    """Two convolutions with norms, one ReLU; subclasses say how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = conv(3, 3), conv(3, 3), nn.ReLU()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.setup()

    def setup(self) -> None:
        """What a subclass has beside that."""


class Functional(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.b(torch.relu_(self.bn1(self.a(x))))) + x)


class TwoReaders(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        return self.relu(y) + y


class Returned(Pair):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn1(self.a(x))
        return self.relu(y), y


class SharedElsewhere(Pair):
    """bn1 could have its ReLU, but the same object follows a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.bn1(self.a(x)))))


class IntoTheOtherSide(Pair):
    """The sum is written into a tensor that is used again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        total = y
        total += self.bn1(self.b(x))
        return self.relu(total) + y


class CalledTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.b(self.relu(self.bn1(self.a(x)))))


class InTrainingOnly(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        return self.relu(y) if self.training else y


class Optional(Pair):
    def forward(self, x: Tensor, relu: bool = True) -> Tensor:
        y = self.bn1(self.a(x))
        return self.relu(y) if relu else y


class Overwritten(Pair):
    """What bn1 normalises is overwritten before the sum; in evaluation that is harmless."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = self.bn1(y)
        y.mul_(0)
        return self.relu(z + x)


class Subclass(Pair):
    def setup(self) -> None:
        class Leaky(nn.ReLU):
            def forward(self, input: Tensor) -> Tensor:
                return F.leaky_relu(input)

        self.relu = Leaky()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.a(x)))


class Scaled(Pair):
    """Not a plain sum; nothing that a report needs to speak of."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(torch.add(self.bn1(self.a(x)), x, alpha=2))


class Doubled(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.a(x))
        return self.relu(y + y)


class SharedWithUntraceable(Pair):
    """The block's ReLU is the one that an unreadable forward uses after a convolution."""

    def setup(self) -> None:
        self.block = BasicBlock(3, 3, 1)
        self.block.relu = self.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.relu(self.a(x)) if float(x.detach().sum()) < 1e9 else x)


class Indexed(Pair):
    """Calls the ReLU of a Sequential also by itself, after a convolution."""

    def setup(self) -> None:
        self.layers = nn.Sequential(self.bn1, self.relu)
        del self.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.b(self.layers(self.a(x))))


class SharedNormUnreadable(Pair):
    """An unreadable forward uses the norm of a block without its ReLU."""

    def setup(self) -> None:
        self.block = BasicBlock(3, 3, 1)
        self.bn1 = self.block.bn1

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.block(x) if float(x.detach().sum()) < 1e9 else x)


class Chain(Pair):
    """The first ReLU has to stay, so bn1 stays as it is, so the other ReLU has to stay too, and so does bn2."""

    def setup(self) -> None:
        self.other = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.relu(self.a(x))))
        return self.other(self.bn2(self.other(self.bn1(self.b(x)))))


class IdentityBetween(Pair):
    """The ReLU has two places in a Sequential, and an Identity stands between the norm and one of them."""

    def setup(self) -> None:
        self.layers = nn.Sequential(self.bn1, nn.Identity(), self.relu, self.b, self.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.a(x))


class HookedIdentity(Pair):
    def setup(self) -> None:
        self.drop = nn.Identity()
        self.drop.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.drop(self.bn1(self.a(x))))


# name: (what makes it, what the report says of its first norm)
REFUSED = {
    "function": (Functional, "written as a function in forward"),
    "two readers": (TwoReaders, "its output is used 2 times"),
    "returned": (Returned, "its output is used 2 times"),
    "shared relu": (SharedElsewhere, "one module that is also called elsewhere"),
    "sum into the other side": (IntoTheOtherSide, "written into its other side"),
    "norm called twice": (CalledTwice, "not the same in every call"),
    "in training only": (InTrainingOnly, "not the same in every call"),
    "optional": (Optional, "not the same in every call"),
    "overwritten": (Overwritten, "may be overwritten before the sum"),
    "subclass": (Subclass, "the Leaky after it is hooked, or not torch's own"),
    "scaled sum": (Scaled, "the sum after it is not of two tensors"),
    "doubled": (Doubled, "the sum after it is not of two tensors"),
    "indexed": (Indexed, "one module that is also called elsewhere"),
    "norm of the unreadable": (SharedNormUnreadable, "cannot trace SharedNormUnreadable"),
    "chain": (Chain, "one module that is also called elsewhere"),
    "identity between": (IdentityBetween, "one module that is also called elsewhere"),
    "hooked identity": (HookedIdentity, "starts at 1"),
    "shared with the unreadable": (SharedWithUntraceable, "shared with a part that torch.fx cannot trace"),
}
