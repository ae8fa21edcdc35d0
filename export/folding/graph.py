"""The neutral graph that fold rules read and edit.

Rules know three things about a network: which operations are linear with constant weights, which are per-channel
affines, and who reads whose output. They never see torch.fx or ONNX; an adapter reads such a graph into these nodes and
writes the edits back (`fx_graph.py`). The obvious alternative, matching patterns on torch.fx itself, ties every rule to
the spelling of one exporter and would have to be written again for ONNX files.

A node that is neither is `Opaque`: nothing is assumed about it, so nothing is moved across it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import Array, LinearKind, output_channels


@dataclass(frozen=True, eq=False)
class Linear:
    """A convolution, transposed convolution or linear layer with constant weights.

    Args:
        kind: which.
        weight: float64, in torch's layout of that kind.
        bias: (O,) float64, or None.
        groups: 1 for a linear layer.
        axis: which axis of the output holds the channels.
    """

    kind: LinearKind
    weight: Array
    bias: Array | None
    groups: int
    axis: int

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return output_channels(self.kind, self.weight, self.groups)


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift, per channel or with one pair of numbers for all.

    Args:
        affine: one pair, or one per channel.
        axis: the channel axis; None when one pair serves every element.
    """

    affine: ChannelAffine
    axis: int | None

    @property
    def is_finite(self) -> bool:
        """Whether every constant is finite."""
        return bool(np.isfinite(self.affine.scale).all() and np.isfinite(self.affine.shift).all())

    @property
    def is_identity(self) -> bool:
        """Whether y = x exactly."""
        return bool((self.affine.scale == 1).all() and (self.affine.shift == 0).all())


@dataclass(frozen=True)
class LiveNorm:
    """A norm whose statistics come from what it is given, so that no constant stands for it.

    Args:
        reason: a sentence saying why.
    """

    reason: str


@dataclass(frozen=True)
class Opaque:
    """Any other operation."""


Op = Linear | Affine | LiveNorm | Opaque


@dataclass(eq=False)
class Node:
    """One operation of a network.

    Args:
        name: unique name in the graph.
        kind: the operation's name, for messages (`relu`).
        path: module path that made it (`layer1.0.bn1`), empty at the root.
        op: what the rules know about it.
        shape: output shape, None for an axis that is not fixed.
        inputs: nodes whose *values* it reads; constants and reads of the shape alone are not listed.
        users: the nodes that list it among their inputs, once per reading.
        norm: which norm layer's call it belongs to, if any.
        is_output: whether it stands for the network's result.
    """

    name: str
    kind: str
    path: str
    op: Op
    shape: tuple[int | None, ...] = ()
    inputs: list[Node] = field(default_factory=list, repr=False)
    users: list[Node] = field(default_factory=list, repr=False)
    norm: str | None = None
    is_output: bool = False

    @property
    def label(self) -> str:
        """How messages call it: the module path, or the operation's name where the root itself computes it."""
        return self.path or self.name


class Graph:
    """Nodes in order of evaluation, and the two edits that folding needs.

    Args:
        nodes: in order of evaluation.

    Attributes:
        changed: nodes whose `op` was replaced, with the last replacement, for the adapter that writes them back.
        bypassed: nodes that were taken out and the node that now stands for each, in order.
    """

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.changed: dict[Node, Op] = {}
        self.bypassed: dict[Node, Node] = {}

    def replace(self, node: Node, op: Linear | Affine) -> None:
        """Gives a node other constants; other calls that share the old ones keep theirs."""
        node.op = op
        self.changed[node] = op

    def bypass(self, node: Node) -> None:
        """Takes out a node with one input: whoever read it now reads that input."""
        (source,) = node.inputs
        source.users = [user for user in source.users if user is not node] + node.users
        for user in node.users:
            user.inputs = [source if value is node else value for value in user.inputs]
        node.users = []
        self.nodes.remove(node)
        self.changed.pop(node, None)
        self.bypassed[node] = source
