"""The processes of a run: one, or those that torchrun started.

Nothing else in the trainer knows how many there are. Every process holds the whole data and takes its part of each
batch; the first one writes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from lowprec.errors import MissingDependencyError, UnsupportedError
from lowprec.statistics import running_statistics

_MEETING_SECONDS = 90


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many.

    Args:
        rank: 0 is the one that writes.
        count: 1 without torchrun.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder and talks."""
        return self.rank == 0

    def part(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of a batch that are this process's."""
        return index if self.count == 1 else np.array_split(index, self.count)[self.rank]

    def average_statistics(self, model: nn.Module) -> None:
        """Running statistics become their mean over the processes."""
        if self.count == 1:
            return
        norms = [module for module in model.modules() if running_statistics(module) is not None]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
        if buffers:
            flat = torch.cat([buffer.flatten().float() for buffer in buffers])
            dist.all_reduce(flat)
            flat /= self.count
            for buffer, values in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(values.view(buffer.shape))

    def total(self, *values: float) -> list[float]:
        """Sums over the processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of every process, all of one shape, under `<rank>.<name>`."""
        if self.count == 1:
            return {f"0.{name}": tensor for name, tensor in tensors.items()}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.count)]
            dist.all_gather(parts, tensor.to(self.device))
            found |= {f"{rank}.{name}": part.cpu() for rank, part in enumerate(parts)}
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def is_alone() -> bool:
    """Whether torchrun started no other process."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def is_first() -> bool:
    """Whether this process is the one that talks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this run; joins those of torchrun, over NCCL on GPUs and gloo elsewhere, and leaves them.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        MissingDependencyError: a GPU was asked for and there is none.
    """
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if is_alone():
        yield Processes(0, 1, place)
        return
    ours = not dist.is_initialized()
    if ours:
        _meet("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if ours:
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Joins the other processes; one that does not within `_MEETING_SECONDS` ends, so that torchrun starts all anew.

    torchrun (of torch 2.13) keeps its store when it restarts processes, with the addresses of those that are gone in
    it, and gloo then waits for them for ever, whatever its timeout. On one machine the number of the restart tells the
    addresses apart; agents on several machines do not count alike.
    """

    def give_up() -> None:
        sys.stderr.write(f"lowprec: the processes did not meet within {_MEETING_SECONDS} s; leaving\n")
        os._exit(UnsupportedError.exit_code)

    watchdog = threading.Timer(_MEETING_SECONDS, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store, rank, count = next(rendezvous("env://"))
            fresh = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=fresh, rank=rank, world_size=count)
        else:
            dist.init_process_group(backend)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(
            f"the processes did not meet ({reason}); torchrun --max-restarts starts them anew"
        ) from None
    finally:
        watchdog.cancel()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError("run.device is 'cuda', but torch finds no GPU here; set run.device to 'auto'")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)
