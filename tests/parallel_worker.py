"""One process of test_parallel.py: trains under DistributedDataParallel or FSDP2 and saves what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lowprec.errors import LowprecError, UnsupportedError
from lowprec.methods import attach, convert
from lowprec.precision import Precision


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def shares(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def train(mode: str, steps: int, factor: float = 1.0) -> dict[str, object]:
    """A few steps of SGD; every process has its third or half of each batch, or all of it alone."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, precision = network(), Precision(mode, init_scale=2.0**10, health_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    precision.prepare(model, optimizer)
    called = precision.data_parallel() if world > 1 else model
    landed = []
    for step in range(steps):
        x, y = shares(step, rank, world)
        # in the last but one step one process alone overflows
        scale = float("inf") if factor != 1 and step == steps - 2 and rank == world - 1 else 1.0
        with precision.forward():
            loss = nn.functional.cross_entropy(called(x), y) * scale
        landed.append(bool(precision.step(loss, clip_norm=1.0)))
    return {"weights": precision.wide_weights(), "landed": landed, "overflow": str(precision.last_overflow)}


def averaged_half() -> torch.Tensor:
    """Gradients near the largest half on both processes, whose sum is not finite in half; and tiny ones."""
    model = nn.Linear(2, 1, bias=False).half()
    nn.init.ones_(model.weight)
    precision = Precision("fp16-pure", init_scale=1.0, health_every=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision.prepare(model, optimizer)
    called = precision.data_parallel()
    x = torch.tensor([[60000.0, 2.0**-24]])
    with precision.forward():
        loss = called(x).sum() * 1.0
    precision.backward(loss)
    precision.unscale()
    return model.weight.grad.clone()


def refusals() -> list[str]:
    found = []
    model, precision = network(), Precision("fp16-master")
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    called = precision.data_parallel()
    for action in (precision.data_parallel, lambda: _no_sync(precision, called)):
        try:
            action()
        except UnsupportedError as error:
            found.append(str(error))
    return found


def _no_sync(precision: Precision, called: nn.Module) -> None:
    with called.no_sync(), precision.forward():
        loss = called(torch.ones(1, 8)).sum()
        precision.backward(loss)


def sharded(mode: str) -> dict[str, object]:
    """FSDP2: sharded float32 weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    precision = Precision(mode, init_scale=2.0**10, health_every=0)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    landed = []
    for step in range(4):
        x, y = shares(step, dist.get_rank(), dist.get_world_size())
        with precision.forward():
            loss = nn.functional.cross_entropy(model(x), y) * (float("inf") if step == 2 else 1.0)
        landed.append(bool(precision.step(loss, clip_norm=1.0)))
    return {"weights": {name: p.full_tensor().detach() for name, p in model.named_parameters()}, "landed": landed}


def preconditioned(mode: str, sync: bool = True) -> dict[str, object]:
    """Four steps of `bnp`; with two processes in two micro-batches each."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, _ = convert(network(), "bnp", init=False)
    precision = Precision(mode, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer, sync=sync)
    precision.prepare(model, optimizer)
    called = precision.data_parallel() if world > 1 else model
    for step in range(4):
        x, y = shares(step, rank, world)
        for part_x, part_y in zip(x.chunk(world), y.chunk(world), strict=True):
            with precision.forward():
                loss = nn.functional.cross_entropy(called(part_x), part_y) / world
            precision.backward(loss)
        precision.step()
    statistics = dict(model.named_buffers())
    return {"weights": precision.wide_weights(), "statistics": statistics}


def filtered(deterministic: bool) -> dict[str, torch.Tensor]:
    """Three steps of a network with synchronised Kalman norms; the state at the end."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    make = nn.SyncBatchNorm if world > 1 else nn.BatchNorm2d
    layers = [nn.Conv2d(1, 4, 3, padding=1), make(4), nn.ReLU(), nn.Conv2d(4, 4, 3), make(4), nn.ReLU(), nn.Flatten()]
    model, _ = convert(nn.Sequential(*layers, nn.Linear(4 * 16, 3)), "kalman", deterministic=deterministic)
    precision = Precision("fp32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision.prepare(model, optimizer)
    called = precision.data_parallel() if world > 1 else model
    torch.manual_seed(rank)  # each process draws its own noise
    for step in range(3):
        x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        with precision.forward():
            loss = nn.functional.cross_entropy(called(x), (torch.arange(4) % 3).chunk(world)[rank])
        precision.step(loss)
    return model.state_dict()


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=int(sys.argv[3]))
    result: dict[str, object] = {"half": averaged_half(), "refused": refusals()}
    for mode in sys.argv[4].split(","):
        result[mode] = train(mode, 4)
        result[f"{mode} overflow"] = train(mode, 4, factor=2.0)
    for mode in ("fp32", "fp16-master"):
        result[f"bnp {mode}"] = preconditioned(mode)
    result["kalman"], result["kalman drawn"] = filtered(True), filtered(False)
    result["bnp apart"] = preconditioned("fp32", sync=False)
    for mode in ("fp32", "bf16", "fp16-autocast", "fp16-master", "fp16-pure"):
        try:
            result[f"sharded {mode}"] = sharded(mode)
        except LowprecError as error:
            result[f"sharded {mode}"] = str(error)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
