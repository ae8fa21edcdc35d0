"""Constants that half precision cannot hold: moved across layers by powers of two, or named with their layer."""

import numpy as np
import pytest
import torch
from torch import nn

from lowprec.export.folding import fold, fold_onnx
from lowprec.export.folding.gauges.balance import in_trouble
from lowprec.export.folding.graph import Affine, Graph, Linear, Node
from lowprec.export.folding.traced.quiet import quiet_exporter
from lowprec.formats import FP16


def network(first, second=1.0, activation=nn.ReLU):
    """Two convolutions whose norms have these gammas; the second norm undoes the first one's scale."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation(),
        nn.Conv2d(8, 4, 1),
    ).eval()
    with torch.no_grad():
        layers[1].weight.fill_(first)
        layers[1].bias.normal_().mul_(first)
        layers[4].weight.fill_(second)
        layers[4].running_var.fill_(first**2)
    return layers


X = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)),)


def lost(report):
    return {name: loss["overflow"] + loss["vanished"] for name, loss in report.facts["fp16_range"].items()}


@pytest.mark.parametrize("gamma", [1e-7, 1e-6, 1e6, 1e7])
def test_half_holds_what_it_could_not(gamma):
    folded, report = fold(network(gamma), X)
    state = {name: value.half().double() for name, value in folded.network.state_dict().items()}
    assert any("powers of two" in row.reason for row in report.changed)
    assert not report.refused
    for name, value in folded.network.state_dict().items():
        rows = value.abs().reshape(len(value), -1).amax(1)
        assert value.abs().max() <= FP16.max
        assert name.endswith("bias") or (rows >= FP16.min_normal).all()
        assert torch.isfinite(state[name]).all()


@pytest.mark.parametrize("gamma", [1e-6, 1e6])
def test_the_steps_are_powers_of_two_and_change_no_bit(gamma):
    layers = network(gamma)
    balanced, _ = fold(layers, X)
    a, c = (
        layers[1].weight.double() / (layers[1].running_var.double() + layers[1].eps).sqrt(),
        layers[0].weight.double(),
    )
    plain = (a.reshape(-1, 1, 1, 1) * c).float()
    ratio = balanced.network.state_dict()["0.weight"] / plain
    exponent = torch.log2(ratio.reshape(8, -1))
    assert torch.equal(exponent, exponent.round())
    assert (exponent == exponent[:, :1]).all()
    assert (exponent != 0).any()


def test_an_activation_that_lets_no_scale_through_stops_it():
    _, report = fold(network(1e-7, activation=nn.GELU), X)
    assert any(row.name == "0" and "leave fp16's range" in row.reason for row in report.refused)
    assert lost(report)["0.weight"] > 0


def test_an_activation_that_would_overflow_stops_it():
    """Lifting the rows into range would lift what they compute beyond it."""
    layers = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False)).eval()
    with torch.no_grad():
        layers[0].weight.fill_(1e-6)
        layers[2].weight.fill_(1.0)
    x = torch.rand(2, 1, 4, 4)
    small, _ = fold(layers, (x,))
    large, _ = fold(layers, (x * 1e9,))  # 1e3 behind the first layer
    assert small.network.state_dict()["0.weight"].item() >= FP16.min_normal
    assert large.network.state_dict()["0.weight"].item() * 1e9 <= FP16.max


def test_networks_in_range_are_left_alone():
    _, report = fold(network(1.0), X)
    assert not any("powers of two" in row.reason for row in report.changed)


def test_onnx_files_are_balanced_too():
    layers = network(1e6)
    with quiet_exporter():
        shapes = ({0: torch.export.Dim("batch")},)
        model = torch.onnx.export(layers, X, dynamo=True, dynamic_shapes=shapes, verbose=False).model_proto
    _, report = fold_onnx(model)
    assert sum(lost(report).values()) <= 8  # biases far below the weights beside them may vanish
    assert any("powers of two" in row.reason for row in report.changed)
    assert report.facts["float64_error"] <= 1e-12  # some hundred products a layer, three layers, u = 1.1e-16


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, False), (0.0, False), (1e-6, True), (1e5, True), (np.inf, False)]
)
def test_what_counts_as_trouble(value, expected):
    assert in_trouble(Node("a", "conv", "", Linear("conv", np.full((2, 2, 1), value), None, 1, 1)), FP16) == expected
    assert in_trouble(Node("b", "mul", "", Affine(np.full((1, 2), value), np.zeros((1, 1)))), FP16) == expected
    assert not in_trouble(Node("c", "relu", "", Graph), FP16)
