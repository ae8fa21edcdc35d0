"""Counts what a folded network still does per channel, from its graph alone and without the report."""

from __future__ import annotations

import torch
from torch import fx

from lowprec.export.folding import FoldedModule

ARITHMETIC = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
}
CLAMPS = {torch.ops.aten.clamp.Tensor, torch.ops.aten.maximum.default, torch.ops.aten.minimum.default}
CONVOLUTIONS = {torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}
NORMS = {torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default}


def operations_left(folded: FoldedModule) -> list[str]:
    """Norms on running statistics, per-channel arithmetic and clamps with constants, depthwise 1x1 convolutions."""
    constants = dict(folded.network.named_parameters()) | dict(folded.network.named_buffers())
    found = []
    for node in folded.network.graph.nodes:
        values = [_constant(value, constants) for value in node.args[:2]]
        per_channel = any(value is not None and sum(length > 1 for length in value.shape) <= 1 for value in values)
        if (
            node.target in NORMS
            or (node.target in ARITHMETIC | CLAMPS and per_channel)
            or (node.target in CONVOLUTIONS and _is_depthwise_1x1(node, constants))
        ):
            found.append(node.name)
    return found


def convolutions(folded: FoldedModule) -> int:
    """How many convolutions and linear layers a network has."""
    return sum(node.target in CONVOLUTIONS | {torch.ops.aten.linear.default} for node in folded.network.graph.nodes)


def _constant(value: object, constants: dict[str, torch.Tensor]) -> torch.Tensor | None:
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    return constants[value.target] if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_depthwise_1x1(node: fx.Node, constants: dict[str, torch.Tensor]) -> bool:
    if node.target not in CONVOLUTIONS:
        return False
    weight = constants[node.args[1].target]
    groups = node.args[6] if len(node.args) > 6 else 1
    return weight.shape[0] == groups > 1 and weight[0].numel() == 1
