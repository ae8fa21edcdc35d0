"""Folds a per-channel affine into the convolution, transposed convolution or linear layer before it.

One rule for every norm and every arithmetic affine: batch norm, the library's own norms, constant multiplications and
additions all reach it as `Affine`. Walking the graph in order makes a chain fold link by link, because each fold leaves
the next affine right behind the linear operation.

Fold: exact for any padding, stride, dilation and grouping, because the affine acts on the output.
"""

from __future__ import annotations

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import fold_affine
from lowprec.export.folding.graph import Graph, Linear, Node
from lowprec.export.folding.rules.rule import Match, Rule, match_affine, refuse_not_finite, refuse_other_readers


def _find(node: Node) -> Match | None:
    match = match_affine(node)
    return match if match is not None and isinstance(match.source.op, Linear) else None


def _check(match: Match) -> str | None:
    return _refuse_other_axis(match) or refuse_other_readers(match) or refuse_not_finite(match)


def _refuse_other_axis(match: Match) -> str | None:
    linear = match.source.op
    assert isinstance(linear, Linear)
    if match.affine.axis is None:
        return None
    if match.affine.axis != linear.axis:
        return (
            f"'{match.node.label}' acts along axis {match.affine.axis} of a tensor with {len(match.node.shape)} axes, "
            f"but '{match.source.label}' makes its channels on axis {linear.axis}"
        )
    if match.affine.affine.channels != linear.channels:
        return (
            f"'{match.node.label}' has {match.affine.affine.channels} channels, "
            f"but '{match.source.label}' makes {linear.channels}"
        )
    return None


def _apply(graph: Graph, match: Match) -> str:
    linear = match.source.op
    assert isinstance(linear, Linear)
    scale_O, shift_O = match.affine.affine.scale, match.affine.affine.shift
    if match.affine.axis is None:
        scale_O, shift_O = scale_O.repeat(linear.channels), shift_O.repeat(linear.channels)
    weight, bias = fold_affine(linear.kind, linear.weight, linear.bias, ChannelAffine(scale_O, shift_O), linear.groups)
    graph.replace(match.source, Linear(linear.kind, weight, bias, linear.groups, linear.axis))
    graph.bypass(match.node)
    return f"folded into '{match.source.label}'"


AFFINE_AFTER_LINEAR = Rule(
    "affine-after-linear", "an affine goes into the conv or linear layer before it", _find, _check, _apply
)
