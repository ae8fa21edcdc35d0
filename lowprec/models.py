"""Small networks for the demo, the tests and first experiments: usable from a config, traceable by fx and torch.export.

Ordinary torch modules with ordinary layers; they know nothing of this library, so what works on them works on a user's.
The one convenience is that `norm` may be a name in `lowprec.norm.NORMS`, because a TOML file cannot hold a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.norm import NORMS

NormFactory = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms, a shortcut, ReLU after the sum: the basic block of ResNet.

    Args:
        inputs: input channels.
        outputs: output channels; unlike `inputs`, the shortcut is a 1x1 convolution.
        stride: of the first convolution.
        norm: makes a norm for a number of channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """relu(branch(x) + shortcut(x))."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        result: Tensor = self.relu(y + self.shortcut(x))
        return result


class SmallResNet(nn.Module):
    """A residual network for images of about 8x8: stem, blocks (the second halves the size), pooling, classifier."""

    def __init__(self, norm: NormFactory, width: int, blocks: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = norm(width)
        self.relu = nn.ReLU()
        widths = [width if index == 0 else 2 * width for index in range(blocks)]
        previous = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, 2 if before != after else 1, norm)
                for before, after in zip(previous, widths, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1] if widths else width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        y = self.blocks(self.relu(self.norm(self.stem(x))))
        logits: Tensor = self.classifier(self.pool(y).flatten(1))
        return logits


def small_resnet(
    norm: str | NormFactory = nn.BatchNorm2d,
    width: int = 16,
    blocks: int = 3,
    classes: int = 10,
    in_channels: int = 1,
) -> nn.Module:
    """A small residual network; with the defaults 38 thousand parameters, made for the 8x8 digits.

    Args:
        norm: a norm class (called with the number of channels) or a name in `NORMS`.
        width: channels of the stem and the first block; later blocks have twice as many.
        blocks: residual blocks.
        classes: outputs.
        in_channels: channels of the images.

    Raises:
        ConfigError: `norm` is a name that is not in `NORMS`.
    """
    return SmallResNet(_norm_factory(norm, 2), width, blocks, classes, in_channels)


def mlp(
    inputs: int = 64,
    hidden: Sequence[int] = (64, 64),
    classes: int = 10,
    norm: str | NormFactory = nn.BatchNorm1d,
) -> nn.Module:
    """A multilayer perceptron that flattens its input: linear, norm, ReLU per hidden layer, then a linear classifier.

    Args:
        inputs: elements of one flattened sample.
        hidden: widths of the hidden layers.
        classes: outputs.
        norm: a norm class (called with the number of features) or a name in `NORMS`.

    Raises:
        ConfigError: `norm` is a name that is not in `NORMS`.
    """
    make = _norm_factory(norm, 1)
    layers: list[nn.Module] = [nn.Flatten()]
    width = inputs
    for features in hidden:
        layers += [nn.Linear(width, features, bias=False), make(features), nn.ReLU()]
        width = features
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _norm_factory(norm: str | NormFactory, dimensions: int) -> NormFactory:
    if not isinstance(norm, str):
        return norm
    if norm not in NORMS:
        nearest = get_close_matches(norm, NORMS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"no norm is called {norm!r}; choose one of {', '.join(NORMS)}{hint}")
    return NORMS[norm].classes[dimensions]
