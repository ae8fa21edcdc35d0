"""What the networks are made of: norms and activations by name, convolutions before norms, first weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypedDict

from torch import Tensor, nn

from lowprec.errors import ConfigError
from lowprec.norm import NORMS

NormFactory = Callable[[int], nn.Module]
ActFactory = Callable[[], nn.Module]
Norm = str | NormFactory | None
Act = str | ActFactory

NO_NORM = "none"
_BATCH_NORMS: dict[int, NormFactory] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
_ACTS: dict[str, ActFactory] = {
    kind.__name__.lower(): kind
    for kind in (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
        nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity,
    )
}  # fmt: skip


class Options(TypedDict, total=False):
    """What every convolutional network takes.

    norm: called with the number of channels, or a name: `batch` for torch's, one of `NORMS`, or `none`, as None is:
        then the layers that a norm would follow have biases.
    act: called without arguments, or the name of a class of torch.nn in lower case, such as `relu`, `silu`, `gelu`.
    classes: outputs.
    in_channels: channels of the images.
    width: factor on the number of channels of every layer.
    """

    norm: Norm
    act: Act
    classes: int
    in_channels: int
    width: float


class SizedOptions(Options, total=False):
    """Those of the networks made for 224 pixels, which have a form for small images.

    small: the form for images of 8 to 64 pixels that is usual for CIFAR; each network says what it leaves out.
    """

    small: bool


@dataclass(frozen=True)
class Parts:
    """What a network is made of.

    Args:
        norm: makes a norm for a number of channels; Identity where there is to be none.
        act: makes an activation.
        bias: whether layers before a norm have a bias, which they need if there is none.
    """

    norm: NormFactory
    act: ActFactory
    bias: bool

    def conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """A convolution before a norm, padded so that with stride 1 the image keeps its size."""
        return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=self.bias)

    def conv_norm(self, *args: int, **kwargs: int) -> list[nn.Module]:
        """`conv` and its norm."""
        conv = self.conv(*args, **kwargs)
        return [conv, self.norm(conv.out_channels)]

    def conv_norm_act(self, *args: int, **kwargs: int) -> list[nn.Module]:
        """`conv`, its norm and an activation."""
        return [*self.conv_norm(*args, **kwargs), self.act()]


class Network(nn.Sequential):
    """Layers by name, called one after the other with `x`, as torchvision's networks are."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits


def parts_of(norm: Norm, act: Act, dimensions: int = 2) -> Parts:
    """Norms over images of so many `dimensions` (1 for features) and activations, each given as such or by name.

    Raises:
        ConfigError: a name that there is not.
    """
    norms = {"batch": _BATCH_NORMS[dimensions]} | {name: family.classes[dimensions] for name, family in NORMS.items()}
    found = norm_factory(norm, norms)
    return Parts(found or no_norm, act_factory(act), bias=found is None)


def norm_factory(norm: Norm, named: Mapping[str, NormFactory]) -> NormFactory | None:
    """What makes norms, None for no norm. Raises `ConfigError` for a name that is neither in `named` nor `none`."""
    return _chosen("norm", norm, {**named, NO_NORM: None}) if isinstance(norm, str) else norm


def act_factory(act: Act) -> ActFactory:
    """What makes activations. Raises `ConfigError` for a name that there is not."""
    return _chosen("activation", act, _ACTS) if isinstance(act, str) else act


def no_norm(channels: int) -> nn.Module:
    """An Identity in the place of a norm."""
    return nn.Identity()


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least one."""
    return max(1, round(channels * width))


def initialise_(model: nn.Module, linear_deviation: float | None = None) -> nn.Module:
    """Draws first weights as torchvision does and returns the model.

    Convolutions from N(0, 2 / fan_out), which keeps the size of gradients through ReLUs, their biases zero; linear
    layers from N(0, linear_deviation^2), biases zero, or as torch has them where none is given.

    Source: He, Zhang, Ren, Sun, Delving Deep into Rectifiers, ICCV 2015, eq. 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_deviation is not None:
            nn.init.normal_(module.weight, 0, linear_deviation)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _chosen(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        nearest = get_close_matches(name, table, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"no {kind} is called {name!r}; choose one of {', '.join(table)}{hint}")
    return table[name]
