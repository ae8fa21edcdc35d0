"""Filter response normalisation and its threshold: each map of each sample is divided by its own root mean square.

Per sample and channel, over the n elements of the map:

    r = sqrt(mean(x^2) + eps)    y = weight * x / r + bias    z = max(y, tau)

No mean is taken off and no other sample is looked at, so any batch size gives the same, in training and in evaluation.
A residual may be added before the threshold: z = max(y + residual, tau).

Backward, with g = dL/dy (0 where tau holds, at y = tau too, as ReLU has it) and h = x / r:

    dL/dx = weight / r * (g - h * mean(g h))    dL/dweight = sum(g h)    dL/dbias = sum(g)
    dL/dtau = the sum of dL/dz where tau holds  dL/deps = -sum(weight / (2 r^2) * sum(g h)), the inner sum over a map

Between forward and backward x is kept, as it came, and one number per map; with a residual also one byte per element.

Source: Singh, Krishnan, Filter Response Normalization Layer, CVPR 2020.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.functional import accumulation_dtype, cast, per_channel, reduced_axes
from lowprec.kernels import kernels_apply
from lowprec.norm.activation import PendingSum
from lowprec.norm.checks import InputValueError, check_input

# Where the learned part of eps starts: with maps of one element 1e-6 would leave nothing but their signs.
LEARNED_EPS = 1e-4


class FilterResponseNorm(nn.Module):
    """z = max(weight * x / sqrt(mean(x^2) + eps) + bias, tau), the mean over the map of one sample and channel.

    Squares, their mean, parameters and the result are computed in float32 or wider and the result is rounded to x's
    dtype. Squares are of the widened x: a half square is 0 below 1.7e-4 and infinite from 256 on. Fold: none, the
    divisor is computed from each sample. In half ONNX files it stays float32; from opset 23 on, and with a fixed eps,
    they hold an RMSNormalization, which is defined so.

    Args:
        num_features: channels C of inputs (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the mean of the squares.
        affine: whether there are `weight` (starts at 1) and `bias` (0), per channel.
        device: of the parameters.
        dtype: of the parameters.
        learn_eps: whether |learned_eps|, a parameter of shape (1,) that starts at 1e-4, is added to eps. What maps of
            one element need: x / sqrt(x^2 + 1e-6) is nearly the sign of x.
        threshold: whether there is `tau`, per channel, starting at 0; it takes the place of a ReLU.

    Raises:
        InputValueError: the input has another rank or number of channels, or maps of one element without a learned eps.
        InputTypeError: the input is not floating point.

    Source: Singh, Krishnan, Filter Response Normalization Layer, CVPR 2020.
    """

    input_ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    tau: nn.Parameter | None
    learned_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_eps: bool = False,
        threshold: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.awaits_residual = False

        def parameter(wanted: bool, length: int = num_features) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(length, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine))
        self.register_parameter("tau", parameter(threshold))
        self.register_parameter("learned_eps", parameter(learn_eps, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias and tau 0, learned_eps 1e-4."""
        for name, start in (("weight", 1.0), ("bias", 0.0), ("tau", 0.0), ("learned_eps", LEARNED_EPS)):
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, start)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | PendingSum:
        """Normalises x (N, C, ...); a residual is added before the threshold.

        A norm that awaits its residual returns a `PendingSum` without one, see `lowprec.norm.activation`.
        """
        check_input(x, self.input_ranks, self.num_features)
        if self.learned_eps is None:
            _check_extent(x)
        if self.awaits_residual and residual is None:
            return PendingSum(partial(self, x), type(self).__name__)
        eps: float | Tensor = self.eps
        if self.learned_eps is not None:
            eps = self.eps + cast(self.learned_eps, accumulation_dtype(x.dtype)).abs()
        # Readers of an exported graph know operations of torch, and transforms of gradients need them.
        plain = torch.compiler.is_exporting() or not kernels_apply(x) or not _alike(x, residual)
        compute: Any = _in_operations if plain else _FilterResponse.apply
        result: Tensor = compute(x, self.weight, self.bias, self.tau, residual, eps)
        return result

    def extra_repr(self) -> str:
        """The constructor arguments."""
        return (
            f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}, "
            f"learn_eps={self.learned_eps is not None}, threshold={self.tau is not None}"
        )


def _alike(x: Tensor, residual: Tensor | None) -> bool:
    return residual is None or (x.shape, x.dtype) == (residual.shape, residual.dtype)


def _check_extent(x: Tensor) -> None:
    """Refuses maps of one element; in a trace with free sizes nothing is known, and nothing is refused."""
    lengths = x.shape[2:]
    if all(isinstance(length, int) and length == 1 for length in lengths):
        raise InputValueError(
            f"a filter response norm divides each map by its root mean square, and of maps of one element "
            f"{tuple(x.shape)} that leaves the signs; set learn_eps=True, which is for them"
        )


def _in_operations(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None,
    residual: Tensor | None,
    eps: float | Tensor,
) -> Tensor:
    """The forward in differentiable operations of torch; of a tie with tau, y gets half the gradient."""
    x_NCX = cast(x, accumulation_dtype(x.dtype))
    # Exporters know rms_norm as a whole, and so do reports of what was folded and why not.
    h_NCX = x_NCX * _reciprocal(x_NCX, eps) if isinstance(eps, Tensor) else F.rms_norm(x_NCX, x.shape[2:], eps=eps)
    y_NCX = h_NCX if weight is None else h_NCX * per_channel(cast(weight, h_NCX.dtype), x)
    narrow = x.dtype if residual is None or residual.dtype == x.dtype else torch.promote_types(x.dtype, residual.dtype)
    return cast(_finished(y_NCX, bias, tau, residual), narrow)


def _reciprocal(x_NCX: Tensor, eps: float | Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) per sample and channel, (N, C, 1, ...); x is wide."""
    axes = list(range(2, x_NCX.dim()))
    squares_NCX = x_NCX.square()
    mean_NC1 = squares_NCX.mean(axes, keepdim=True) if axes else squares_NCX  # of no axes torch takes the mean of all
    return (mean_NC1 + eps).rsqrt()


def _finished(y_NCX: Tensor, bias: Tensor | None, tau: Tensor | None, residual: Tensor | None) -> Tensor:
    """max(y + bias + residual, tau); NaN stays NaN."""
    if bias is not None:
        y_NCX = y_NCX + per_channel(cast(bias, y_NCX.dtype), y_NCX)
    if residual is not None:
        y_NCX = y_NCX + residual
    return y_NCX if tau is None else torch.maximum(y_NCX, per_channel(cast(tau, y_NCX.dtype), y_NCX))


class _FilterResponse(torch.autograd.Function):
    """Forward and backward of the module docstring. Twice differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor | None,
        residual: Tensor | None,
        eps: float | Tensor,
    ) -> Tensor:
        x_NCX = cast(x, accumulation_dtype(x.dtype))
        reciprocal_NC1 = _reciprocal(x_NCX, eps)
        z_NCX = _finished(x_NCX * _factor(reciprocal_NC1, weight), bias, tau, residual)
        above_NCX = None
        if tau is not None and residual is not None:  # without one it is cheap to compute again
            above_NCX = ~(z_NCX <= per_channel(cast(tau, z_NCX.dtype), x))  # NaN is above
        learned = eps if isinstance(eps, Tensor) else None
        ctx.eps = None if learned is not None else eps
        ctx.save_for_backward(x, weight, bias, tau, learned, reciprocal_NC1, above_NCX)
        return cast(z_NCX, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tau, learned, reciprocal_NC1, above_NCX = ctx.saved_tensors
        wide = accumulation_dtype(x.dtype)
        x_NCX, g_NCX, axes = cast(x, wide), cast(grad, wide), reduced_axes(x)
        if torch.is_grad_enabled():  # what was kept has no graph
            reciprocal_NC1 = _reciprocal(x_NCX, ctx.eps if learned is None else learned)
        factor_NC1 = _factor(reciprocal_NC1, weight)
        grad_tau_C = None
        if tau is not None:
            if above_NCX is None:
                above_NCX = _finished(x_NCX * factor_NC1, bias, None, None) - per_channel(cast(tau, wide), x)
            # Zero where what decides is at most 0, as the backward of a ReLU computes it.
            passed_NCX = torch.ops.aten.threshold_backward(g_NCX, cast(above_NCX, wide), 0)
            grad_tau_C = cast((g_NCX - passed_NCX).sum(axes), tau.dtype)
            g_NCX = passed_NCX
        h_NCX = x_NCX * reciprocal_NC1
        products_NCX = g_NCX * h_NCX
        sums_NC1 = products_NCX.sum(axes[1:], keepdim=True) if axes[1:] else products_NCX
        count = x[0, 0].numel() if x.numel() else 1
        dx_NCX = factor_NC1 * (g_NCX - h_NCX * (sums_NC1 / count))
        return (
            cast(dx_NCX, x.dtype),
            None if weight is None else cast(sums_NC1.sum(axes), weight.dtype),
            None if bias is None else cast(g_NCX.sum(axes), bias.dtype),
            grad_tau_C,
            cast(g_NCX, grad.dtype) if ctx.needs_input_grad[4] else None,
            None if learned is None else (factor_NC1 * reciprocal_NC1 * sums_NC1).sum().reshape(1) / -2,
        )


def _factor(reciprocal_NC1: Tensor, weight: Tensor | None) -> Tensor:
    """What x is multiplied by."""
    wide = reciprocal_NC1.dtype
    return reciprocal_NC1 if weight is None else reciprocal_NC1 * per_channel(cast(weight, wide), reciprocal_NC1)
