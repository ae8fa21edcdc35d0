"""Weight parametrisations: a weight that is a function of what the optimizer moves.

Built on torch's `parametrize`, not on layers of our own: layers keep their class, deep copies and state_dict work, and
the export traces the function like any other, so that the weight it computes is baked in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lowprec.errors import UnsupportedError
from lowprec.weights import (
    bounded_weight,
    gained_weight,
    initial_bound,
    initial_gain,
    output_rows,
    standardised_weight,
)


class WeightNorm(nn.Module, ABC):
    """The base of the parametrisations w_i = size_i * v_i / ||v_i|| per output channel.

    Args:
        groups: groups of a transposed convolution.
        transposed: whether axis 0 of the weight counts inputs.
        p: the norm: 1, 2 or inf; see `weights.row_norms`.
        k: with p = inf, for the top-k norm.
    """

    owner: str = ""  # the method that put it there, so that its hooks act on its own weights

    def __init__(self, groups: int = 1, transposed: bool = False, *, p: float = 2.0, k: int | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.transposed = transposed
        self.p = p
        self.k = k

    @abstractmethod
    def radius(self) -> Tensor:
        """The row norm of v on its sphere, 0-d: at it v is as large as w on average."""

    def project(self, v: Tensor) -> Tensor:
        """v with every row brought to `radius`; w does not change."""
        return bounded_weight(v, self.radius(), self.groups, self.transposed, p=self.p, k=self.k)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight is its own v: only its direction counts."""
        return weight

    def extra_repr(self) -> str:
        """The norm."""
        return f"p={self.p}" if self.k is None else f"top-{self.k}"


class BoundedWeightNorm(WeightNorm):
    """w_i = rho * v_i / ||v_i|| per output channel, with one fixed rho per layer; see `weights.bounded_weight`.

    Unlike weight norm there is no learned gain: the scale of a layer is fixed, so a norm that would only undo it is not
    needed, and neither is weight decay. rho is a buffer in float32 or wider and travels in the state_dict.

    Args:
        rho: 0-d, the norm of every row.
        groups: see `WeightNorm`, as are the others.
    """

    wide_parameters = ("rho",)
    rho: Tensor

    def __init__(
        self, rho: Tensor, groups: int = 1, transposed: bool = False, *, p: float = 2.0, k: int | None = None
    ) -> None:
        super().__init__(groups, transposed, p=p, k=k)
        self.register_buffer("rho", rho)

    def forward(self, v: Tensor) -> Tensor:
        """The bounded weight of v."""
        return bounded_weight(v, self.rho, self.groups, self.transposed, p=self.p, k=self.k)

    def radius(self) -> Tensor:
        """rho, so that on the sphere v is w."""
        return self.rho


class GainedWeightNorm(WeightNorm):
    """w_i = v_i / ||v_i|| * gain_i * bound / ||gain||, with a learned gain per channel; see `weights.gained_weight`.

    What is bounded is the layer, sum_i ||w_i||^2 = bound^2, and channels may trade. The authors' published code trains
    this form; the paper and `BoundedWeightNorm` give all rows one norm. `gain` is a new parameter, wide in half modes.

    Args:
        gain: (C_out,), the row norms to start from.
        groups: see `WeightNorm`, as are the others.
    """

    wide_parameters = ("gain", "bound")
    bound: Tensor

    def __init__(
        self, gain: Tensor, groups: int = 1, transposed: bool = False, *, p: float = 2.0, k: int | None = None
    ) -> None:
        super().__init__(groups, transposed, p=p, k=k)
        self.gain = nn.Parameter(gain)
        self.register_buffer("bound", torch.linalg.vector_norm(gain.detach()))

    def forward(self, v: Tensor) -> Tensor:
        """The weight of v and the gain."""
        return gained_weight(v, self.gain, self.bound, self.groups, self.transposed, p=self.p, k=self.k)

    def radius(self) -> Tensor:
        """The root mean square of the row norms of w."""
        return self.bound / math.sqrt(self.gain.numel())


class ScaledStandardisation(nn.Module):
    """w_o = constant * gain_o * standardised v_o per output channel; see `weights.standardised_weight`.

    `gain` is a new parameter (O,), in float32 or wider also where the weight is half. `constant` belongs to the place
    of the layer in its network: a buffer, so that it travels with the weights that were trained with it.

    Args:
        gain: (O,), what to start from.
        constant: the factor of the layer.
        eps: least fan-in times variance.
    """

    wide_parameters = ("gain", "constant")
    constant: Tensor

    def __init__(self, gain: Tensor, constant: float, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)
        self.register_buffer("constant", torch.tensor(constant, dtype=gain.dtype, device=gain.device))
        self.eps = eps

    def forward(self, v: Tensor) -> Tensor:
        """The standardised weight of v."""
        return standardised_weight(v, self.gain, self.constant, self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight is its own v: what standardising takes off is the gain's."""
        return weight

    def extra_repr(self) -> str:
        """The constants."""
        return f"constant={float(self.constant):.4g}, eps={self.eps:g}"


def register_on_weight(module: nn.Module, made: nn.Module) -> None:
    """Parametrises the weight of a layer by `made`; the parameter object stays, and so does the training flag."""
    parametrize.register_parametrization(module, "weight", made)
    assert isinstance(module.parametrizations, nn.ModuleDict)
    module.parametrizations.train(module.training)  # torch registers them in training mode


def weight_layout(module: nn.Module) -> tuple[int, bool]:
    """`(groups, transposed)` as the functions of `lowprec.weights` take them."""
    if isinstance(module, _ConvTransposeNd):
        return module.groups, True
    return 1, False


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a layer that are weights with a row per output channel; none for a layer without such."""
    if isinstance(module, (nn.Linear, _ConvNd, nn.Embedding)):
        return ("weight",)
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(module, nn.MultiheadAttention):
        # out_proj is a linear layer of its own. With keys and values of other widths there are three matrices.
        packed = module.in_proj_weight is not None
        return ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()


def why_not_bounded(module: nn.Module, name: str = "weight") -> str | None:
    """Why `register_bounded_weight_norm` would refuse the weight `name` of `module`; None when it would not."""
    if name not in weight_names(module):
        known = ", ".join(weight_names(module))
        return f"{type(module).__name__} has no weight {name!r} with a row per output{known and f'; it has {known}'}"
    if parametrize.is_parametrized(module, name):
        return f"its {name} is parametrised already"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "its gradients are sparse, and a norm needs whole rows; make it with sparse=False"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it rescales its weight in forward; make it with max_norm=None"
    weight: Any = getattr(module, name)
    if isinstance(weight, nn.UninitializedParameter):
        return f"it is lazy and has no {name} yet; run one batch through the model first"
    if not isinstance(weight, nn.Parameter):
        return f"its {name} is computed by something else (a pruning mask, an older weight norm); undo that first"
    if weight.is_meta:
        return f"its {name} is on the meta device and has no norm to keep; load it first"
    if not bool(torch.isfinite(weight).all()):
        return f"its {name} holds values that are not finite"
    if not bool(weight.any()):
        return f"its {name} is all zeros, so there is no norm to keep"
    return None


def register_bounded_weight_norm(
    module: nn.Module, name: str = "weight", *, p: float = 2.0, k: int | None = None, learned: bool = False
) -> WeightNorm:
    """Parametrises one weight of a layer in place and returns the parametrisation.

    To be called after the weight has its own initialisation: the bound is read from it here, once; setting the weight
    later changes directions only. The parameter object stays, as `module.parametrizations.<name>.original`.

    Args:
        module: Linear, Conv*, ConvTranspose*, Embedding, RNN, LSTM, GRU, their cells, or MultiheadAttention.
        name: one of `weight_names(module)`.
        p: the norm: 1, 2 or inf; see `weights.row_norms`.
        k: with p = inf, for the top-k norm.
        learned: one learned gain per channel (`GainedWeightNorm`) instead of one fixed norm per layer.

    Raises:
        UnsupportedError: the layer has no usable weight of this name; see `why_not_bounded`.
    """
    reason = why_not_bounded(module, name)
    if reason is not None:
        raise UnsupportedError(f"weight norm was asked for a {type(module).__name__}, but {reason}")
    groups, transposed = weight_layout(module)
    weight: Tensor = getattr(module, name).detach()
    if learned:
        gain = initial_gain(weight, groups, transposed, p=p, k=k)
        made: WeightNorm = GainedWeightNorm(gain, groups, transposed, p=p, k=k)
    else:
        rho = initial_bound(weight, groups, transposed, p=p, k=k)
        made = BoundedWeightNorm(rho, groups, transposed, p=p, k=k)
    parametrize.register_parametrization(module, name, made)
    assert isinstance(module.parametrizations, nn.ModuleDict)
    module.parametrizations.train(module.training)  # torch registers them in training mode
    if isinstance(module, nn.RNNBase):
        _read_weights_at_use(module)
    return made


def zero_rows(module: nn.Module, name: str = "weight") -> int:
    """How many output channels have only zeros in the weight `name`."""
    weight: Tensor = getattr(module, name)
    rows, axes = output_rows(weight.detach(), *weight_layout(module))
    return int((rows.abs().amax(axes) == 0).sum())


def _read_weights_at_use(module: nn.RNNBase) -> None:
    """Makes a recurrent layer with parametrised weights compute them whenever it uses its list of weights.

    Torch's recurrent layers keep the list from one forward to the next. With parametrised weights it would hold the
    results of the last forward, non-leaf tensors that make a deep copy fail and that a tracer takes for state. The
    property goes on the class that `parametrize` made for this one module; the list in the instance, of the parameter
    objects, is used again once the parametrisations are removed.
    """

    def flat_weights(layer: nn.RNNBase) -> list[Any]:
        return [getattr(layer, name, None) for name in layer._flat_weights_names]

    def nothing(layer: nn.RNNBase, *_: Any) -> None:
        """Nothing is kept, so there is nothing to refresh."""

    own: Any = type(module)
    own._flat_weights = property(flat_weights, nothing)
    own._update_flat_weights = nothing
    own.flatten_parameters = nothing
