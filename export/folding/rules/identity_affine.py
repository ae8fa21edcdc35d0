"""Takes out affines that change nothing, such as a multiplication by a branch scalar of one.

First in the table, so that the other rules never scale a weight by one and report it as a fold.
"""

from __future__ import annotations

from lowprec.export.folding.graph import Graph, Node
from lowprec.export.folding.rules.rule import LocalRule, Match, match_affine


def _find(node: Node) -> Match | None:
    match = match_affine(node)
    # A norm whose constants happen to be 1 and 0 is still a norm that the report accounts for.
    return match if match is not None and match.affine.is_identity and node.norm is None else None


def _check(match: Match) -> str | None:
    return None


def _apply(graph: Graph, match: Match) -> str:
    graph.bypass(match.node)
    return "removed: it multiplies by one and adds zero"


IDENTITY_AFFINE = LocalRule("identity-affine", "an affine that changes nothing is removed", _find, _check, _apply)
