"""Merges affines that follow one another and have no linear operation to go into.

Two affines in a row are one, whose cost is one pass over the tensor; left alone they would be two norms, or a
multiplication and an addition.
"""

from __future__ import annotations

import numpy as np

from lowprec.export.folding.graph import Affine, Graph, Node
from lowprec.export.folding.rules.rule import (
    LocalRule,
    Match,
    match_affine,
    refuse_other_readers,
)


def _find(node: Node) -> Match | None:
    match = match_affine(node)
    if match is None or not isinstance(match.source.op, Affine) or len(match.source.inputs) != 1:
        return None
    together = np.broadcast_shapes(match.affine.shape, match.source.op.shape)
    return match if sum(length > 1 for length in together) <= 1 else None


def _check(match: Match) -> str | None:
    return refuse_other_readers(match) or match.source.why_not_finite or match.node.why_not_finite


def _apply(graph: Graph, match: Match) -> str:
    first = match.source.op
    assert isinstance(first, Affine)
    before = match.source.label
    graph.replace(match.source, first.then(match.affine))
    graph.bypass(match.node)
    if match.source.norm is None:
        # What is left is a norm if either was one, and the report accounts for it under that name.
        match.source.norm, match.source.path = match.node.norm, match.node.path
    return f"merged with '{before}'"


AFFINE_AFTER_AFFINE = LocalRule("affine-after-affine", "affines in a row become one", _find, _check, _apply)
