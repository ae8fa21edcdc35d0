"""How running statistics merge, how they are written, and how they wait for the step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference_norm as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowprec.formats import FP32, FP64
from lowprec.norm import NORMS, L1BatchNorm2d, running_statistics
from lowprec.statistics import BatchStatistics, HeldStatistics, merge, overwrite_statistics, write_statistics

KINDS = {"m": "mean", "v": "variance", "s": "scale"}


def statistics_of(values):
    """What one batch of plain numbers leaves: mean, unbiased variance, and a made-up scale (mean of |x|)."""
    variance = np.var(values, ddof=1) if len(values) > 1 else np.nan
    numbers = {"m": np.mean(values), "v": variance, "s": np.mean(np.abs(values))}
    return BatchStatistics(len(values), {k: torch.tensor([v], dtype=torch.float64) for k, v in numbers.items()})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), min_size=1, max_size=5).filter(
        lambda parts: len(parts[0]) > 1
    )
)
def test_merged_parts_are_the_statistics_of_the_union_in_any_grouping(parts):
    whole = statistics_of(np.concatenate(parts))
    merged = merge(KINDS, [statistics_of(part) for part in parts])
    folded = statistics_of(parts[0])
    for part in parts[1:]:
        folded = merge(KINDS, [folded, statistics_of(part)])
    largest = 1.0 + max(abs(x) for part in parts for x in part)
    for found in (merged, folded):
        assert found.count == whole.count
        for name, power in (("m", 1), ("v", 2), ("s", 1)):
            # Sums of up to 45 terms, relative to the largest term to the power that the statistic has.
            atol = reference.rounding_bound(FP64, 45) * 4 * largest**power
            assert abs(float(found.values[name] - whole.values[name])) <= atol


def test_merging_keeps_a_small_variance_beside_a_large_mean():
    x = 1000 + torch.randn(4096, generator=torch.Generator().manual_seed(0)).double().numpy()
    merged = merge(KINDS, [statistics_of(part) for part in np.split(x, 16)])
    # float32 parts of this are off by eps * 1000^2 when merged as raw second moments; here by rounding alone.
    atol = reference.rounding_bound(FP64, 4096) * 1000
    assert abs(float(merged.values["v"]) - np.var(x, ddof=1)) <= atol


def batch(count=8):
    return BatchStatistics(count, {"running_mean": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([3.0, 4.0])})


@pytest.mark.parametrize("landed", [True, torch.tensor(True)])
def test_writing_moves_buffers_as_torch_does(landed):
    for momentum, factors in ((0.1, (0.1, 0.1)), (None, (1.0, 0.5)), (1.0, (1.0, 1.0))):
        norm = nn.BatchNorm2d(2, momentum=momentum)
        mean = np.zeros(2)
        for factor in factors:
            write_statistics(norm, batch(), landed)
            mean = (1 - factor) * mean + factor * np.array([1.0, 2.0])
        np.testing.assert_allclose(norm.running_mean, mean, rtol=reference.rounding_bound(FP32))
        assert int(norm.num_batches_tracked) == 2


@pytest.mark.parametrize("landed", [False, torch.tensor(False)])
def test_a_step_that_does_not_land_writes_nothing(landed):
    norm = nn.BatchNorm2d(2)
    before = copy.deepcopy(norm.state_dict())
    broken = BatchStatistics(
        4, {"running_mean": torch.full((2,), torch.nan), "running_var": torch.full((2,), torch.inf)}
    )
    write_statistics(norm, broken, landed)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_overwriting_leaves_the_count():
    norm = nn.BatchNorm2d(2)
    overwrite_statistics(norm, batch())
    assert norm.running_var.tolist() == [3, 4]
    assert int(norm.num_batches_tracked) == 0


class Twice(nn.Module):
    """Every kind of norm, one of them called twice, one by keyword."""

    def __init__(self):
        super().__init__()
        self.bn, self.l1, self.sync = nn.BatchNorm2d(3), L1BatchNorm2d(3), nn.SyncBatchNorm(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.average = nn.BatchNorm2d(3, momentum=None)

    def forward(self, x):
        x = self.bn(input=x)
        x = self.l1(x.exp())
        return self.average(self.instance(self.plain(self.sync(x * 3))) + self.bn(x))


def inputs(seed=0, size=4):
    return torch.randn(size, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def buffers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_held_statistics_of_one_batch_land_as_torch_would_have_written_them():
    model = Twice()
    plain = copy.deepcopy(model)
    before = buffers(model)
    held = HeldStatistics(model)
    with held.forward():
        out = model(inputs())
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
    assert (model.bn.momentum, model.average.momentum) == (0.1, None)
    assert torch.equal(out, plain(inputs()))
    held.commit(True)
    for key, value in buffers(model).items():
        if not key.startswith("bn."):  # called twice: torch writes two times, here the two calls merge
            # momentum * x in float32 or float64: a few roundings.
            torch.testing.assert_close(value, buffers(plain)[key], rtol=reference.rounding_bound(FP32), atol=FP32.eps)
    assert int(model.bn.num_batches_tracked) == 1


def test_micro_batches_of_one_step_merge_to_the_whole_batch():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).double()
    x = inputs(size=6).double()
    held = HeldStatistics(model)
    for part in x.split([1, 2, 3]):
        with held.forward():
            model(part)
    held.commit()
    values = x.transpose(0, 1).flatten(1).numpy()
    bound = reference.rounding_bound(FP64, values.shape[1])
    np.testing.assert_allclose(model[0].running_mean, values.mean(1), rtol=bound)
    np.testing.assert_allclose(model[0].running_var, values.var(1, ddof=1), rtol=bound)
    assert int(model[0].num_batches_tracked) == 1


@pytest.mark.parametrize("landed", [False, torch.tensor(False)])
def test_a_skipped_step_leaves_the_buffers_and_is_forgotten(landed):
    model = Twice()
    before = buffers(model)
    held = HeldStatistics(model)
    with held.forward():
        model(inputs())
    held.commit(landed)
    held.commit(True)
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
    with held.forward():
        model(inputs())
    held.discard()
    held.commit(True)
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())


def test_outside_the_context_and_in_evaluation_everything_is_as_without():
    model = Twice()
    held = HeldStatistics(model)
    model.eval()
    with held.forward():
        model(inputs())
    model.train()
    held.commit(True)
    assert int(model.bn.num_batches_tracked) == 0
    model(inputs())
    assert int(model.bn.num_batches_tracked) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_raises_puts_the_buffers_back():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(4, 4, 1))
    mean = model[0].running_mean
    held = HeldStatistics(model)
    with pytest.raises(RuntimeError), held.forward():
        model(inputs())
    with pytest.raises(ValueError, match="expected 4D"), held.forward():
        model(inputs()[0, 0])
    assert model[0].running_mean is mean
    assert model[0].momentum == 0.1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), *(family.classes[2](3) for family in NORMS.values())])
def test_a_batch_without_samples_adds_nothing(norm):
    plain, held = copy.deepcopy(norm), HeldStatistics(norm)
    with held.forward():
        norm(inputs()[:0])
    held.commit()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in norm.state_dict().items())
    plain(inputs())
    for part in (inputs()[:0], inputs()):
        with held.forward():
            norm(part)
    held.commit()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, rtol=reference.rounding_bound(FP32), atol=FP32.eps)


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_is_held_and_its_micro_batches_merge_by_kind(name):
    norm = NORMS[name].classes[2](3, momentum=1.0, dtype=torch.float64)
    parts = inputs(size=6).double().split([1, 2, 3])
    each = []
    for part in parts:
        norm(part)
        values = {key: getattr(norm, key).clone() for key in norm.running_kinds}
        each.append(BatchStatistics(part.numel() // 3, values))
    want = merge(norm.running_kinds, each)
    norm.reset_running_stats()
    held = HeldStatistics(norm)
    for part in parts:
        with held.forward():
            norm(part)
    assert norm.running_mean.tolist() == [0, 0, 0]
    held.commit()
    for key, value in want.values.items():
        torch.testing.assert_close(getattr(norm, key), value, rtol=reference.rounding_bound(FP64), atol=0)


class Checkpointed(nn.Module):
    """Runs its norms again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), L1BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_forward_that_is_computed_again_in_backward_counts_once():
    model = Checkpointed()
    plain = copy.deepcopy(model)
    plain.inner(inputs())
    before = buffers(model)
    held = HeldStatistics(model)
    with held.forward():
        loss = model(inputs()).square().sum()
    with held.recomputation():
        loss.backward()
    assert all(torch.equal(value, before[key]) for key, value in buffers(model).items())
    held.commit()
    for key, value in buffers(model).items():
        torch.testing.assert_close(value, buffers(plain)[key], rtol=reference.rounding_bound(FP32), atol=FP32.eps)


class Mine(nn.BatchNorm2d):
    """A user's subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_are_held_too():
    model = Mine(3)
    held = HeldStatistics(model)
    with held.forward():
        model(inputs())
    assert model.running_mean.tolist() == [0, 0, 0]
    held.commit()
    assert (model.running_mean != 0).all()
    assert running_statistics(model) is not None
