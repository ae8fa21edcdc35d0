"""The neutral graph that fold rules read and edit.

Rules know of an operation what it lets a per-channel scale and shift do, and who reads whose output. They never see
torch.fx or ONNX; an adapter reads such a graph into these nodes and writes the edits back (`traced/`,
`from_onnx/`). The obvious alternative, matching patterns on torch.fx itself, ties every rule to the spelling of
one exporter and would have to be written again for ONNX files.

A node of which nothing is known is `Opaque`: nothing is assumed about it, so nothing is moved across it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import Array, LinearKind, Stored, Window, output_channels

Labels = NDArray[np.int64]
"""Which gauge each channel of a tensor has: of the tensor's rank, length 1 along axes on which it does not vary."""

Move = Callable[[Sequence["Labels | tuple[Labels, ...]"]], "Labels | tuple[Labels, ...] | None"]


@dataclass(frozen=True, eq=False)
class Linear:
    """A convolution, transposed convolution, linear layer or embedding with constant weights.

    Args:
        kind: which.
        stored: the weight in torch's layout of that kind, in any floating type or not yet multiplied out.
        bias: (O,) float64, or None.
        groups: 1 for a linear layer.
        axis: which axis of the output holds the channels.
        window: stride, padding and dilation of a convolution, None for the others.
    """

    kind: LinearKind
    stored: Stored
    bias: Array | None
    groups: int
    axis: int
    window: Window | None = None

    @property
    def weight(self) -> Array:
        """The weight in float64."""
        return np.asarray(self.stored, np.float64)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return output_channels(self.kind, self.stored, self.groups)

    def with_constants(self, weight: Stored, bias: Array | None) -> Linear:
        """The same operation with another weight and bias."""
        return dataclasses.replace(self, stored=weight, bias=bias)

    @property
    def spreads_shift_evenly(self) -> bool:
        """Whether a constant added to an input channel adds a constant to each output channel, borders included."""
        if self.kind == "conv_transpose":
            return all(length == 1 for length in self.stored.shape[2:]) and self.window == Window.plain(
                self.stored.ndim - 2
            )
        return self.window is None or not self.window.pads


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift with constants.

    Args:
        scale: float64, of the tensor's rank; length 1 along axes on which it does not vary.
        shift: likewise.
    """

    scale: Array
    shift: Array

    @classmethod
    def along(cls, axis: int | None, rank: int, affine: ChannelAffine) -> Affine:
        """One pair of constants per channel on `axis`, or one pair for all where `axis` is None."""
        shape = [1] * rank
        if axis is not None:
            shape[axis] = affine.channels
        return cls(affine.scale.reshape(shape), affine.shift.reshape(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of both constants together."""
        return np.broadcast_shapes(self.scale.shape, self.shift.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes on which the constants vary."""
        return tuple(axis for axis, length in enumerate(self.shape) if length > 1)

    @property
    def is_per_channel(self) -> bool:
        """Whether the constants vary along one axis at most."""
        return len(self.axes) <= 1

    @property
    def is_finite(self) -> bool:
        """Whether every constant is finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def is_identity(self) -> bool:
        """Whether y = x exactly."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def per_channel(self, channels: int) -> ChannelAffine:
        """The constants as one pair per channel; only where `is_per_channel`."""
        return ChannelAffine(*(np.broadcast_to(part.reshape(-1), channels).copy() for part in (self.scale, self.shift)))

    def then(self, later: Affine) -> Affine:
        """The affine that applies `self` first and `later` after it."""
        return Affine(later.scale * self.scale, later.scale * self.shift + later.shift)


@dataclass(frozen=True)
class Through:
    """An operation that scales and shifts pass, some of them: op(S x + T) = S op(x) + T.

    Args:
        positive: whether that holds for S > 0 only (ReLU, max-pool) or for any S (means, pools, interpolation).
        shift: whether it holds for any T, or for T = 0 only (ReLU, a pool that counts its padding).
        mixes: axes along which elements are combined, on which S and T must not vary.
        drops: whether those axes are gone from the result.
    """

    positive: bool
    shift: bool
    mixes: tuple[int, ...] = ()
    drops: bool = False


@dataclass(frozen=True)
class Movement:
    """Elements are moved, repeated or selected and none is changed (reshape, concat, split, shuffle).

    Args:
        move: the operation on the inputs' labels, one entry per input; None where the result depends on the length of a
            free axis. Several results come as a tuple.
    """

    move: Move


@dataclass(frozen=True)
class ZeroPad:
    """Zeros are put around a tensor.

    Args:
        widths: (before, after) for each axis, not negative.
    """

    widths: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sum:
    """coefficients[0] * input 0 + coefficients[1] * input 1 + ... of tensors that the network computes."""

    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Product:
    """input 0 * input 1 of tensors that the network computes, or input 0 / input 1.

    Args:
        divides: whether it is the quotient.
    """

    divides: bool = False


@dataclass(frozen=True)
class MatrixProduct:
    """input 0 @ input 1 of tensors that the network computes, each of two axes or more.

    Args:
        means: whether the rows of input 0 add up to one, as a softmax's do, so that a shift of input 1 passes.
    """

    means: bool = False


@dataclass(frozen=True)
class Attention:
    """Weighted means of the rows of input 2, whose weights are made of the other inputs."""


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


Op = Linear | Affine | Through | Movement | ZeroPad | Sum | Product | MatrixProduct | Attention | LiveNorm | Opaque


@dataclass(eq=False)
class Node:
    """One operation of a network.

    Args:
        name: unique name in the graph.
        kind: the operation's name, for messages (`relu`).
        path: module path that made it (`layer1.0.bn1`), empty at the root.
        op: what the rules know about it.
        shape: output shape, None for an axis that is not fixed; empty where the result is no tensor.
        is_float: whether the result holds floating-point values.
        inputs: nodes whose *values* it reads, once per reading; constants and reads of the shape alone are not listed.
        users: the nodes that list it among their inputs, once per reading.
        norm: which norm layer's call it belongs to, if any.
        is_output: whether it stands for the network's result.
    """

    name: str
    kind: str
    path: str
    op: Op
    shape: tuple[int | None, ...] = ()
    is_float: bool = True
    inputs: list[Node] = field(default_factory=list, repr=False)
    users: list[Node] = field(default_factory=list, repr=False)
    norm: str | None = None
    is_output: bool = False

    @property
    def why_not_finite(self) -> str | None:
        """A sentence if it is an affine with a constant that is not finite."""
        if not isinstance(self.op, Affine) or self.op.is_finite:
            return None
        return f"the constants of '{self.label}' are not finite; a running variance may be zero, negative or NaN"

    @property
    def label(self) -> str:
        """How messages call it: the module path, or the operation's name where the root itself computes it."""
        return self.path or self.name


class Graph:
    """Nodes in order of evaluation, and the edits that folding needs.

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

    def forget(self) -> None:
        """Lets go of every operation's constants."""
        for node in (*self.nodes, *self.bypassed, *self.changed):
            node.op = Opaque()
        self.changed.clear()

    def replace(self, node: Node, op: Linear | Affine) -> None:
        """Gives a node other constants; other calls that share the old ones keep theirs."""
        node.op = op
        self.changed[node] = op

    def replace_by_affine(self, node: Node, affine: Affine, source: Node) -> None:
        """Makes a node an affine of `source`, whatever it was."""
        self._forget_inputs(node)
        node.inputs = [source]
        source.users.append(node)
        self.replace(node, affine)

    def bypass(self, node: Node, source: Node | None = None) -> None:
        """Takes out a node: whoever read it now reads `source`, by default its only input."""
        if source is None:
            (source,) = node.inputs
        source.users += node.users
        for user in node.users:
            user.inputs = [source if value is node else value for value in user.inputs]
        node.users = []
        self.bypassed[node] = source
        self._drop(node)

    def _drop(self, node: Node) -> None:
        """Removes a node that nobody reads, and what only it read."""
        self.nodes.remove(node)
        self.changed.pop(node, None)
        for value in self._forget_inputs(node):
            if not value.users and not value.is_output and value.inputs:
                self._drop(value)

    @staticmethod
    def _forget_inputs(node: Node) -> list[Node]:
        gone = list(dict.fromkeys(node.inputs))
        for value in gone:
            value.users = [user for user in value.users if user is not node]
        node.inputs = []
        return gone
