"""What the rest of the library asks a layer: is it a norm, and which affine is it at inference.

Asked of the type, not of a list of names: a layer that is a per-channel affine says so in a method `inference_affine`,
and one fold rule serves all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lowprec.affine import ChannelAffine
from lowprec.norm.base import ScaleBatchNorm
from lowprec.norm.filter_response import FilterResponseNorm

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: one whose parameters and buffers stay float32 in the half modes."""
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, ScaleBatchNorm, FilterResponseNorm)
    return isinstance(module, known)


def inference_affine(module: nn.Module) -> ChannelAffine | None:
    """The per-channel affine that `module` computes in its present state, in float64.

    Torch's batch norms (scale = weight / sqrt(running_var + eps)) when their forward is torch's own, and any module
    with a method `inference_affine`. None for everything else: in training mode, without running statistics, or when a
    subclass or a patch replaced the forward.
    """
    own = getattr(module, "inference_affine", None)
    if callable(own):
        affine: ChannelAffine | None = own()
        return affine
    if not isinstance(module, _BatchNorm) or type(module).forward not in _TORCH_FORWARDS:
        return None
    if module.training or "forward" in vars(module):
        return None
    mean, variance = _float64(module.running_mean, None), _float64(module.running_var, None)
    if mean is None or variance is None:
        return None
    gamma, beta = _float64(module.weight, 1.0), _float64(module.bias, 0.0)
    return ChannelAffine.from_statistics(mean, np.sqrt(variance + module.eps), gamma, beta)


def _float64(value: Tensor | None, default: float | None) -> Any:
    """A tensor as float64 numpy; `default` when there is none, or none yet in a lazy module."""
    if value is None or isinstance(value, (nn.UninitializedBuffer, nn.UninitializedParameter)):
        return default
    return value.detach().double().cpu().numpy()
