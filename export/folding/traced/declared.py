"""Layers that say themselves which per-channel affine they are at inference.

The rules read what a layer computes, which covers everything made of plain arithmetic. A layer that computes its affine
in another way (a custom operator, a call the rules don't know) folds by its word: a method `inference_affine`. Its word
is used for the program that is folded only; the truth still runs the layer, and the float64 check compares the two.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowprec.affine import ChannelAffine
from lowprec.norm import inference_affine, is_norm


class StatedAffine(nn.Module):
    """y = scale * x + shift per channel on axis 1, in the type of x."""

    scale: Tensor
    shift: Tensor

    def __init__(self, affine: ChannelAffine) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(affine.scale.copy()))
        self.register_buffer("shift", torch.from_numpy(affine.shift.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """The affine; constants are float64 in the lifted program, whatever they are cast to here."""
        axes = (1, -1, *[1] * (x.dim() - 2))
        return x * self.scale.to(x.dtype).view(axes) + self.shift.to(x.dtype).view(axes)


def declared_affines(network: nn.Module) -> dict[str, ChannelAffine]:
    """By path, the layers below the root that declare an affine and that the rules would not know as norms."""
    found = {}
    for path, module in network.named_modules():
        if path and not is_norm(module) and not module._forward_hooks and not module._forward_pre_hooks:
            affine = inference_affine(module)
            if affine is not None:
                found[path] = affine
    return found


def with_affines(network: nn.Module, affines: Mapping[str, ChannelAffine]) -> nn.Module:
    """A copy of the network in which the layers at these paths are the affines that they declare."""
    copied = copy.deepcopy(network)
    shared: dict[nn.Module, StatedAffine] = {}
    for path, affine in affines.items():
        parent, _, name = path.rpartition(".")
        layer = copied.get_submodule(path)
        if layer not in shared:
            shared[layer] = StatedAffine(affine)
        setattr(copied.get_submodule(parent), name, shared[layer].eval())
    return copied
