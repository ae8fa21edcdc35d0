"""The smallest networks, made for the embedded 8x8 digits: for the demo, the tests and first experiments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lowprec.models.parts import Act, Norm, Parts, parts_of


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms, a shortcut, the activation after the sum: the basic block of ResNet.

    Args:
        inputs: input channels.
        outputs: output channels; unlike `inputs`, the shortcut is a 1x1 convolution.
        stride: of the first convolution.
        parts: norms and activations.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, parts: Parts) -> None:
        super().__init__()
        self.conv1, self.norm1 = parts.conv_norm(inputs, outputs, 3, stride)
        self.conv2, self.norm2 = parts.conv_norm(outputs, outputs)
        self.act = parts.act()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*parts.conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """act(branch(x) + shortcut(x))."""
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        result: Tensor = self.act(y + self.shortcut(x))
        return result


class SmallResNet(nn.Module):
    """A residual network for images of about 8x8: stem, blocks (the second halves the size), pooling, classifier."""

    def __init__(self, parts: Parts, width: int, blocks: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem, self.norm = parts.conv_norm(in_channels, width)
        self.act = parts.act()
        widths = [width if index == 0 else 2 * width for index in range(blocks)]
        previous = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, 2 if before != after else 1, parts)
                for before, after in zip(previous, widths, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1] if widths else width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        y = self.blocks(self.act(self.norm(self.stem(x))))
        logits: Tensor = self.classifier(self.pool(y).flatten(1))
        return logits


def small_resnet(
    norm: Norm = nn.BatchNorm2d,
    width: int = 16,
    blocks: int = 3,
    classes: int = 10,
    in_channels: int = 1,
    act: Act = nn.ReLU,
) -> nn.Module:
    """A small residual network; with the defaults 38 thousand parameters. First weights as torch draws them.

    Args:
        norm: see `parts.Options`.
        width: channels of the stem and the first block; later blocks have twice as many.
        blocks: residual blocks.
        classes: outputs.
        in_channels: channels of the images.
        act: see `parts.Options`.

    Raises:
        ConfigError: a name that there is not.
    """
    return SmallResNet(parts_of(norm, act), width, blocks, classes, in_channels)


def mlp(
    inputs: int = 64,
    hidden: Sequence[int] = (64, 64),
    classes: int = 10,
    norm: Norm = nn.BatchNorm1d,
    act: Act = nn.ReLU,
) -> nn.Module:
    """A multilayer perceptron that flattens its input: linear, norm, activation per hidden layer, then a classifier.

    Args:
        inputs: elements of one flattened sample.
        hidden: widths of the hidden layers.
        classes: outputs.
        norm: see `parts.Options`; called with the number of features.
        act: see `parts.Options`.

    Raises:
        ConfigError: a name that there is not.
    """
    parts = parts_of(norm, act, dimensions=1)
    layers: list[nn.Module] = [nn.Flatten()]
    width = inputs
    for features in hidden:
        layers += [nn.Linear(width, features, bias=parts.bias), parts.norm(features), parts.act()]
        width = features
    return nn.Sequential(*layers, nn.Linear(width, classes))
