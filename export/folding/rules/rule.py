"""What a fold rule is: something that goes over a graph, edits it, and says what it did and why it did not do more.

Most rules look at one node and the one before it and are three functions that find a place, say why not, and do it
(`LocalRule`); frozen records of functions rather than a base class, since a rule has no state and nothing to inherit.
One rule looks at the whole graph at once (`channel_gauges.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lowprec.export.folding.graph import Affine, Graph, Node


@dataclass
class Done:
    """What a rule did.

    Args:
        changed: for each fold the node's label, its norm's call if any, and a sentence.
        refused: for each node that the rule is about and left alone, a sentence saying why.
    """

    changed: list[tuple[str, str | None, str]] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)


class Rule(Protocol):
    """One fold."""

    @property
    def name(self) -> str:
        """Its name in reports and tests."""

    @property
    def summary(self) -> str:
        """One line."""

    def run(self, graph: Graph) -> Done:
        """Applies the rule wherever it holds; edits the graph."""


@dataclass(frozen=True)
class Match:
    """A node and the one before it that a local rule works on.

    Args:
        source: the node whose result is read.
        node: the node that may go.
    """

    source: Node
    node: Node

    @property
    def affine(self) -> Affine:
        """The node's operation, where it is an affine."""
        assert isinstance(self.node.op, Affine)
        return self.node.op


@dataclass(frozen=True)
class LocalRule:
    """A rule that works on one place at a time, in order of evaluation, so that chains fold link by link.

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

    def run(self, graph: Graph) -> Done:
        """Goes over the whole graph once."""
        done = Done()
        for node in list(graph.nodes):
            match = self.find(node)
            if match is None:
                continue
            reason = self.check(match)
            if reason is not None:
                done.refused[node] = reason
                continue
            within_one_norm = node.norm is not None and node.norm == match.source.norm
            label, norm, sentence = node.label, node.norm, self.apply(graph, match)
            if not within_one_norm:
                done.changed.append((label, norm, sentence))
        return done


def match_affine(node: Node) -> Match | None:
    """The match of any affine with one pair of constants per channel that reads one other node."""
    if isinstance(node.op, Affine) and node.op.is_per_channel and len(node.inputs) == 1:
        return Match(node.inputs[0], node)
    return None


def refuse_other_readers(match: Match) -> str | None:
    """A sentence if anything but the node reads the source's output, which the fold would change."""
    others = [user for user in match.source.users if user is not match.node]
    if not others:
        return None
    if any(user.is_output for user in others):
        return f"the output of '{match.source.label}' is also an output of the network, which the fold would change"
    return f"the output of '{match.source.label}' is also read by '{others[0].label}' ({others[0].kind})"
