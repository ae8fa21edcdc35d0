"""Writes a per-channel affine of a sequence as arithmetic, which runtimes do faster there than a depthwise convolution.

Over images it is the other way round: onnxruntime's CPU keeps them in a blocked layout that a depthwise convolution
stays in and arithmetic leaves. `python -m tests.benchmarks.leftovers` measures both.
"""

from __future__ import annotations

import torch
from torch import fx, nn


def write_as_arithmetic(network: fx.GraphModule) -> None:
    """Replaces every depthwise convolution of length 1 over a sequence, in place.

    Args:
        network: a copy whose submodules nobody else holds.
    """
    for node in [node for node in network.graph.nodes if node.target is torch.ops.aten.conv1d.default]:
        if _is_affine(network, node):
            _replace(network, node)
    network.recompile()


def _is_affine(network: fx.GraphModule, node: fx.Node) -> bool:
    """y[n, c, l] = w[c] x[n, c, l] + b[c], with constants that nothing else reads."""
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False))
    constants = [value for value in (given["weight"], given.get("bias")) if value is not None]
    if any(not isinstance(value, fx.Node) or value.op != "get_attr" or len(value.users) > 1 for value in constants):
        return False
    weight = network.get_parameter(str(given["weight"].target))  # type: ignore[union-attr]
    plain = (given.get("stride", [1]), given.get("padding", [0])) == ([1], [0])
    return plain and tuple(weight.shape) == (given.get("groups", 1), 1, 1)


def _replace(network: fx.GraphModule, node: fx.Node) -> None:
    source, constants = node.all_input_nodes[0], node.args[1:3]
    with network.graph.inserting_before(node):
        for target, constant in zip((torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor), constants, strict=False):
            if isinstance(constant, fx.Node):
                _as_column(network, str(constant.target))
                source = network.graph.call_function(target, (source, constant))
                source.meta = dict(node.meta)
    node.replace_all_uses_with(source)
    network.graph.erase_node(node)


def _as_column(network: fx.GraphModule, name: str) -> None:
    """A parameter in the shape (C, 1), which broadcasts against (N, C, L)."""
    owner, _, leaf = name.rpartition(".")
    tensor = network.get_parameter(name)
    setattr(network.get_submodule(owner), leaf, nn.Parameter(tensor.detach().reshape(-1, 1), requires_grad=False))
