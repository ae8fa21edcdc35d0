"""ResNets: for 224 pixels, with torchvision's module names, and for CIFAR, with those names too.

Without norms the signal grows with every block, because nothing holds the branches down: a norm-free deep one is meant
for a method that draws weights for it, such as `bnp` with its own `init`.

Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.errors import ConfigError
from lowprec.models.parts import Act, Network, Norm, Options, Parts, SizedOptions, initialise_, parts_of, scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: act(branch(x) + shortcut(x)).

    Args:
        inputs: input channels.
        width: of the convolutions and, here, the output.
        stride: of the first convolution.
        parts: norms and activations.
        padded: whether a shortcut between two shapes is the paper's option A, else B, a 1x1 convolution and a norm.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, parts: Parts, padded: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = parts.conv_norm(inputs, width, 3, stride)
        self.conv2, self.bn2 = parts.conv_norm(width, width, 3)
        self.act = parts.act()
        self.downsample = _shortcut(inputs, width, stride, parts, padded)

    def forward(self, x: Tensor) -> Tensor:
        """The block of images (N, inputs, H, W)."""
        y = self.act(self.bn1(self.conv1(x)))
        result: Tensor = self.act(self.bn2(self.conv2(y)) + self.downsample(x))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride (as torchvision's; the paper has it in the first) and 1x1 convolutions, a shortcut.

    Args: as `BasicBlock`; the output is 4 times as wide as `width`.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, parts: Parts, padded: bool = False) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.bn1 = parts.conv_norm(inputs, width, 1)
        self.conv2, self.bn2 = parts.conv_norm(width, width, 3, stride)
        self.conv3, self.bn3 = parts.conv_norm(width, outputs, 1)
        self.act = parts.act()
        self.downsample = _shortcut(inputs, outputs, stride, parts, padded)

    def forward(self, x: Tensor) -> Tensor:
        """The block of images (N, inputs, H, W)."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        result: Tensor = self.act(self.bn3(self.conv3(y)) + self.downsample(x))
        return result


class PaddedShortcut(nn.Module):
    """Option A of the paper, without parameters: every `stride`-th pixel, zeros for the channels that x has not."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride, self.padding = stride, (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, outputs, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _shortcut(inputs: int, outputs: int, stride: int, parts: Parts, padded: bool) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if padded:
        return PaddedShortcut(inputs, outputs, stride)
    return nn.Sequential(*parts.conv_norm(inputs, outputs, 1, stride))


def _network(
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    width: int,
    parts: Parts,
    classes: int,
    in_channels: int,
    *,
    small: bool,
    padded: bool = False,
) -> nn.Module:
    """Stem, one stage per depth, each half as large and twice as wide as the one before, pooling and a classifier."""
    stem = (3, 1) if small else (7, 2)
    conv, norm = parts.conv_norm(in_channels, width, *stem)
    layers = OrderedDict(conv1=conv, bn1=norm, act=parts.act())
    if not small:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    channels = width
    for index, depth in enumerate(depths):
        stage = nn.Sequential()
        for number in range(depth):
            stride = 2 if index > 0 and number == 0 else 1
            stage.append(block(channels, width * 2**index, stride, parts, padded))
            channels = width * 2**index * block.expansion
        layers[f"layer{index + 1}"] = stage
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}
    return initialise_(Network(layers))


def _resnet(
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    norm: Norm = nn.BatchNorm2d,
    act: Act = nn.ReLU,
    classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    small: bool = False,
) -> nn.Module:
    return _network(block, depths, scaled(64, width), parts_of(norm, act), classes, in_channels, small=small)


def resnet18(**options: Unpack[SizedOptions]) -> nn.Module:
    """ResNet-18, 11.7 million parameters; see `parts.Options`. Small: a 3x3 stem without stride, no max-pool."""
    return _resnet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Unpack[SizedOptions]) -> nn.Module:
    """ResNet-34, 21.8 million parameters; see `resnet18`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Unpack[SizedOptions]) -> nn.Module:
    """ResNet-50, 25.6 million parameters; see `resnet18`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Unpack[SizedOptions]) -> nn.Module:
    """ResNet-101, 44.5 million parameters; see `resnet18`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), **options)


class CifarOptions(Options, total=False):
    """Those of the CIFAR ResNets.

    shortcut: where the shape changes, `B` for a 1x1 convolution and a norm, as in the networks for 224 pixels, or `A`
        for zero padding, the paper's choice for CIFAR.
    """

    shortcut: Literal["A", "B"]


def _cifar_resnet(
    blocks: int,
    norm: Norm = nn.BatchNorm2d,
    act: Act = nn.ReLU,
    classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    shortcut: str = "B",
) -> nn.Module:
    if shortcut not in ("A", "B"):
        raise ConfigError(f"no shortcut is called {shortcut!r}; choose A (zero padding) or B (a 1x1 convolution)")
    parts, channels, padded = parts_of(norm, act), scaled(16, width), shortcut == "A"
    return _network(BasicBlock, (blocks,) * 3, channels, parts, classes, in_channels, small=True, padded=padded)


def cifar_resnet20(**options: Unpack[CifarOptions]) -> nn.Module:
    """ResNet-20 for 32 pixels and less: 6 * 3 + 2 layers, 0.27 million parameters; see `CifarOptions`."""
    return _cifar_resnet(3, **options)


def cifar_resnet32(**options: Unpack[CifarOptions]) -> nn.Module:
    """ResNet-32, 0.46 million parameters; see `cifar_resnet20`."""
    return _cifar_resnet(5, **options)


def cifar_resnet44(**options: Unpack[CifarOptions]) -> nn.Module:
    """ResNet-44, 0.66 million parameters; see `cifar_resnet20`."""
    return _cifar_resnet(7, **options)


def cifar_resnet56(**options: Unpack[CifarOptions]) -> nn.Module:
    """ResNet-56, 0.85 million parameters; see `cifar_resnet20`."""
    return _cifar_resnet(9, **options)


def cifar_resnet110(**options: Unpack[CifarOptions]) -> nn.Module:
    """ResNet-110, 1.7 million parameters; see `cifar_resnet20`."""
    return _cifar_resnet(18, **options)
