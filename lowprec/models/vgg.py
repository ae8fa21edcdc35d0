"""VGG with norms, in torchvision's form and with its module names; `norm="none"` is the paper's network.

Source: Simonyan, Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from torch import nn

from lowprec.models.parts import Act, Network, Norm, Parts, SizedOptions, initialise_, parts_of, scaled

_CHANNELS = (64, 128, 256, 512, 512)


class VGGOptions(SizedOptions, total=False):
    """Those of the VGGs.

    pools: how many of the five stages a max-pool ends: 5 needs 32 pixels, 3 will do with 8.
    """

    pools: int


def _vgg(
    depths: Sequence[int],
    norm: Norm = nn.BatchNorm2d,
    act: Act = nn.ReLU,
    classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    small: bool = False,
    pools: int = 5,
) -> nn.Module:
    """So many 3x3 convolutions in each of five stages, a max-pool after each of the first `pools`, linear layers."""
    parts = parts_of(norm, act)
    normed = not parts.bias
    parts = replace(parts, bias=True)  # torchvision's convolutions have a bias before a norm, too
    features = nn.Sequential()
    channels = in_channels
    for index, depth in enumerate(depths):
        outputs = scaled(_CHANNELS[index], width)
        for _ in range(depth):
            conv, made, activation = parts.conv_norm_act(channels, outputs)
            # No Identity where there is no norm: the numbers of the layers are the keys of torchvision's checkpoints.
            features.extend([conv, made, activation] if normed else [conv, activation])
            channels = outputs
        if index < pools:
            features.append(nn.MaxPool2d(2, 2))
    pooled = 1 if small else 7
    classifier = nn.Linear(channels, classes) if small else _classifier(channels * 7 * 7, width, classes, parts)
    layers = OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(pooled), flatten=nn.Flatten())
    return initialise_(Network(layers | {"classifier": classifier}), linear_deviation=0.01)


def _classifier(inputs: int, width: float, classes: int, parts: Parts) -> nn.Module:
    hidden = scaled(4096, width)
    first, second = (nn.Linear(features, hidden) for features in (inputs, hidden))
    last = nn.Linear(hidden, classes)
    return nn.Sequential(first, parts.act(), nn.Dropout(), second, parts.act(), nn.Dropout(), last)


def vgg11(**options: Unpack[VGGOptions]) -> nn.Module:
    """VGG-11, 132.9 million parameters; see `VGGOptions`. Small: a global average and one linear layer."""
    return _vgg((1, 1, 2, 2, 2), **options)


def vgg13(**options: Unpack[VGGOptions]) -> nn.Module:
    """VGG-13, 133.1 million parameters; see `vgg11`."""
    return _vgg((2, 2, 2, 2, 2), **options)


def vgg16(**options: Unpack[VGGOptions]) -> nn.Module:
    """VGG-16, 138.4 million parameters; see `vgg11`."""
    return _vgg((2, 2, 3, 3, 3), **options)


def vgg19(**options: Unpack[VGGOptions]) -> nn.Module:
    """VGG-19, 143.7 million parameters; see `vgg11`."""
    return _vgg((2, 2, 4, 4, 4), **options)
