"""Synchronised norms: statistics over the batch of all processes, over gloo or NCCL, on any device.

Torch's SyncBatchNorm exists for GPUs only; these run wherever torch.distributed does, so that a data-parallel run can
be tested on a CPU. Exact against one process on the joined batch, unequal batch sizes included (`lowprec.norm.joined`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch import distributed as dist

from lowprec.errors import ConfigError
from lowprec.norm.base import BatchMoments, ScaleBatchNorm
from lowprec.norm.checks import InputValueError
from lowprec.norm.joined import JoinedL1, JoinedL2, JoinedStatistic, JoinedTopK, joined_statistics
from lowprec.norm.kalman import KalmanBatchNorm, average_prediction
from lowprec.norm.l1 import L1BatchNorm
from lowprec.norm.l2 import L2BatchNorm
from lowprec.norm.topk import LInfBatchNorm, TopKBatchNorm


class _Group:
    """Holds a process group so that copies of a module share it and a pickle leaves it out: it cannot travel."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[type[_Group], tuple[None]]:
        return _Group, (None,)


class SyncBatchNorm(ScaleBatchNorm):
    """Joins the statistics of all processes in training; in evaluation, or without a process group, the local norm.

    All processes must call it together, with any number of samples, none included. Not twice differentiable.

    Args:
        *args: num_features, eps, ... of `ScaleBatchNorm`.
        process_group: None for all processes; a pickled module comes back with None.
        **options: the keyword arguments of the local norm.

    Raises:
        ConfigError: `stats_dtype`, which joined statistics don't have.
    """

    input_ranks = (2, 3, 4, 5)

    def __init__(self, *args: Any, process_group: dist.ProcessGroup | None = None, **options: Any) -> None:
        if options.get("stats_dtype") is not None:
            raise ConfigError(f"{type(self).__name__} has wide statistics only; use the local norm for stats_dtype")
        super().__init__(*args, **options)
        self._group = _Group(process_group)
        self.joined_count: Tensor | None = None

    @abstractmethod
    def statistic(self) -> JoinedStatistic:
        """What the processes exchange."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes; None for all."""
        return self._group.group

    def joins_processes(self) -> bool:
        """In training, where there is an initialised group of more than one process."""
        ready = self.training and dist.is_available() and dist.is_initialized()
        return ready and dist.get_world_size(self.process_group) > 1

    def batch_moments(self, x_NCX: Tensor) -> BatchMoments:
        """The moments of the joined batch; `joined_count` is its number of elements per channel."""
        self.joined_count = None
        if not self.joins_processes():
            return super().batch_moments(x_NCX)
        mean_C, spread_C, count = joined_statistics(x_NCX, self.statistic(), self.process_group)
        if count.device.type == "cpu" and int(count) < 2:  # elsewhere reading it would wait for the device
            raise InputValueError(f"Expected more than 1 value per channel when training, got {int(count)} in all")
        self.joined_count = count
        return self.moments(mean_C, spread_C, count)


class SyncL1BatchNorm(SyncBatchNorm, L1BatchNorm):
    """L1 batch norm over the batch of all processes, (N, C) to (N, C, D, H, W); two exchanges, one in backward.

    Arguments: those of `ScaleBatchNorm` (without `stats_dtype`), and `process_group` (None: all processes). Not twice
    differentiable. Fold: exact.
    """

    def statistic(self) -> JoinedStatistic:
        """The L1 exchange."""
        return JoinedL1(self.eps)


class SyncLInfBatchNorm(SyncBatchNorm, LInfBatchNorm):
    """L-infinity batch norm over the batch of all processes; one exchange, one in backward. See `SyncL1BatchNorm`."""

    def statistic(self) -> JoinedStatistic:
        """The top-1 exchange."""
        return JoinedTopK(1, self.eps)


class SyncTopKBatchNorm(SyncBatchNorm, TopKBatchNorm):
    """Top-k batch norm over the batch of all processes; one exchange, one in backward. See `SyncL1BatchNorm`.

    `k` as in `TopKBatchNorm`.
    """

    def statistic(self) -> JoinedStatistic:
        """The top-k exchange."""
        return JoinedTopK(self.k, self.eps)


class SyncKalmanBatchNorm(SyncBatchNorm, KalmanBatchNorm):
    """Kalman batch norm over the batch of all processes; one exchange, one in backward. See `SyncL1BatchNorm`.

    Where predictions are drawn those of all processes count, which is one exchange more, and one in backward.
    """

    def statistic(self) -> JoinedStatistic:
        """The L2 exchange."""
        return JoinedL2()

    def joined_prediction(self, predicted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over the processes where they drew; in closed form they have the same."""
        if self.deterministic or not self.joins_processes():
            return predicted
        return average_prediction(predicted, self.process_group)


class SyncL2BatchNorm(SyncBatchNorm, L2BatchNorm):
    """L2 batch norm over the batch of all processes; one exchange, one in backward. See `SyncL1BatchNorm`."""

    def statistic(self) -> JoinedStatistic:
        """The L2 exchange."""
        return JoinedL2()
