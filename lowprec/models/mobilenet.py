"""MobileNetV2, in torchvision's form and with its module names.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen, MobileNetV2, CVPR 2018, table 2.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from lowprec.models.parts import Act, Network, Norm, Parts, initialise_, parts_of

# Expansion, channels, blocks, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1 without an activation; x is added where the shape stays.

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: of the depthwise convolution.
        expansion: channels in between as a multiple of `inputs`; 1 leaves the first convolution out.
        parts: norms and activations.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, parts: Parts) -> None:
        super().__init__()
        wide = inputs * expansion
        self.conv = nn.Sequential()
        if expansion != 1:
            self.conv.append(nn.Sequential(*parts.conv_norm_act(inputs, wide, 1)))
        self.conv.append(nn.Sequential(*parts.conv_norm_act(wide, wide, 3, stride, groups=wide)))
        self.conv.extend(parts.conv_norm(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block of images (N, inputs, H, W)."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def mobilenet_v2(
    norm: Norm = nn.BatchNorm2d,
    act: Act = nn.ReLU6,
    classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    small: bool = False,
    dropout: float = 0.2,
) -> nn.Module:
    """MobileNetV2, 3.5 million parameters; the first arguments as in `parts.Options`.

    Args:
        norm: see `parts.Options`.
        act: see `parts.Options`.
        classes: outputs.
        in_channels: channels of the images.
        width: factor on the channels, which are rounded to multiples of 8; the last layer's 1280 never shrink.
        small: no stride in the stem and in the stage of 24 channels.
        dropout: before the classifier.

    Raises:
        ConfigError: a name that there is not.
    """
    parts = parts_of(norm, act)
    channels, last = _multiple_of_8(32 * width), _multiple_of_8(1280 * max(1.0, width))
    features = nn.Sequential(nn.Sequential(*parts.conv_norm_act(in_channels, channels, 3, 1 if small else 2)))
    for expansion, base, blocks, first_stride in _STAGES:
        outputs = _multiple_of_8(base * width)
        for index in range(blocks):
            stride = first_stride if index == 0 and not (small and base == 24) else 1
            features.append(InvertedResidual(channels, outputs, stride, expansion, parts))
            channels = outputs
    features.append(nn.Sequential(*parts.conv_norm_act(channels, last, 1)))
    layers = OrderedDict[str, nn.Module](features=features, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    layers["classifier"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))
    return initialise_(Network(layers), linear_deviation=0.01)


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, the next one if that is less than 90 % of what was asked; the authors' rule."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
