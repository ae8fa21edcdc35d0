"""Averages gradients over processes, as a communication hook of DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def average_wide(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over the processes: summed in float32, divided, rounded once to the bucket's type.

    Half sums overflow at half the largest number already for two processes. Dividing first, as torch does, avoids that
    and loses log2(processes) bits of the smallest gradients.
    """
    own: Tensor = bucket.buffer()
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    work = dist.all_reduce(wide, group=group, async_op=True)
    size = dist.get_world_size(group)

    def mean(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return own.copy_(future.value()[0].div_(size))

    averaged: torch.futures.Future[Tensor] = work.get_future().then(mean)
    return averaged
