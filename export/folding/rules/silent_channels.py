"""Moves the zeros of a norm's scale into the linear operation that makes those channels.

A channel that is multiplied by zero is a constant, whatever came before, and nothing behind the norm can undo a zero.
So the zero goes where it does no harm: the rows of the linear operation that make the channel become zero, the norm's
scale there becomes one, and the norm can go like any other. Only where nobody else sees the channel on its way.

Fold: exact, because everything on that way maps zero to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import fold_affine
from lowprec.export.folding.gauges.constraints import Constraints, Wish
from lowprec.export.folding.graph import Affine, Graph, Linear, Movement, Node, Through
from lowprec.export.folding.rules.rule import Done


@dataclass(frozen=True)
class SilentChannels:
    """The rule."""

    name: str = "silent-channels"
    summary: str = "a scale of zero becomes rows of zeros in the linear operation before it"

    def run(self, graph: Graph) -> Done:
        """Goes over the whole graph once."""
        done = Done()
        candidates = [node for node in graph.nodes if isinstance(node.op, Affine) and (node.op.scale == 0).any()]
        if not candidates:
            return done
        constraints = Constraints(graph)
        for wish in constraints.wishes:
            maker = _maker(constraints, wish.node) if wish.node in candidates else None
            if maker is not None and (count := _silence(graph, constraints, wish, maker)):
                sentence = f"{count} channels with a scale of zero became zero in '{maker.label}'"
                done.changed.append((wish.node.label, wish.node.norm, sentence))
        return done


def _maker(constraints: Constraints, node: Node) -> Node | None:
    """The linear operation whose result only this affine sees, by way of operations that keep zeros zero.

    They must not combine channels either, because a zero one would then be seen through another.
    """
    source = node.inputs[0]
    while source.users == [node]:
        if isinstance(source.op, Linear):
            return source
        if not isinstance(source.op, Movement | Through) or len(source.inputs) != 1:
            return None
        if isinstance(source.op, Through):
            labels = constraints.input_labels(source)
            if any(labels.shape[axis] > 1 for axis in source.op.mixes):
                return None
        node, source = source, source.inputs[0]
    return None


def _silence(graph: Graph, constraints: Constraints, wish: Wish, maker: Node) -> int:
    """Moves the zeros of one affine; how many channels."""
    _, own = constraints.channel_labels(maker)
    silent = np.setdiff1d(wish.before[wish.scale == 0], wish.before[wish.scale != 0])
    op, affine = maker.op, wish.node.op
    assert isinstance(op, Linear)
    assert isinstance(affine, Affine)
    rows = np.isin(own, silent)
    if not rows.any():
        return 0
    keep = ChannelAffine.of(~rows, np.zeros(len(rows)))
    weight, bias = fold_affine(op.kind, op.stored, op.bias, keep, op.groups)
    graph.replace(maker, op.with_constants(weight, None if op.bias is None else bias))
    moved = (affine.scale == 0) & np.isin(constraints.input_labels(wish.node), silent)
    graph.replace(wish.node, Affine(np.where(moved, 1.0, affine.scale), affine.shift))
    return int(rows.sum())


SILENT_CHANNELS = SilentChannels()
