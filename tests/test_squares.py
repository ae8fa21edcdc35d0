"""What is computed from sums of squares stays wide in half files: evaluated in true half arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lowprec.export import export
from lowprec.export.emit.precision import convert_precision
from lowprec.formats import BF16, FP16
from lowprec.norm import FilterResponseNorm, L2BatchNorm2d


class ByHand(nn.Module):
    """Layer normalisation over the channels, spelled out."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(1, keepdim=True)
        return y / (y * y).mean(1, keepdim=True).add(1e-6).sqrt()


class Cosine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-6)


NORMS = {
    "frn": lambda: FilterResponseNorm(4),
    "frn, learned eps": lambda: FilterResponseNorm(4, learn_eps=True),
    "rms norm": lambda: nn.RMSNorm([10, 10]),
    "l2 without running statistics": lambda: L2BatchNorm2d(4, track_running_stats=False),
    "layer norm by hand": ByHand,
    "cosine": Cosine,
}


@pytest.mark.parametrize("precision", ["fp16", "mixed"])
@pytest.mark.parametrize("name", NORMS)
def test_a_half_file_normalises_what_has_no_half_square(name, precision, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), NORMS[name](), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        network[0].weight.mul_(300)  # outputs up to about 500: half, as their sums over a map, but not their squares
    x = torch.randn(3, 2, 12, 12)
    bundle = export(network, (x,), tmp_path / "bundle", precision=precision)
    want = ReferenceEvaluator(str(bundle.folder / "model.onnx")).run(None, {"input": x.numpy()})[0]
    found = ReferenceEvaluator(str(bundle.folder / f"model.{precision}.onnx")).run(None, {"input": x.numpy()})[0]
    # Products of 18 and 36 halves, summed in half: rounding by 2^-11 each, and all outputs are of order 1.
    assert np.abs(found - want).max() <= 60 * FP16.unit_roundoff * np.abs(want).max()


def graph(text: str) -> onnx.ModelProto:
    """A graph from `Pow x two > s; ...`, of x (2, 3) and constants."""
    two, three = (
        helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("two", 2), ("three", 3))
    )
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    nodes = []
    for one in text.split(";"):
        (kind, *inputs), (output,) = (side.split() for side in one.split(">"))
        nodes.append(helper.make_node(kind, inputs, [output], name=output))
    edges = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2, 3]), ("y", None))
    ]
    made = helper.make_graph(nodes, "g", edges[:1], edges[1:], [two, three, axes])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)])


@pytest.mark.parametrize(
    ("nodes", "wide"),
    [
        # From the square to where it meets x again, and no further.
        ("Pow x two > s; ReduceMean s axes > m; Sqrt m > r; Div x r > d; Relu d > y", "s m r d"),
        ("Mul x x > s; ReduceSum s axes > m; Add m two > a; Reciprocal a > r; Mul r x > d; Relu d > y", "s m a r d"),
        ("ReduceL2 x axes > r; Div x r > d; Relu d > y", "r d"),
        ("Pow x two > s; ReduceMean s axes > m; Mul m x > d; Add d two > y", "s m d"),
        ("ReduceSumSquare x axes > r; Relu r > y", "r"),
        # A square that nobody sums is an activation like any other, and other powers and products are too.
        ("Mul x x > s; Relu s > y", ""),
        ("Pow x three > s; ReduceMean s axes > m; Relu m > y", ""),
        ("Mul x two > s; ReduceMean s axes > m; Relu m > y", ""),
        # Beyond a function that is not of one value at a time nothing is known.
        ("Pow x two > s; ReduceMean s axes > m; Softmax m > p; Div x p > y", "s m"),
    ],
)
@pytest.mark.parametrize("fmt", [FP16, BF16], ids=lambda fmt: fmt.name)
def test_which_nodes_stay_wide(nodes, wide, fmt):
    _, report = convert_precision(graph(nodes), fmt)
    assert set(report.facts["wide"]) == set(wide.split())
