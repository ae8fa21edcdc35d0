"""Batch Kalman normalisation: batch norm whose moments are a mixture of measured ones and of a prediction.

The prediction comes from the norm before it in the network (`lowprec.norm.moment_flow`). With predicted moments (a, A),
those of the batch (m, V) and a gain q, the filtered ones are those of the mixture of both with weights 1 - q and q:

    mean = (1 - q) a + q m,    variance = (1 - q) A + q V + q (1 - q) (m - a)^2

Where nothing is predicted (the first norm of a network, evaluation) it is plain batch norm. Running statistics follow
the filtered moments, and are all that evaluation and folding know.

Source: Wang, Peng, Luo, Wang, Lin, Batch Kalman Normalization, arXiv 1802.03133, and the released code
(wanggrun/Kalman-Normalization), which differ; see `VARIANTS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter
from torch.nn import functional as F

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.norm.activation import PendingSum
from lowprec.norm.base import BatchMoments
from lowprec.norm.l2 import L2BatchNorm
from lowprec.norm.moment_flow import FlowHooks
from lowprec.norm.moment_states import Carried, Moments, Sample, State, set_state, state_of
from lowprec.statistics import BatchStatistics

VARIANTS = {
    "output": "the moments of what the norm gives, N(bias, weight^2), go through the layers to the next one",
    "code": "the filtered moments, as of a network without norms, go through the layers, as in the released code",
    "paper": "the filtered moments go to the next norm as they are, which has a learned transition and a learned gain",
}
"""How a norm predicts; `transition` in `KalmanBatchNorm`."""

# The released code keeps 0.9 of the prediction at 2 samples and 0.05 at 128; the log-odds of the gain are taken to be
# linear in log N between and beyond.
_FEW, _MANY = (2, 0.1), (128, 0.95)
_SLOPE = (math.log(0.95 / 0.05) - math.log(0.1 / 0.9)) / math.log(_MANY[0] / _FEW[0])


def default_gain(samples: float | Tensor) -> Any:
    """The share of the batch's own moments, by the number of samples.

    >>> round(default_gain(2), 6), round(default_gain(128), 6)
    (0.1, 0.95)
    """
    odds = 0.1 / 0.9 * (samples / _FEW[0]) ** _SLOPE
    return odds / (1 + odds)


class KalmanBatchNorm(L2BatchNorm):
    """L2 batch norm with filtered moments.

    Args:
        *args: those of `ScaleBatchNorm`.
        **options: those of `ScaleBatchNorm`.
        variant: a name in `VARIANTS`.
        gain: q, the share of the batch's own moments, 0 to 1; None for `default_gain`. "paper" learns it from there.
        deterministic: moments go through layers in closed form; else noise with these moments does, drawn with torch's
            generator at every forward, as the released code has it. "paper" draws nothing.
        guard: where a predicted variance is this many times the batch's, the prediction is not believed: of that
            channel; in "code" of all channels, when the mean of the ratios is.

    Raises:
        ConfigError: an unknown variant, or numbers out of range.
    """

    transition: Parameter | None
    process_noise: Parameter | None
    gain_logit: Parameter | None

    def __init__(
        self,
        *args: Any,
        variant: str = "output",
        gain: float | None = None,
        deterministic: bool = True,
        guard: float = 100.0,
        **options: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"a Kalman norm has no variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        if (gain is not None and not 0 <= gain <= 1) or not guard > 0:
            raise ConfigError(f"gain is {gain} and guard {guard}; give a gain from 0 to 1 and a positive guard")
        super().__init__(*args, **options)
        self.variant, self.gain, self.deterministic, self.guard = variant, gain, deterministic, guard
        learned = variant == "paper"
        like = self.weight if self.weight is not None else self.running_mean
        like = torch.empty(0) if like is None else like
        start = default_gain(2) if gain is None else min(max(gain, 1e-3), 1 - 1e-3)
        for name, value in (("transition", 1.0), ("process_noise", 0.1), ("gain_logit", math.log(start / (1 - start)))):
            full = torch.full((self.num_features,), value, device=like.device, dtype=like.dtype)
            self.register_parameter(name, Parameter(full) if learned else None)
        self.flow: FlowHooks | None = None
        self._predicted: tuple[Tensor, Tensor] | None = None
        self._filtered: tuple[Tensor, Tensor | None] | None = None
        self._positions = 1

    def of_batch(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, BatchStatistics]:
        """Filters, normalises, and says what the next norm can predict from."""
        self._check_flow()
        state = state_of(x) if self.training else None
        self._predicted = None if state is None else self._prediction(state)
        self._positions = math.prod(x.shape[2:])
        y, running = super().of_batch(x, residual)
        filtered, self._predicted, self._filtered = self._filtered, None, None
        if self.training and torch.is_grad_enabled() and not isinstance(y, PendingSum) and self.act is None:
            set_state(y, self._state(filtered, y.shape[2:]))
        return y, running

    def moments(self, mean_C: Tensor, spread_C: Tensor | None, count: int | Tensor) -> BatchMoments:
        """The filtered moments in place of the batch's."""
        self._filtered = mean_C, spread_C
        if self._predicted is None or spread_C is None:
            return super().moments(mean_C, spread_C, count)
        gain = self._gain(count, mean_C)
        before, variance = self._believable(mean_C, spread_C)
        filtered_C = (1 - gain) * before + gain * mean_C
        between_C = gain * (1 - gain) * (mean_C - before).square()
        self._filtered = filtered_C, (1 - gain) * variance + gain * spread_C + between_C
        plain = super().moments(*self._filtered, count)
        unbiased_C = (1 - gain) * variance + gain * self.running_spread(spread_C, count) + between_C
        running = BatchStatistics(count, {"running_mean": filtered_C.detach(), "running_var": unbiased_C.detach()})
        return plain._replace(running=running)

    def joined_prediction(self, predicted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What all processes agree on; here there is one."""
        return predicted

    def _check_flow(self) -> None:
        if self.training and self.flow is not None and torch.is_grad_enabled() and not self.flow.is_open:
            raise UnsupportedError(
                f"{type(self).__name__} runs outside of its network's forward, where no prediction reaches it: train "
                "without activation checkpointing, and call the network that was converted"
            )

    def _gain(self, count: int | Tensor, like: Tensor) -> Tensor | float:
        if self.gain_logit is not None:
            return torch.sigmoid(self.gain_logit.to(like.dtype))
        return default_gain(count / self._positions) if self.gain is None else self.gain

    def _prediction(self, state: State) -> tuple[Tensor, Tensor] | None:
        moments = state.moments(self.num_features)
        if moments is None:
            return None
        mean_C, variance_C = moments
        if self.transition is not None and self.process_noise is not None:
            factor_C = self.transition.to(mean_C.dtype)
            noise_C = self.process_noise.to(mean_C.dtype).square()
            return factor_C * mean_C, factor_C.square() * variance_C + noise_C
        return self.joined_prediction((mean_C, variance_C))

    def _believable(self, mean_C: Tensor, spread_C: Tensor) -> tuple[Tensor, Tensor]:
        assert self._predicted is not None
        before, variance = (value.to(mean_C.dtype) for value in self._predicted)
        with torch.no_grad():
            ratio_C = variance / spread_C
            far = ratio_C.mean() >= self.guard if self.variant == "code" else ratio_C >= self.guard
            far = far | ~(before.isfinite() & variance.isfinite())
        return torch.where(far, mean_C, before), torch.where(far, spread_C, variance)

    def _state(self, filtered: tuple[Tensor, Tensor | None] | None, positions: Sequence[int]) -> State | None:
        mean_C, variance_C = filtered or (None, None)
        if mean_C is None or variance_C is None:
            return None
        if self.variant == "paper":
            return Carried(mean_C, variance_C)
        if self.variant == "output":
            one_C = torch.ones_like(mean_C)
            variance_C = one_C if self.weight is None else self.weight.to(mean_C.dtype).square()
            mean_C = one_C - 1 if self.bias is None else self.bias.to(mean_C.dtype)
        if self.deterministic:
            return Moments(mean_C, variance_C)
        return Sample.drawn(mean_C, variance_C, positions)

    def extra_repr(self) -> str:
        """As the other norms, with the variant."""
        gain = "" if self.gain is None else f", gain={self.gain}"
        return f"{super().extra_repr()}, {self.variant}{gain}{'' if self.deterministic else ', drawn'}"


class KalmanBatchNorm1d(KalmanBatchNorm):
    """Kalman batch norm over (N, C) or (N, C, L). Arguments: see `KalmanBatchNorm`. Fold: exact."""

    input_ranks = (2, 3)


class KalmanBatchNorm2d(KalmanBatchNorm):
    """Kalman batch norm over (N, C, H, W). Arguments: see `KalmanBatchNorm`. Fold: exact."""

    input_ranks = (4,)


class KalmanBatchNorm3d(KalmanBatchNorm):
    """Kalman batch norm over (N, C, D, H, W). Arguments: see `KalmanBatchNorm`. Fold: exact."""

    input_ranks = (5,)


class _Averaged(torch.autograd.Function):
    """The mean over processes, forward and backward: with gradients averaged, that of the mean of the losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _mean_of_processes(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean_of_processes(grad, ctx.group), None


def _mean_of_processes(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def average_prediction(predicted: tuple[Tensor, Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Predictions from noise that each process drew for itself, as one: the moments of all the noise together."""
    mean_C, variance_C = predicted
    both = torch.stack([mean_C, variance_C + mean_C.square()])
    mean_C, square_C = _Averaged.apply(both, group)  # type: ignore[no-untyped-call]
    return mean_C, F.relu(square_C - mean_C.square())
