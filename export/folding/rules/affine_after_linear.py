"""Folds a per-channel affine into the convolution, transposed convolution, linear layer or embedding before it.

One rule for every norm and every arithmetic affine: batch norm, the library's own norms, constant multiplications and
additions all reach it as `Affine`. Walking the graph in order makes a chain fold link by link, because each fold leaves
the next affine right behind the linear operation. A scale of zero folds like any other, which it does nowhere else.

Fold: exact for any padding, stride, dilation and grouping, because the affine acts on the output.
"""

from __future__ import annotations

from lowprec.export.folding.algebra import fold_affine
from lowprec.export.folding.graph import Graph, Linear, Node
from lowprec.export.folding.rules.rule import (
    LocalRule,
    Match,
    match_affine,
    refuse_other_readers,
)


def _find(node: Node) -> Match | None:
    match = match_affine(node)
    return match if match is not None and isinstance(match.source.op, Linear) else None


def _check(match: Match) -> str | None:
    return _refuse_other_axis(match) or refuse_other_readers(match) or match.node.why_not_finite


def _refuse_other_axis(match: Match) -> str | None:
    linear = match.source.op
    assert isinstance(linear, Linear)
    axes = match.affine.axes
    if axes and axes != (linear.axis,):
        return (
            f"'{match.node.label}' acts along axis {axes[0]} of a tensor with {len(match.node.shape)} axes, "
            f"but '{match.source.label}' makes its channels on axis {linear.axis}"
        )
    return None


def _apply(graph: Graph, match: Match) -> str:
    linear = match.source.op
    assert isinstance(linear, Linear)
    affine = match.affine.per_channel(linear.channels)
    weight, bias = fold_affine(linear.kind, linear.stored, linear.bias, affine, linear.groups)
    graph.replace(match.source, linear.with_constants(weight, bias))
    graph.bypass(match.node)
    return f"folded into '{match.source.label}'"


AFFINE_AFTER_LINEAR = LocalRule(
    "affine-after-linear", "an affine goes into the linear operation before it", _find, _check, _apply
)
