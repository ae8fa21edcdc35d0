"""Synchronised norms on 2 and 4 gloo processes, against one process on the joined batch."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import reference_norm as reference
import torch

from lowprec import norm as norms
from lowprec.errors import ConfigError
from lowprec.formats import FP32, FP64
from lowprec.methods.replace_norm import NORM_CLASSES
from lowprec.norm import inference_affine, is_norm, running_statistics
from lowprec.norm.sync import SyncBatchNorm
from lowprec.statistics import HeldStatistics

# Samples of each process; unequal, and none at all on one.
SPLITS = {2: [5, 2], 4: [3, 1, 0, 6]}
SHAPES = {"1d": (), "2d": (3, 2), "3d": (2, 2, 3), "length": (4,)}
LOCAL = {
    "SyncL1BatchNorm": ("l1", {}, 2),
    "SyncLInfBatchNorm": ("linf", {}, 1),
    "SyncTopKBatchNorm": ("topk", {"k": 4}, 1),
    "SyncL2BatchNorm": ("l2", {}, 1),
    "SyncKalmanBatchNorm": ("kalman", {}, 1),  # nothing is predicted here: tests/test_parallel.py
}
DIMENSION = {"1d": 1, "length": 1, "2d": 2, "3d": 3}
FORMATS = {torch.float64: FP64, torch.float32: FP32}
STEPS = 2


def drawn(size, axes, dtype, seed):
    x = torch.randn((size, 3, *axes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.exp() * torch.tensor([1.0, 30.0, 0.01]).reshape(1, 3, *[1] * len(axes)).double() + 2).to(dtype)


def cases(size):
    found = {}
    for name, (_, options, _) in LOCAL.items():
        for shape, axes in SHAPES.items():
            for dtype in (torch.float64, torch.float32) if shape == "2d" else (torch.float64,):
                total = sum(SPLITS[size])
                x = [drawn(total, axes, dtype, seed) for seed in range(STEPS)]
                upstream = [
                    torch.randn(x[0].shape, generator=torch.Generator().manual_seed(7 + seed)).to(dtype)
                    for seed in range(STEPS)
                ]
                found[f"{name} {shape} {dtype}"] = {
                    "class": name, "options": options, "dtype": dtype, "shape": shape, "whole": (x, upstream),
                    "x": list(zip(*(part.split(SPLITS[size]) for part in x), strict=True)),
                    "upstream": list(zip(*(part.split(SPLITS[size]) for part in upstream), strict=True)),
                }  # fmt: skip
    return found


def with_few_samples(case):
    """The same with a k beyond the joined batch."""
    return {**case, "options": {"k": 99}}


CASES = {size: cases(size) for size in SPLITS}
for found in CASES.values():
    found["SyncTopKBatchNorm k=99"] = with_few_samples(found["SyncTopKBatchNorm 1d torch.float64"])
PAIR = "SyncTopKBatchNorm 2d torch.float64"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process saw, by number of processes, rank and case."""
    folder = tmp_path_factory.mktemp("sync")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    for size in SPLITS:
        torch.save(CASES[size], folder / f"cases{size}.pt")
    torch.save(CASES[2][PAIR], folder / "pair.pt")
    command = [sys.executable, str(root / "tests" / "sync_worker.py"), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(4)
    ]
    try:
        for worker in workers:
            _, complaint = worker.communicate(timeout=120)
            assert worker.returncode == 0, complaint
    finally:
        for worker in workers:
            worker.kill()
    return {size: [torch.load(folder / f"result{size}_{rank}.pt") for rank in range(size)] for size in SPLITS}


def one_process(case):
    """The local norm on the joined batch: outputs and gradients per step, and the buffers."""
    name, options = LOCAL[case["class"]][0], case["options"]
    norm = NORM_CLASSES[name][DIMENSION[case["shape"]]](3, dtype=case["dtype"], momentum=0.3, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.25, 1.0, -3.0]))
    steps = []
    for x, upstream in zip(*case["whole"], strict=True):
        x = x.clone().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(upstream)
        steps.append(
            {"y": y.detach(), "dx": x.grad, "dgamma": norm.weight.grad.clone(), "dbeta": norm.bias.grad.clone()}
        )
    return norm, steps


def bound(case, value):
    """Both sides sum n elements in their own order; x - mean cancels, so errors of x count by as much as |x| / S."""
    x = torch.cat(case["whole"][0]).double().transpose(0, 1).flatten(1)
    cancellation = float((x.abs().amax(1) / x.std(1)).max())
    n = case["whole"][0][0].numel() // 3
    return cancellation * reference.rounding_bound(FORMATS[case["dtype"]], n) * float(value.abs().max())


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SPLITS for name in CASES[size]])
def test_all_processes_together_are_one_process_on_the_joined_batch(results, size, name):
    case, ranks = CASES[size][name], [result["cases"][name] for result in results[size]]
    norm, steps = one_process(case)
    for step, want in enumerate(steps):
        for key in ("y", "dx"):
            got = torch.cat([rank[step][key] for rank in ranks])
            torch.testing.assert_close(got, want[key], rtol=0, atol=bound(case, want[key]))
        for key in ("dgamma", "dbeta"):
            got = sum(rank[step][key] for rank in ranks)
            n = case["whole"][0][0].numel() // 3
            torch.testing.assert_close(got, want[key], rtol=0, atol=n * bound(case, want[key]))
        rounds = LOCAL[case["class"]][2]
        assert {(rank[step]["forward"], rank[step]["backward"]) for rank in ranks} == {(rounds, 1)}
    for key, want in norm.state_dict().items():
        for rank in ranks:
            assert torch.equal(rank["state"][key], ranks[0]["state"][key])
            torch.testing.assert_close(rank["state"][key], want, rtol=0, atol=bound(case, want.double()))


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SPLITS for name in CASES[size]])
def test_held_statistics_count_all_processes(results, size, name):
    case, ranks = CASES[size][name], [result["cases"][name] for result in results[size]]
    norm, _ = one_process(case)
    held = HeldStatistics(norm)
    with held.forward():
        for x in case["whole"][0]:
            norm(x)
    held.commit()
    for key, want in norm.state_dict().items():
        for rank in ranks:
            torch.testing.assert_close(rank["held"][key], want, rtol=0, atol=bound(case, want.double()))
    for rank, part in zip(ranks, case["x"], strict=True):
        assert rank["eval_collectives"] == 0
        want = norm.eval()(part[0]).detach()
        atol = bound(case, torch.cat([want.flatten(), torch.ones(1, dtype=want.dtype)])) * 30
        torch.testing.assert_close(rank["eval"], want, rtol=0, atol=atol)


@pytest.mark.parametrize("size", SPLITS)
def test_one_value_in_all_processes_is_refused_by_all(results, size):
    for result in results[size]:
        assert result["refusal"] == "Expected more than 1 value per channel when training, got 1 in all"


def test_a_group_of_processes_is_joined_without_the_others(results):
    for alone, inside in zip(results[2], results[4], strict=False):
        for step in range(STEPS):
            for key, want in alone["cases"][PAIR][step].items():
                assert key in ("forward", "backward") or torch.equal(inside["pair"][step][key], want)
        for key, want in alone["cases"][PAIR]["held"].items():
            assert torch.equal(inside["pair"]["held"][key], want)


def test_every_family_has_a_synchronised_form():
    assert {name for name, _, _ in LOCAL.values()} <= set(NORM_CLASSES)
    assert set(LOCAL) == {name for name in norms.__all__ if name.startswith("Sync")}


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_process_group_it_is_the_local_norm(name, shape):
    family, options, _ = LOCAL[name]
    local = NORM_CLASSES[family][DIMENSION[shape]](3, **options)
    sync = getattr(norms, name)(3, **options)
    x = drawn(4, SHAPES[shape], torch.float32, 0)
    assert torch.equal(sync(x), local(x))
    assert all(torch.equal(sync.state_dict()[key], value) for key, value in local.state_dict().items())
    assert torch.equal(sync.eval()(x), local.eval()(x))
    assert is_norm(sync)
    assert inference_affine(sync) is not None
    assert running_statistics(sync) == running_statistics(local)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        sync.train()(torch.ones(1, 3))


@pytest.mark.parametrize("name", LOCAL)
def test_copies_keep_the_group_and_pickles_leave_it(name):
    group = object()
    norm = getattr(norms, name)(3, process_group=group)
    assert copy.deepcopy(norm).process_group is group
    assert pickle.loads(pickle.dumps(norm)).process_group is None
    assert isinstance(norm, SyncBatchNorm)
    with pytest.raises(ConfigError, match=f"{name} has wide statistics only; use the local norm"):
        getattr(norms, name)(3, stats_dtype=torch.float16)
