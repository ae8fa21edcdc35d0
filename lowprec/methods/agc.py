"""The method `agc`: adaptive gradient clipping, a limit for every output channel in proportion to its weights.

    G_i <- G_i * min(1, clip * max(||W_i||, eps) / ||G_i||)

i runs over the outputs of a weight, whose norm takes all other axes; a bias, a gain or another vector is one i. The
gradients are the unscaled average of the step. The last layer is left out, as in the paper.

Source: Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization, arXiv
2102.06171, and its code (which tensors have one norm; its floor of 1e-6 on ||G_i|| is below every limit and left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.functional import accumulation_dtype
from lowprec.methods.channel_norms import channel_norms, scale_channels
from lowprec.methods.method import Handle
from lowprec.methods.stepping import modules_skipped
from lowprec.precision.masters import master_of
from lowprec.precision.transforms import transforms_of


def attach_agc(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float = 0.01,
    eps: float = 1e-3,
    skip: Sequence[str] | None = None,
) -> Handle:
    """Clips gradients per output channel before every step.

    Under `Precision` before `clip_norm`; in any other loop when the optimizer is called. A tensor that starts at zero
    moves by at most lr * clip * eps at first.

    Args:
        model: the network.
        optimizer: any; parameters of the network that it does not hold are left alone.
        clip: largest ||G_i|| / ||W_i||. 0.01 is for batches of 4096; small batches bear more.
        eps: what a smaller ||W_i|| counts as.
        skip: paths of modules to leave alone; the last conv or linear layer if None.

    Raises:
        ConfigError: a constant out of range, an unknown path, or the optimizer holds none of the weights.
        UnsupportedError: no parameter is left.
    """
    if not 0 < clip < float("inf") or not 0 < eps < float("inf"):
        raise ConfigError(f"agc: clip={clip}, eps={eps}; give two numbers above 0")
    skipped = {param for module in modules_skipped(model, skip) for param in module.parameters()}
    params = [param for param in model.parameters() if param not in skipped]
    if not params:
        raise UnsupportedError("attach('agc') found no parameter to act on; see its option skip")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not any(id(param) in held or id(master_of(param)) in held for param in params):
        raise ConfigError(
            f"attach('agc'): the optimizer holds none of the {len(params)} parameters to act on; "
            "make it from the parameters of this model"
        )
    clipper = _Clipper(optimizer, params, _transposed_weights(model), clip, eps)
    return Handle(transforms_of(optimizer).add(optimizer, clipper))


def _transposed_weights(model: nn.Module) -> dict[Tensor, int]:
    """Groups of each weight whose axis 0 counts inputs."""
    found: dict[Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, _ConvTransposeNd):
            parametrized = parametrize.is_parametrized(module, "weight")
            weight: Any = module.parametrizations.weight.original if parametrized else module.weight  # type: ignore[union-attr]
            found[weight] = module.groups
    return found


def _unit_norms(tensor: Tensor, layout: tuple[int, bool]) -> Tensor:
    """Per output channel (C,), or one of a vector, 0-d; float32 or wider."""
    if tensor.dim() > 1:
        return channel_norms(tensor, *layout)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor.dtype))
    return norm


class _Clipper:
    """A `GradientTransform` without state."""

    waits = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[Tensor],
        transposed: dict[Tensor, int],
        clip: float,
        eps: float,
    ) -> None:
        self._optimizer, self._params, self._transposed = optimizer, params, transposed
        self._clip, self._eps = clip, eps

    def apply(self) -> None:
        """Everything that the optimizer moves and is not skipped."""
        # torch's GradScaler leaves unscaling to a fused optimizer, and says by what it will divide.
        scale = getattr(self._optimizer, "grad_scale", None)
        clip: float | Tensor = self._clip if scale is None else self._clip * scale
        held = {id(param) for group in self._optimizer.param_groups for param in group["params"]}
        for param in self._params:
            # Looked up at every step: Precision.prepare may make the masters after this was attached.
            moved, groups = master_of(param), self._transposed.get(param)
            if moved.grad is None or id(moved) not in held:
                continue
            layout = (1, False) if groups is None else (groups, True)
            limit_C = _unit_norms(moved, layout).clamp_min(self._eps) * clip
            factor_C = (limit_C / _unit_norms(moved.grad, layout)).clamp_max(1)
            scaled = scale_channels(moved.grad, factor_C, *layout) if moved.dim() > 1 else moved.grad * factor_C
            moved.grad.copy_(scaled)

    def discard(self) -> None:
        """Nothing is kept."""
