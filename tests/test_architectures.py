"""Every architecture folds to the least number of per-channel operations that its entry argues for, and is the same."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, example, randomise
from leftovers import convolutions, operations_left
from torch import nn

from lowprec.export.folding import fold_traced, trace
from lowprec.export.folding.accuracy import MAX_FLOAT32_RATIO

# Both networks are float64 and some tens of layers deep; each layer reorders sums of at most a few thousand products,
# n * u = 2e3 * 1.1e-16, times a condition of a few.
FLOAT64 = 1e-12
# A gamma of 1e-4 amplifies what is beside it by its reciprocal, a few of them in a row by more.
FLOAT64_TINY = 1e-10


def folded_and_measured(name, signs):
    """The folded double network, its report, the traced one, and the error on a batch that was never traced."""
    architecture = ARCHITECTURES[name]
    network = randomise(architecture.make(1).eval(), signs, seed=3).double()
    x = example(architecture, batch=2, seed=0)
    traced = trace(network, (x if architecture.tokens else x.double(),))
    folded, report = fold_traced(traced)
    y = example(architecture, batch=3, seed=1)
    with torch.no_grad():
        expected, found = (model(y if architecture.tokens else y.double()) for model in (network, folded))
    expected, found = (list(value) if isinstance(value, tuple) else [value] for value in (expected, found))
    errors = [float((a - b).abs().max() / b.square().mean().sqrt()) for a, b in zip(found, expected, strict=True)]
    return folded, report, traced, max(errors)


def test_there_are_enough_and_each_argues_its_counts():
    assert len(ARCHITECTURES) >= 40
    assert all(len(entry.why) > 40 for entry in ARCHITECTURES.values())
    assert sum(entry.mixed > 0 for entry in ARCHITECTURES.values()) >= 10


@pytest.mark.parametrize("signs", ["positive", "mixed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_least_is_left(name, signs):
    folded, report, traced, error = folded_and_measured(name, signs)
    left = operations_left(folded)
    assert len(left) == getattr(ARCHITECTURES[name], signs), (left, report.refused)
    assert error <= FLOAT64
    assert report.facts["float64_error"] <= FLOAT64
    assert report.facts["float32_error_ratio"] <= MAX_FLOAT32_RATIO
    written_as_convolutions = sum(operation.startswith("conv") for operation in left)
    merged = convolutions(traced.module) - convolutions(folded) + written_as_convolutions
    assert merged == ARCHITECTURES[name].merged


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_and_zero_gammas(name):
    folded, report, _, error = folded_and_measured(name, "tiny")
    assert error <= FLOAT64_TINY
    assert report.facts["float32_error_ratio"] <= MAX_FLOAT32_RATIO
    assert len(report.refused) >= len(operations_left(folded)) - ARCHITECTURES[name].mixed
    assert all(len(row.reason) > 20 for row in report.refused)


def test_every_norm_folds_into_its_own_convolution_whatever_its_gammas():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    network.eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.0, 1e-30, -1e-12, 1e-7, -1e-4, 1.0, -1.0, 1e12]))
        network[1].bias.normal_()
    folded, report = fold_traced(trace(copy.deepcopy(network), (torch.randn(2, 3, 8, 8),)))
    assert report.facts["norms_left"] == 0
    assert all("fp16's range" in row.reason for row in report.refused)  # 1e12 is beyond half, whatever is done
    assert not operations_left(folded)
