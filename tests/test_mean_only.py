"""Mean-only batch norm against numpy, and the method that puts it into networks of bounded weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from reference_norm import rounding_bound
from torch import nn

from lowprec.calibration import recompute_batch_stats
from lowprec.errors import UnsupportedError
from lowprec.export.folding import fold
from lowprec.formats import BF16, FP16, FP32, FP64
from lowprec.methods.bounded import convert_bounded_weight_norm
from lowprec.methods.mean_only import convert_mean_only
from lowprec.models import small_resnet
from lowprec.norm import inference_affine, is_norm, running_statistics
from lowprec.norm.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from lowprec.precision import Precision
from lowprec.report import ChangeReport
from lowprec.statistics import HeldStatistics

CLASSES = {2: MeanOnlyBatchNorm1d, 3: MeanOnlyBatchNorm1d, 4: MeanOnlyBatchNorm2d, 5: MeanOnlyBatchNorm3d}
SHAPE = (6, 3, 4, 2, 3)
FORMATS = {torch.float64: FP64, torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


def data(rank=4, dtype=torch.float64):
    x = torch.randn(SHAPE[:rank], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x.exp() + 2).to(dtype)


def means(x):
    return np.array([np.concatenate([np.ravel(sample[index]) for sample in x]).mean() for index in range(x.shape[1])])


def along_channels(values, rank):
    return np.reshape(values, [1, -1] + [1] * (rank - 2))


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rank", CLASSES)
def test_training_takes_off_the_mean_and_the_gradient_loses_its_own(rank, dtype, weight):
    norm = CLASSES[rank](3, momentum=1.0, weight=weight, dtype=torch.promote_types(dtype, torch.float32))
    factor = np.array([0.5, -1.5, 2.0]) if weight else np.ones(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.25, 1.0, -3.0]))
        if weight:
            norm.weight.copy_(torch.from_numpy(factor))
    x = data(rank, dtype).requires_grad_()
    y = norm(x)
    wide, mean = x.detach().double().numpy(), means(x.detach().double().numpy())
    want = along_channels(factor, rank) * (wide - along_channels(mean, rank)) + along_channels([0.25, 1.0, -3.0], rank)
    assert y.dtype == dtype
    count = wide.size // 3
    computed = FP64 if dtype == torch.float64 else FP32
    size = np.abs(wide).max() * np.abs(factor).max() + 3
    atol = (rounding_bound(computed, count) + FORMATS[dtype].unit_roundoff) * size
    np.testing.assert_allclose(y.detach().double(), want, rtol=0, atol=atol)
    np.testing.assert_allclose(norm.running_mean.double(), mean, rtol=rounding_bound(computed, count))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    y.backward(upstream)
    g = upstream.double().numpy() * along_channels(factor, rank)
    size = np.abs(g).max() * 2
    atol = (rounding_bound(computed, count) + 2 * FORMATS[dtype].unit_roundoff) * size
    np.testing.assert_allclose(x.grad.double(), g - along_channels(means(g), rank), rtol=0, atol=atol)


def test_the_norm_is_one_of_ours_without_a_spread():
    norm = MeanOnlyBatchNorm2d(3)
    assert is_norm(norm)
    assert running_statistics(norm) == {"running_mean": "mean"}
    assert set(norm.state_dict()) == {"bias", "running_mean", "num_batches_tracked"}
    assert list(dict(norm.named_parameters())) == ["bias"]
    x = data().float()
    norm(x)
    norm.eval()
    affine = inference_affine(norm)
    np.testing.assert_array_equal(affine.scale, np.ones(3))
    np.testing.assert_array_equal(affine.shift, -norm.running_mean.double())
    want = x - norm.running_mean.reshape(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), want, rtol=0, atol=rounding_bound(FP32) * float(x.abs().max()))
    plain = MeanOnlyBatchNorm2d(3, affine=False, track_running_stats=False)
    assert not plain.state_dict()
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))


def test_a_constant_channel_gives_the_bias_and_huge_half_values_do_not_overflow():
    norm = MeanOnlyBatchNorm2d(1)
    nn.init.constant_(norm.bias, 0.5)
    x = torch.full((8, 1, 4, 4), 6e4, dtype=torch.float16)
    assert torch.equal(norm(x), torch.full_like(x, 0.5))


def test_statistics_in_true_half_are_rounded_and_held_back_until_a_step_lands():
    norm = MeanOnlyBatchNorm2d(3, momentum=1.0, stats_dtype=torch.float16)
    norm(data().half())
    assert norm.running_mean.dtype == torch.float16
    # A tree over 36 values has 6 levels, each with one rounding, and the division another.
    np.testing.assert_allclose(norm.running_mean.double(), means(data().half().double().numpy()), rtol=8 * FP16.eps)
    model = nn.Sequential(MeanOnlyBatchNorm2d(3, momentum=1.0))
    held = HeldStatistics(model)
    with held.forward():
        model(data().float()[:2])
        model(data().float()[2:])
    assert not model[0].running_mean.any()
    held.commit(True)
    want = means(data().float().double().numpy())
    np.testing.assert_allclose(model[0].running_mean.double(), want, rtol=rounding_bound(FP32, 36))


def test_convert_keeps_what_means_the_same_and_says_what_goes():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4)
    )
    model(torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)))
    old = model[1].eval()
    old.tag = "mine"
    calls = []
    old.register_forward_hook(lambda *_: calls.append(1))
    report = ChangeReport()
    new = convert_mean_only(model, report)[1]
    assert type(new) is MeanOnlyBatchNorm2d
    assert new.bias is old.bias
    assert new.running_mean is old.running_mean
    assert new.num_batches_tracked is old.num_batches_tracked
    assert (new.weight, new.momentum, new.training, new.tag) == (None, 0.3, False, "mine")
    assert [row.reason for row in report.changed] == [
        "BatchNorm2d became MeanOnlyBatchNorm2d without weight and running_var"
    ]
    assert [row.name for row in report.refused] == ["4"]
    model(torch.ones(1, 1, 3, 3))
    assert calls == [1]
    kept = convert_mean_only(nn.BatchNorm1d(3), ChangeReport(), weight=True)
    assert isinstance(kept, MeanOnlyBatchNorm1d)
    assert kept.weight is not None
    bare = convert_mean_only(nn.BatchNorm1d(3, affine=False, track_running_stats=False), ChangeReport())
    assert not bare.state_dict()
    bare(torch.ones(2, 3))
    with pytest.raises(UnsupportedError, match="found no BatchNorm1d, 2d or 3d to replace in Linear"):
        convert_mean_only(nn.Linear(2, 2), ChangeReport())


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_bounded_weights_with_mean_only_norms_train_and_fold_into_plain_layers(mode):
    torch.manual_seed(0)
    model = small_resnet(width=8)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # the norms of the rows stay what they are now
    model = convert_bounded_weight_norm(convert_mean_only(model, ChangeReport()), ChangeReport(), skip=["classifier"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    precision = Precision(mode, init_scale=2.0**8)
    model, optimizer = precision.prepare(model, optimizer)
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 10
    losses = []
    for _ in range(40):
        with precision.forward():
            loss = nn.functional.cross_entropy(model(x), labels)
        assert precision.step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.eval()
    folded, report = fold(model, (x,))
    assert report.facts["norms_left"] == 0
    assert report.facts["float64_error"] <= 1e-10  # the limit that fold itself holds its algebra to
    names = set(folded.state_dict())
    assert names
    assert all(name.endswith((".weight", ".bias")) for name in names)


def test_running_means_are_re_estimated_exactly():
    torch.manual_seed(0)
    model = convert_mean_only(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double(), ChangeReport())
    batches = [data()[:4, ..., :2], data()[4:, ..., :2]]
    new, _ = recompute_batch_stats(model, batches)
    want = means(model[0](torch.cat(batches)).detach().numpy())
    np.testing.assert_allclose(new[1].running_mean, want, rtol=0, atol=rounding_bound(FP64, 96) * np.abs(want).max())
