"""One process of test_sync.py: runs its part of a batch through synchronised norms and saves what came out."""

from __future__ import annotations

import copy
import datetime
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from lowprec import norm as norms
from lowprec.statistics import HeldStatistics


class CountingCollectives:
    """Counts the calls of torch.distributed that exchange data."""

    def __init__(self):
        self.count = 0
        for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "reduce"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function):
        def call(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return call


def run(case, rank, **group):
    """Two training steps, an evaluation, and a step whose statistics are held over two micro-batches."""
    collectives, result = CountingCollectives(), {}
    norm = getattr(norms, case["class"])(3, dtype=case["dtype"], momentum=0.3, **case["options"], **group)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.25, 1.0, -3.0]))
    for step, (x, upstream) in enumerate(zip(case["x"][rank], case["upstream"][rank], strict=True)):
        x = x.clone().requires_grad_()
        collectives.count = 0
        y = norm(x)
        forward, collectives.count = collectives.count, 0
        norm.zero_grad()
        y.backward(upstream)
        result[step] = {
            "y": y.detach(), "dx": x.grad, "dgamma": norm.weight.grad.clone(), "dbeta": norm.bias.grad.clone(),
            "forward": forward, "backward": collectives.count,
        }  # fmt: skip
    result["state"] = copy.deepcopy(norm.state_dict())
    held = HeldStatistics(norm)
    with held.forward():
        for x in case["x"][rank]:
            norm(x)
    held.commit()
    result["held"] = norm.state_dict()
    collectives.count = 0
    result["eval"] = norm.eval()(case["x"][rank][0]).detach()
    result["eval_collectives"] = collectives.count
    return result


def main(folder, rank):
    """A session of four processes, then one of the first two of them."""
    torch.set_num_threads(1)
    for size in (4, 2):
        if rank >= size:
            continue
        store = dist.FileStore(str(folder / f"store{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
        cases = torch.load(folder / f"cases{size}.pt")
        found = {"cases": {name: run(case, rank) for name, case in cases.items()}, "refusal": refusal(rank)}
        if size == 4:
            pair = dist.new_group([0, 1])
            if rank < 2:
                found["pair"] = run(torch.load(folder / "pair.pt"), rank, process_group=pair)
        torch.save(found, folder / f"result{size}_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def refusal(rank):
    """What is said when all processes together have one value per channel."""
    try:
        norms.SyncL1BatchNorm(3)(torch.ones(1 if rank == 0 else 0, 3))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
