"""What a fold rule is: three functions that find a place, say why not, and do it.

A frozen record of functions rather than a base class: a rule has no state and nothing to inherit, and the table stays
one line per rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowprec.export.folding.graph import Affine, Graph, Node


@dataclass(frozen=True)
class Match:
    """A per-channel affine and the node before it.

    Args:
        source: the node that the affine reads.
        node: the affine.
        affine: the affine's operation.
    """

    source: Node
    node: Node
    affine: Affine


@dataclass(frozen=True)
class Rule:
    """One fold.

    Args:
        name: its name in reports and tests.
        summary: one line.
        find: the match at a node, or None where the rule has nothing to say.
        check: None if the match may be folded, else a sentence saying why not. Changes nothing.
        apply: edits the graph and returns a sentence saying what was done.
    """

    name: str
    summary: str
    find: Callable[[Node], Match | None]
    check: Callable[[Match], str | None]
    apply: Callable[[Graph, Match], str]


def match_affine(node: Node) -> Match | None:
    """The match of any per-channel affine that reads one other node."""
    if isinstance(node.op, Affine) and len(node.inputs) == 1:
        return Match(node.inputs[0], node, node.op)
    return None


def refuse_other_readers(match: Match) -> str | None:
    """A sentence if anything but the affine reads the source's output, which the fold would change."""
    others = [user for user in match.source.users if user is not match.node]
    if not others:
        return None
    if any(user.is_output for user in others):
        return f"the output of '{match.source.label}' is also an output of the network, which the fold would change"
    return f"the output of '{match.source.label}' is also read by '{others[0].label}' ({others[0].kind})"


def refuse_not_finite(match: Match) -> str | None:
    """A sentence if the affine has a constant that is not finite."""
    if match.affine.is_finite:
        return None
    return f"the constants of '{match.node.label}' are not finite; a running variance may be zero, negative or NaN"
