"""Weight parametrisations: a weight that is a function of what the optimizer moves.

Built on torch's `parametrize`, not on a layer of our own: layers keep their class, deep copies and state_dict work, and
the export traces the function like any other, so that the weight it computes is baked in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lowprec.errors import UnsupportedError
from lowprec.functional import bounded_weight, initial_bound, output_rows


class BoundedWeightNorm(nn.Module):
    """w_i = rho * v_i / ||v_i||_2 per output channel, with one fixed rho per layer; see `functional.bounded_weight`.

    Unlike weight norm there is no learned gain: the scale of a layer is fixed, so a norm that would only undo it is not
    needed, and neither is weight decay. rho is a buffer in float32 or wider and travels in the state_dict.

    Args:
        rho: 0-d, the norm of every row.
        groups: groups of a transposed convolution.
        transposed: whether axis 0 of the weight counts inputs.
    """

    wide_parameters = ("rho",)
    rho: Tensor

    def __init__(self, rho: Tensor, groups: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.groups = groups
        self.transposed = transposed
        self.register_buffer("rho", rho)

    def forward(self, v: Tensor) -> Tensor:
        """The bounded weight of v."""
        return bounded_weight(v, self.rho, self.groups, self.transposed)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight is its own v: only its direction counts."""
        return weight


def weight_layout(module: nn.Module) -> tuple[int, bool]:
    """`(groups, transposed)` as the functions of `lowprec.functional` on weights take them."""
    if isinstance(module, _ConvTransposeNd):
        return module.groups, True
    return 1, False


def why_not_bounded(module: nn.Module) -> str | None:
    """Why `register_bounded_weight_norm` would refuse `module`; None when it would not."""
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return f"{type(module).__name__} is neither a linear nor a convolution layer"
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrised already"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "it is lazy and has no weight yet; run one batch through the model first"
    if not bool(torch.isfinite(module.weight).all()):
        return "its weight holds values that are not finite"
    if not bool(module.weight.any()):
        return "its weight is all zeros, so there is no norm to keep"
    return None


def register_bounded_weight_norm(module: nn.Module) -> Tensor:
    """Parametrises `module.weight` in place by `BoundedWeightNorm` and returns rho = ||V||_F / sqrt(C_out).

    To be called after the weight has its own initialisation: rho is read from it here, once; setting the weight later
    changes directions only. The parameter object stays, as `module.parametrizations.weight.original`.

    Raises:
        UnsupportedError: the layer has no usable weight; see `why_not_bounded`.
    """
    reason = why_not_bounded(module)
    if reason is not None:
        raise UnsupportedError(f"bounded weight norm was asked for a {type(module).__name__}, but {reason}")
    groups, transposed = weight_layout(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    rho = initial_bound(weight.detach(), groups, transposed)
    parametrize.register_parametrization(module, "weight", BoundedWeightNorm(rho, groups, transposed))
    assert isinstance(module.parametrizations, nn.ModuleDict)
    module.parametrizations.train(module.training)  # torch registers them in training mode
    return rho


def zero_rows(module: nn.Module) -> int:
    """How many output channels of a linear or conv layer have only zeros in `weight`."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, axes = output_rows(weight.detach(), *weight_layout(module))
    return int((rows.abs().amax(axes) == 0).sum())
