"""Gradients of several processes: averaged over DistributedDataParallel's, gathered from FSDP2's."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Buffers are the business of those who move them; how to say so has changed in torch 2.13.
_OLD = {"broadcast_buffers": False}
_NEW = {"forward_sync_buffers": False}


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """`model` in DistributedDataParallel, its gradients averaged by `average_wide` and its buffers left alone."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    alone = _NEW if "forward_sync_buffers" in known else _OLD
    parallel = DistributedDataParallel(model, **{**alone, **options})
    parallel.register_comm_hook(parallel.process_group, average_wide)
    return parallel


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes, as FSDP2 does it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """What a sharded tensor is on all processes together; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


# The annotations are looked at by torch, so they cannot be text.
def average_wide(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
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
