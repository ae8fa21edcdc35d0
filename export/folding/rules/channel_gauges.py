"""Lets norms disappear by storing the tensors around them differently: `lowprec.export.folding.gauges` says how.

The norm before a convolution, the norm on a residual stream, the norm over a concatenation: where no linear operation
stands right before an affine, its scale and shift travel to the linear operations that do stand somewhere, as far as
what lies between lets them pass.

Fold: exact, zero padding included, because a shift never passes a window that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowprec.export.folding.gauges.apply import apply_gauges
from lowprec.export.folding.gauges.constraints import Wish
from lowprec.export.folding.gauges.solve import solve
from lowprec.export.folding.graph import Affine, Graph, Linear, Node
from lowprec.export.folding.rules.rule import Done


@dataclass(frozen=True)
class ChannelGauges:
    """The rule.

    Args:
        largest_shift: affines whose shift over scale is beyond this many times the size of what they read stay where
            they are; infinite to move all, negative to move none.
        sizes: rms of every tensor, by node; needed with a limit.
    """

    largest_shift: float = math.inf
    sizes: Mapping[str, float] = field(default_factory=dict)
    name: str = "channel-gauges"
    summary: str = "scales and shifts travel to the linear operations that can take them"

    def run(self, graph: Graph) -> Done:
        """Moves everything that can be moved at once."""
        done = Done()
        affines = [node for node in graph.nodes if isinstance(node.op, Affine)]
        if not affines or self.largest_shift < 0:
            reason = "whatever is moved through this network costs it more than twice the precision in float32"
            done.refused.update((node, node.why_not_finite or reason) for node in affines)
            return done
        solution = solve(graph, self._refuse)
        for node in solution.granted:
            done.changed.append((node.label, node.norm, _told(node)))
        done.refused.update(solution.kept)
        apply_gauges(graph, solution)
        return done

    def _refuse(self, wish: Wish) -> str | None:
        if not wish.scale.all():
            return f"channel {int((wish.scale == 0).argmax())} has a scale of zero, so nothing behind it can undo it"
        if math.isinf(self.largest_shift):
            return None
        size = self.sizes.get(wish.node.inputs[0].name, 0.0)
        largest = float(abs(wish.shift / wish.scale).max(initial=0.0))
        if largest <= self.largest_shift * size:
            return None
        return (
            f"its shift over its scale is up to {largest:.3g}, on values of size {size:.3g}: moved through the network "
            f"it would cost more than twice the precision"
        )


def _told(node: Node) -> str:
    """Where the constants of an affine went."""
    names = list(dict.fromkeys(other.label for other in (*_linear(node, "users"), *_linear(node, "inputs"))))
    listed = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"folded into {listed}" if names else "passed on"


def _linear(node: Node, direction: str) -> list[Node]:
    """The nearest linear operations in one direction."""
    found: list[Node] = []
    seen, pending = {node}, list(getattr(node, direction))
    while pending:
        other = pending.pop(0)
        if other in seen:
            continue
        seen.add(other)
        if isinstance(other.op, Linear):
            found.append(other)
        else:
            pending += getattr(other, direction)
    return found


CHANNEL_GAUGES = ChannelGauges()
