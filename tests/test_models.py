"""The networks that configs name."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lowprec.errors import ConfigError
from lowprec.models import mlp, small_resnet
from lowprec.norm import NORMS


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, *NORMS])
def test_small_resnet_takes_a_class_or_a_name(norm):
    model = small_resnet(norm=norm, width=4, blocks=2, classes=3, in_channels=2)
    assert model(torch.randn(5, 2, 8, 8)).shape == (5, 3)
    wanted = norm if isinstance(norm, type) else NORMS[norm].classes[2]
    assert sum(type(module) is wanted for module in model.modules()) == 6
    assert not [name for name, _ in model.named_parameters() if name.endswith("conv1.bias")]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, *NORMS])
def test_mlp_takes_a_class_or_a_name_and_flattens(norm):
    model = mlp(inputs=12, hidden=[5, 4], classes=3, norm=norm)
    assert model(torch.randn(6, 3, 2, 2)).shape == (6, 3)
    assert [type(module).__name__ for module in model].count("Linear") == 3


def test_both_are_traceable_and_of_any_batch_size():
    for model in (small_resnet().eval(), mlp().eval()):
        x = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            want = model(x)
            assert torch.equal(fx.symbolic_trace(model)(x), want)
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            assert program.module()(torch.cat([x, x])).shape == (6, 10)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match="no norm is called 'L1'; choose one of l1"):
        small_resnet("L1")
