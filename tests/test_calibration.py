"""Exact re-estimation against one giant batch, and the ranges of a network's tensors."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import nn

from lowprec.calibration import calibrate, recompute_batch_stats
from lowprec.errors import DataError, UnsupportedError
from lowprec.formats import FP16, FP32, FP64
from lowprec.methods import convert
from lowprec.models import small_resnet
from lowprec.norm import NORMS, L1BatchNorm1d

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(count=48):
    """Samples whose mean and spread drift, so that parts of the set are unlike the whole."""
    drift = torch.linspace(0.5, 4, count, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return torch.randn(count, 1, 8, 8, dtype=torch.float64) * drift + drift


def parts(x):
    return list(x.split([1, 7, 20, len(x) - 28]))


def network(norm, dtype=torch.float64):
    model = small_resnet(nn.BatchNorm2d if norm == "batch" else norm, width=4).to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(torch.rand_like(value))
    return model


def trained_at_once(model, x):
    """What torch itself leaves after one training forward over everything at momentum 1."""
    giant = copy.deepcopy(model).train()
    for module in giant.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    giant(x)
    return {key: value for key, value in giant.state_dict().items() if "running" in key}


@pytest.mark.parametrize("norm", ["batch", *NORMS])
def test_pooled_statistics_equal_those_of_one_giant_batch(norm):
    model, x = network(norm), images()
    found, report = recompute_batch_stats(model, parts(x))
    # Sums over 48 * 64 elements, through eight norms one after the other.
    bound = 8 * reference.rounding_bound(FP64, 48 * 64)
    for key, value in trained_at_once(model, x).items():
        np.testing.assert_allclose(found.state_dict()[key], value, rtol=bound, atol=bound)
    assert len(report.changed) == report.facts["norms"] == 8
    assert not report.refused
    assert "3072 elements per channel" in report.changed[0].reason


def test_the_report_says_how_far_the_running_statistics_were_off():
    # Two values of each sign: mean 3, unbiased standard deviation 2, mean absolute deviation sqrt(3).
    x = 3 + torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64) * 3**0.5
    _, report = recompute_batch_stats(nn.BatchNorm1d(1).double(), [x])  # its buffers start at mean 0, variance 1
    assert report.changed[0].reason.endswith("off by up to 1.5 spreads, the running spread by a factor of 0.5 to 0.5")
    _, report = recompute_batch_stats(L1BatchNorm1d(1).double(), [x])
    scale = (math.pi / 2) ** 0.5 * 3**0.5
    expected = f"off by up to {3 / scale:.3g} spreads, the running spread by a factor of {1 / scale:.3g} to"
    assert expected in report.changed[0].reason


@pytest.mark.parametrize("norm", ["batch", *NORMS])
def test_float32_networks_get_statistics_to_float32_rounding(norm):
    model, x = network(norm), images()
    single = copy.deepcopy(model).float()
    found, _ = recompute_batch_stats(single, [(part.float(), torch.zeros(len(part)).long()) for part in parts(x)])
    bound = reference.rounding_bound(FP32, 1000)  # float32 convolutions through a dozen layers
    for key, value in trained_at_once(model, x).items():
        assert found.state_dict()[key].dtype == torch.float32
        torch.testing.assert_close(found.state_dict()[key].double(), value, rtol=bound, atol=bound)


def test_the_model_its_flags_and_hooks_stay():
    model = network("batch")
    model.blocks[0].eval()
    model.norm.num_batches_tracked.fill_(5)
    before = copy.deepcopy(model.state_dict())
    progress = []
    found, _ = recompute_batch_stats(model, parts(images()), progress=lambda *done: progress.append(done))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in found.modules()] == [m.training for m in model.modules()]
    assert int(found.norm.num_batches_tracked) == 5
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*found.modules(), *model.modules()])
    assert progress == [(done, 8) for done in range(1, 9)]


def test_dropout_is_off_and_later_layers_do_not_run():
    class Bomb(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x

    calls = []
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), Bomb()).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    found, _ = recompute_batch_stats(model, [x])
    bound = reference.rounding_bound(FP64, 20)
    np.testing.assert_allclose(found[1].running_mean, x.numpy().mean(0), rtol=bound, atol=bound)
    assert len(calls) == 1  # the one forward that finds the order


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.once, self.never = (nn.BatchNorm1d(2) for _ in range(3))
        self.layer, self.instance = nn.LayerNorm(2), nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x, shift):
        return self.once(self.twice(self.twice(x)) + shift)


def test_norms_that_have_no_statistics_of_one_batch_are_refused_by_name():
    found, report = recompute_batch_stats(Shared(), [(torch.randn(8, 2), torch.randn(8, 2))])
    assert [row.name for row in report.changed] == ["once"]
    reasons = {row.name: row.reason for row in report.refused}
    assert set(reasons) == {"twice", "never", "layer", "instance"}
    assert "2 times" in reasons["twice"]
    assert "does not run" in reasons["never"]
    assert "no running statistics" in reasons["layer"]
    assert "single samples" in reasons["instance"]
    assert found.twice.running_mean.tolist() == [0, 0]


class Changing:
    """Fewer samples on every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield torch.randn(10 - self.passes, 2)


class OtherWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x) if len(x) > 2 else x


def test_unusable_data_is_refused_in_one_line():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    overflowing = nn.Linear(2, 2)
    nn.init.constant_(overflowing.weight, 10.0)
    for model, batches, error, reason in (
        (norm, (part for part in [x]), DataError, "read only once.*give a list or a DataLoader"),
        (norm, [], DataError, "there are no batches"),
        (norm, [x[:0]], DataError, "batch 0 is empty"),
        (norm, [x, x * torch.nan], DataError, "batch 1: input 0 holds values that are not finite"),
        (norm, [x.numpy()], DataError, "a batch must be a tensor or a tuple of tensors, not a ndarray"),
        (norm, [{"x": x}], DataError, "not a dict"),
        (norm, [(x, "label")], DataError, r"not a tuple of \(Tensor, str\)"),
        (norm, [x[:1]], DataError, "one element per channel has no spread"),
        (nn.Sequential(overflowing, norm), [torch.full((4, 2), 3e38)], DataError, "1: its input is not finite"),
        (convert(norm, "l1")[0], Changing(), DataError, r"elements per channel and the next"),
        (OtherWay(), [x, x[:2]], DataError, "does not run on another"),
        (nn.LayerNorm(2), [x], UnsupportedError, "no batch norm with running statistics.*LayerNorm"),
        (nn.ReLU(), [x], UnsupportedError, "ReLU has no batch norm"),
    ):
        with pytest.raises(error, match=reason) as caught:
            recompute_batch_stats(model, batches)
        assert "\n" not in str(caught.value)


def test_ranges_are_those_of_all_values():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    found = calibrate(model, [(x[:4], torch.zeros(4).long()), (x[4:], torch.zeros(6).long())])
    want = {"0": model[0](x), "1": model(x), "(model)": model(x)}
    assert list(found.outputs) == list(want)
    for path, value in want.items():
        values, row = value.detach().numpy(), found.outputs[path]
        bound = reference.rounding_bound(FP64, 20)
        exact = (row["count"], row["min"], row["max"], row["absmax"])
        np.testing.assert_allclose(exact, (20, values.min(), values.max(), np.abs(values).max()), rtol=bound)
        np.testing.assert_allclose(row["rms"], np.sqrt(np.mean(values**2)), rtol=bound)
        assert row["zeros"] == np.mean(values == 0)
        np.testing.assert_allclose(row["fp16_headroom_bits"], np.log2(FP16.max / np.abs(values).max()), rtol=bound)
    assert set(found.inputs) == {"input"}
    assert found.weights["0.weight"]["absmax"] == model[0].weight.abs().max()
    assert found.data["batches"] == 2
    assert found.data["samples"] == 10


def test_shares_of_zeros_and_of_half_subnormals_and_negative_headroom():
    step = FP16.min_normal
    x = torch.tensor([0.0, step / 2, -step / 1000, step, 1.0, -4 * FP16.max, 0.0, 2.0]).reshape(2, 4)
    row = calibrate(nn.Identity(), [x]).outputs["(model)"]
    assert row["zeros"] == 2 / 8
    assert row["fp16_subnormal"] == 2 / 8
    assert row["fp16_headroom_bits"] == -2
    assert row["min"] == -4 * FP16.max
    assert calibrate(nn.Identity(), [torch.zeros(2, 2)]).outputs["(model)"]["fp16_headroom_bits"] is None


def test_the_fingerprint_is_of_the_inputs_alone():
    x = torch.randn(4, 2)
    model, other = nn.Linear(2, 2), nn.Linear(2, 3)
    digest = calibrate(model, [x]).data["sha256"]
    assert calibrate(other, [(x, torch.zeros(4).long())]).data["sha256"] == digest
    assert calibrate(model, [x + 1]).data["sha256"] != digest
    assert calibrate(model, [x[:2], x[2:]]).data["sha256"] != digest
    assert len(digest) == 64


def test_parametrised_weights_count_as_the_layer_uses_them():
    model, _ = convert(small_resnet(width=4), "bounded_weight_norm")
    found = calibrate(model, [torch.randn(4, 1, 8, 8)])
    assert found.weights["stem.weight"]["absmax"] == model.stem.weight.abs().max()
    assert not [path for path in [*found.weights, *found.outputs] if "parametrizations" in path]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, left, right, index):
        return {"sum": (self.fc(left) + right, index), "none": None}


def test_several_inputs_and_nested_outputs_and_a_generator_will_do(tmp_path):
    model = Nested().train()
    args = (torch.randn(3, 2), torch.randn(3, 2), torch.arange(3))
    progress = []
    found = calibrate(model, (batch for batch in [args]), progress=lambda *done: progress.append(done))
    assert set(found.inputs) == {"left", "right"}
    assert set(found.outputs) == {"fc", "(model)"}
    assert progress == [(1, 0)]
    assert model.training
    assert model.fc.training
    assert not model.fc._forward_hooks
    found.save(tmp_path / "calibration.json")
    assert json.loads((tmp_path / "calibration.json").read_text()) == found.to_dict()


def test_calibration_refuses_unusable_data_and_leaves_the_model_clean():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).train()
    nn.init.constant_(model[0].weight, 1e38)
    for batches, reason in (
        ([], "there are no batches"),
        ([torch.tensor([[torch.inf, 0.0]])], "batch 0: input 0 holds values that are not finite"),
        ([torch.ones(1, 2), torch.full((1, 2), 10.0)], "batch 1: the output of '0' is not finite"),
    ):
        with pytest.raises(DataError, match=reason):
            calibrate(model, batches)
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())


def test_the_folder_is_not_importable_under_its_short_name():
    code = "import calibration"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "import lowprec.calibration, not calibration" in run.stderr
