"""ShuffleNetV2, in torchvision's form and with its module names.

Source: Ma, Zhang, Zheng, Sun, ShuffleNet V2, ECCV 2018, table 5.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lowprec.models.parts import Act, Network, Norm, Parts, parts_of

# Channels of the stem, the three stages and the last convolution, by width.
_CHANNELS: dict[float, tuple[int, ...]] = {
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}


class ShuffleUnit(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions on one half of the channels, then both halves' channels in turns.

    With stride 2 both halves are computed from all inputs.

    Args:
        inputs: input channels; `outputs` when the stride is 1.
        outputs: output channels, even.
        stride: of the depthwise convolutions.
        parts: norms and activations.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, parts: Parts) -> None:
        super().__init__()
        half = outputs // 2
        self.split = stride == 1
        self.branch1 = nn.Sequential()
        if not self.split:
            depthwise = parts.conv_norm(inputs, inputs, 3, stride, groups=inputs)
            self.branch1.extend([*depthwise, *parts.conv_norm_act(inputs, half, 1)])
        first = parts.conv_norm_act(half if self.split else inputs, half, 1)
        depthwise = parts.conv_norm(half, half, 3, stride, groups=half)
        self.branch2 = nn.Sequential(*first, *depthwise, *parts.conv_norm_act(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The unit of images (N, inputs, H, W)."""
        if self.split:
            left, right = x.chunk(2, 1)
        else:
            left, right = self.branch1(x), x
        y = torch.cat([left, self.branch2(right)], 1)
        y_NGCHW: Tensor = y.unflatten(1, (2, -1))  # type: ignore[no-untyped-call]
        return y_NGCHW.transpose(1, 2).flatten(1, 2)


def shufflenet_v2(
    norm: Norm = nn.BatchNorm2d,
    act: Act = nn.ReLU,
    classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    small: bool = False,
) -> nn.Module:
    """ShuffleNetV2, 2.3 million parameters; first weights as torch draws them, as in torchvision.

    Args:
        norm: see `parts.Options`.
        act: see `parts.Options`.
        classes: outputs.
        in_channels: channels of the images.
        width: 0.5, 1, 1.5 or 2 for the paper's networks, else a factor on the channels of the one of width 1, even.
        small: no stride in the stem, no max-pool.

    Raises:
        ConfigError: a name that there is not.
    """
    parts = parts_of(norm, act)
    plan = _CHANNELS.get(width) or tuple(max(2, 2 * round(channels * width / 2)) for channels in _CHANNELS[1.0])
    channels, *stages, last = plan
    layers = OrderedDict[str, nn.Module]()
    layers["conv1"] = nn.Sequential(*parts.conv_norm_act(in_channels, channels, 3, 1 if small else 2))
    if not small:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    for index, (outputs, units) in enumerate(zip(stages, (4, 8, 4), strict=True), 2):
        stage = nn.Sequential(ShuffleUnit(channels, outputs, 2, parts))
        stage.extend(ShuffleUnit(outputs, outputs, 1, parts) for _ in range(units - 1))
        layers[f"stage{index}"], channels = stage, outputs
    layers["conv5"] = nn.Sequential(*parts.conv_norm_act(channels, last, 1))
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(last, classes)}
    return Network(layers)
