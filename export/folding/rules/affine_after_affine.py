"""Merges per-channel affines that follow one another and have no linear operation to go into.

Last in the table: what could fold into weights is gone by then. Two affines in a row are one, whose cost is one pass
over the tensor; left alone they would be two norms, or a multiplication and an addition.
"""

from __future__ import annotations

from lowprec.affine import ChannelAffine
from lowprec.export.folding.graph import Affine, Graph, Node
from lowprec.export.folding.rules.rule import Match, Rule, match_affine, refuse_not_finite, refuse_other_readers

# The merged affine is written as a batch norm with mean 0 and variance 1, whose channels are on axis 1.
_CHANNEL_AXIS = 1


def _find(node: Node) -> Match | None:
    match = match_affine(node)
    if match is None or not isinstance(match.source.op, Affine) or len(match.source.inputs) != 1:
        return None
    return match if {match.affine.axis, match.source.op.axis} <= {None, _CHANNEL_AXIS} else None


def _check(match: Match) -> str | None:
    if len(match.node.shape) <= _CHANNEL_AXIS or match.node.shape[_CHANNEL_AXIS] is None:
        return f"the number of channels at '{match.node.label}' is not fixed"
    first = match_affine(match.source)
    assert first is not None
    return refuse_other_readers(match) or refuse_not_finite(first) or refuse_not_finite(match)


def _apply(graph: Graph, match: Match) -> str:
    first = match.source.op
    channels = match.node.shape[_CHANNEL_AXIS]
    assert isinstance(first, Affine)
    assert channels is not None
    before = match.source.label
    merged = _spread(first.affine, channels).then(_spread(match.affine.affine, channels))
    graph.replace(match.source, Affine(merged, _CHANNEL_AXIS))
    graph.bypass(match.node)
    if match.source.norm is None:
        # What is left is a norm if either was one, and the report accounts for it under that name.
        match.source.norm, match.source.path = match.node.norm, match.node.path
    return f"merged with '{before}'"


def _spread(affine: ChannelAffine, channels: int) -> ChannelAffine:
    """The same affine with one pair of numbers per channel."""
    if affine.channels == channels:
        return affine
    return ChannelAffine(affine.scale.repeat(channels), affine.shift.repeat(channels))


AFFINE_AFTER_AFFINE = Rule("affine-after-affine", "affines in a row become one", _find, _check, _apply)
