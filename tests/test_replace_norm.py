"""The methods that put another norm family in place of batch norms: options, refusals, what is taken over."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.formats import FP64
from lowprec.methods import convert
from lowprec.norm import L1BatchNorm2d, L2BatchNorm2d, LInfBatchNorm1d, TopKBatchNorm2d
from lowprec.precision import Precision

METHODS = ("l1", "linf", "topk", "l2_half")
over_methods = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(channels=3):
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=None)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(2):
        norm(torch.randn(4, channels, 5, 5) * 3 + 1)
    return norm


def test_the_new_norm_computes_with_the_old_ones_parameters():
    old = trained().double()
    new, _ = convert(old, "l1")
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    mean, scale = reference.l1_statistics(x.numpy(), old.eps)
    gamma, beta = (value.detach().numpy() for value in (old.weight, old.bias))
    want = reference.normalised(x.numpy(), mean, scale, gamma, beta)
    atol = reference.rounding_bound(FP64, 100) * np.abs(want).max()
    np.testing.assert_allclose(new(x).detach().numpy(), want, rtol=0, atol=atol)


@over_methods
def test_running_statistics_that_mean_the_same_are_kept(name):
    old = trained()
    new, report = convert(old, name)
    dtype = torch.float16 if name == "l2_half" else torch.float32
    assert torch.equal(new.running_mean, old.running_mean.to(dtype))
    assert int(new.num_batches_tracked) == 2
    assert new.momentum is None
    if name == "l2_half":
        assert torch.equal(new.running_var, old.running_var.half())
        assert report.changed[0].reason == "BatchNorm2d became L2BatchNorm2d"
    else:
        assert new.running_scale.tolist() == [1, 1, 1]
        assert report.changed[0].reason.endswith("running_scale starts at 1")
    _, report = convert(old.eval(), name)
    assert ("recompute it before use" in report.changed[0].reason) == (name != "l2_half")


def test_true_half_statistics_are_an_option_by_name_or_type():
    for given in ("float16", torch.float16):
        new, _ = convert(trained(), "l1", stats_dtype=given, accumulation="naive")
        assert isinstance(new, L1BatchNorm2d)
        assert (new.stats_dtype, new.accumulation) == (torch.float16, "naive")
        assert (new.running_mean.dtype, new.running_scale.dtype) == (torch.float16, torch.float16)
        assert new.weight.dtype == torch.float32
    new, _ = convert(nn.BatchNorm1d(2), "linf", stats_dtype="bfloat16")
    assert isinstance(new, LInfBatchNorm1d)
    assert new.stats_dtype == torch.bfloat16
    new, _ = convert(trained(), "l2_half")
    assert isinstance(new, L2BatchNorm2d)
    assert new.stats_dtype == torch.float16


def test_options_reach_the_norm_and_wrong_ones_are_refused():
    new, _ = convert(trained(), "topk", k=4)
    assert isinstance(new, TopKBatchNorm2d)
    assert new.k == 4
    with pytest.raises(ConfigError, match="stats_dtype is 'flaot16'; choose one of float16, bfloat16; did you mean"):
        convert(trained(), "l1", stats_dtype="flaot16")
    for name, options in (("topk", {"k": 0}), ("l1", {"stats_dtype": torch.int8}), ("l2_half", {"accumulation": "no"})):
        with pytest.raises(ConfigError):
            convert(trained(), name, **options)
    with pytest.raises(ConfigError, match="method 'linf' has no option 'k'"):
        convert(trained(), "linf", k=4)


def test_statistics_that_do_not_fit_in_half_stay_wide_with_a_reason():
    big = trained()
    big.running_var[1] = 7e4
    converted, report = convert(nn.Sequential(big, trained()), "l2_half")
    assert type(converted[0]) is nn.BatchNorm2d
    assert report.refused[0].reason == "its running_var holds 7e+04, which overflows float16"
    wide, _ = convert(nn.Sequential(big, trained()), "l1")
    assert type(wide[0]) is L1BatchNorm2d


def test_half_buffers_stay_half_under_precision():
    model, _ = convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)), "l2_half")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision("fp16-master")
    precision.prepare(model, optimizer)
    with precision.forward():
        loss = model(torch.randn(4, 1, 6, 6)).square().mean()
    assert precision.step(loss)
    for buffer in (model[1].running_mean, model[1].running_var):
        assert torch.equal(buffer, buffer.half().to(buffer.dtype))


@over_methods
def test_what_is_not_torchs_own_is_refused_with_a_reason(name):
    patched = trained()
    patched.forward = lambda x: x
    lazy = nn.LazyBatchNorm2d(affine=False, track_running_stats=False)
    model = nn.Sequential(trained(), lazy, patched, nn.InstanceNorm2d(3), nn.LayerNorm(3))
    converted, report = convert(model, name)
    reasons = {row.name: row.reason for row in report.refused}
    assert set(reasons) == {"1", "2", "3", "4"}
    assert "run one batch through the model first" in reasons["1"]
    assert reasons["2"] == "its forward was replaced on the object"
    assert reasons["3"] == "is a InstanceNorm2d, not a batch norm"
    assert [type(module) for module in converted][1:] == [type(module) for module in model][1:]
    with pytest.raises(UnsupportedError, match=f"method '{name}' found no BatchNorm1d, 2d, 3d or SyncB.*: 1: is a"):
        convert(nn.Sequential(nn.ReLU(), nn.GroupNorm(1, 2)), name)
    with pytest.raises(UnsupportedError, match=r"0: is a .*one of this library's already"):
        convert(converted, name)


def test_models_that_cannot_be_copied_are_refused_in_one_line():
    with pytest.raises(
        UnsupportedError, match=r"convert works on a copy, but Sequential has none.*run one batch through"
    ):
        convert(nn.Sequential(nn.LazyBatchNorm2d()), "l1")
    model = nn.Sequential(trained())
    model.cached = model[0].weight * 2
    with pytest.raises(
        UnsupportedError, match=r"has none: Only Tensors created explicitly.*remove what deepcopy refuses"
    ):
        convert(model, "l1")


class Group:
    """Stands for a process group: it cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'Group' object")


@over_methods
def test_new_buffers_are_where_and_what_the_old_ones_were(name):
    for old in (
        trained().double(),
        nn.BatchNorm2d(3, device="meta"),
        trained().half(),
        nn.BatchNorm2d(3, affine=False),
    ):
        new, _ = convert(old, name)
        dtype = torch.float16 if name == "l2_half" else old.running_var.dtype
        for key in new.running_kinds:
            buffer = getattr(new, key)
            assert (buffer.dtype, buffer.device) == (dtype, old.running_mean.device)
    new, _ = convert(nn.BatchNorm2d(3, track_running_stats=False).double(), name)
    assert new.weight.dtype == torch.float64


@over_methods
def test_synchronised_norms_stay_synchronised(name):
    old = nn.SyncBatchNorm(3, momentum=None)
    old.process_group = group = Group()
    old.running_mean.fill_(2)
    old.note = "mine"
    converted, report = convert(nn.Sequential(trained(), old), name)
    if name == "l2_half":
        assert report.refused[0].reason == "is a SyncBatchNorm; the processes exchange wide statistics only"
        return
    new = converted[1]
    assert type(new).__name__.startswith("Sync")
    assert type(new).__module__ == "lowprec.norm.sync"
    assert isinstance(new, type(converted[0]).__mro__[1])
    assert (new.momentum, new.process_group, new.note) == (None, group, "mine")
    assert new.running_mean.tolist() == [2, 2, 2]
    assert new(torch.randn(4, 3, 5)).isfinite().all()


@over_methods
def test_flags_switched_on_the_object_stay(name):
    held = trained()
    held.track_running_stats = False  # torch: statistics of the batch in training, running ones in evaluation
    new, _ = convert(held, name)
    assert new.track_running_stats is False
    assert new.running_mean is not None
    before = copy.deepcopy(new.state_dict())
    new(torch.randn(4, 3, 5, 5))
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())
    none = nn.BatchNorm2d(3, affine=False)
    none.running_mean = none.running_var = none.num_batches_tracked = None
    new, report = convert(none, name)
    assert new.running_mean is None
    assert new.weight is None
    assert not new.state_dict()
    assert "starts at" not in report.changed[0].reason
