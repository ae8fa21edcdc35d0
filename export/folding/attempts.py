"""Runs the fold rules over a neutral graph, says what they did, and tries again with care where they did too much.

All of it works on the neutral graph alone; how a network is read, written and run is the adapter's, which hands in one
function per attempt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from numpy.typing import NDArray

from lowprec.export.folding.accuracy import Measured, range_losses
from lowprec.export.folding.gauges.balance import Show, balance, in_trouble
from lowprec.export.folding.graph import Affine, Graph, LiveNorm, Node, Opaque
from lowprec.export.folding.rules.channel_gauges import ChannelGauges
from lowprec.export.folding.rules.rule import Rule
from lowprec.formats import FP16, FloatFormat
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from lowprec.export.folding.traced.program import NormLayer

T = TypeVar("T")

# Shifts, in multiples of the rms of what they are added to, beyond which an affine stays where it is; at last all stay.
_LIMITS = (100.0, 10.0, 1.0, 0.0, -1.0)


@dataclass(frozen=True, eq=False)
class Attempt(Generic[T]):
    """One way to fold, and what it did to the numbers.

    Args:
        folded: the folded network.
        report: what was folded and what was not.
        measured: errors.
    """

    folded: T
    report: ChangeReport
    measured: Measured

    @classmethod
    def judged(
        cls, folded: T, report: ChangeReport, measured: Measured, weights: Iterable[tuple[str, NDArray[Any]]]
    ) -> Attempt[T]:
        """An attempt whose report also says how exact it is, and what half precision would do to its `weights`."""
        report.facts.update(
            float64_error=measured.float64_error,
            float32_error_ratio=measured.float32_error_ratio,
            fp16_range=range_losses(weights, FP16),
        )
        return cls(folded, report, measured)


def best_attempt(
    rules: Iterable[Rule], attempt: Callable[[list[Rule]], Attempt[T]], sizes: Callable[[], dict[str, float]]
) -> Attempt[T]:
    """Folds by all rules, or with care where that loses more to rounding in float32 than it may.

    Shifts that are large against the tensors they would travel through are then left where they are, from a hundred
    times as large on down to all of them. Where nothing helps, the attempt that loses least is the result.

    Args:
        rules: in order of application.
        attempt: folds by a list of rules.
        sizes: rms of every float tensor of the network, by node; called at most once.
    """
    rules = list(rules)
    found = attempt(rules)
    if found.measured.is_accepted or not any(isinstance(rule, ChannelGauges) for rule in rules):
        return found
    measured_sizes, attempts = sizes(), [found]
    for limit in _LIMITS:
        attempts.append(attempt([_limited(rule, limit, measured_sizes) for rule in rules]))
        if attempts[-1].measured.is_accepted:
            return attempts[-1]
    return min(attempts, key=lambda tried: tried.measured.loss)


def _limited(rule: Rule, limit: float, sizes: dict[str, float]) -> Rule:
    return dataclasses.replace(rule, largest_shift=limit, sizes=sizes) if isinstance(rule, ChannelGauges) else rule


def fold_graph(graph: Graph, rules: Iterable[Rule], layers: Mapping[str, NormLayer]) -> ChangeReport:
    """Folds a graph in place and reports it: a row per fold, a row per norm and other affine that stays.

    Args:
        graph: as it was read.
        rules: in order of application.
        layers: norm layers by module path, as far as they are known.

    Returns:
        The report, with the facts `norms_found`, `norms_folded` and `norms_left`.
    """
    report = ChangeReport()
    norms = _norm_calls(graph.nodes)
    refused = _run_rules(graph, list(rules), report)
    left = _report_left(graph, layers, refused, norms, report)
    report.facts.update(norms_found=len(norms), norms_folded=len(norms) - left, norms_left=left)
    return report


def balance_graph(graph: Graph, show: Show, fmt: FloatFormat, report: ChangeReport) -> None:
    """Moves constants into a format's range where a scale may pass, and reports those moved and those still outside.

    Args:
        graph: folded; edited in place.
        show: see `balance`.
        fmt: the narrow format.
        report: gets the rows.
    """
    moved = balance(graph, show, fmt)
    for label in dict.fromkeys(node.label for node in moved):
        report.change(label, f"rescaled by powers of two, so that {fmt.name} holds its constants")
    for node in graph.nodes:
        if in_trouble(node, fmt):
            report.refuse(
                node.label,
                f"some of its constants leave {fmt.name}'s range, and no power of two brings them in that would not "
                f"take others out",
            )


def report_baked(baked: Mapping[str, list[str]], layers: Mapping[str, NormLayer], report: ChangeReport) -> None:
    """One row per module whose constants were computed once; a norm's own arithmetic is part of its fold."""
    rows: dict[str, list[str]] = {}
    for path, operations in baked.items():
        if path not in layers:
            rows.setdefault(path.partition(".parametrizations")[0], []).extend(operations)
    for path, operations in rows.items():
        report.change(path or "network", f"constants computed once in float64 ({', '.join(dict.fromkeys(operations))})")


def _run_rules(graph: Graph, rules: list[Rule], report: ChangeReport) -> dict[Node, str]:
    """Applies the rules to the whole graph; a change by any but the last sends it back to the first.

    Args:
        graph: edited in place.
        rules: in order of application.
        report: gets a row per fold; several folds of one norm call are one row.

    Returns:
        The last refusal at each node that is still there.
    """
    refused: dict[Node, str] = {}
    told: set[tuple[str, str]] = set()
    position = 0
    while position < len(rules):
        done = rules[position].run(graph)
        for label, norm, sentence in done.changed:
            if (norm or label, sentence) not in told:
                told.add((norm or label, sentence))
                report.change(label, sentence)
        refused.update(done.refused)
        again = bool(done.changed) and 0 < position < len(rules) - 1
        position = 0 if again else position + 1
    here = set(graph.nodes)
    return {node: reason for node, reason in refused.items() if node in here}


def _norm_calls(nodes: Iterable[Node]) -> dict[str, Node]:
    """One node for each call of a norm layer, by the call's name."""
    calls: dict[str, Node] = {}
    for node in nodes:
        if node.norm is not None:
            calls.setdefault(node.norm, node)
    return calls


def _report_left(
    graph: Graph,
    layers: Mapping[str, NormLayer],
    refused: dict[Node, str],
    norms: dict[str, Node],
    report: ChangeReport,
) -> int:
    """Adds one row per norm call that is still in the graph and per refused affine; returns how many norms are left."""
    left: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.norm is not None:
            left.setdefault(node.norm, []).append(node)
        elif node in refused:
            report.refuse(node.label, refused[node])
    remaining = {call: nodes for call, nodes in left.items() if _is_left(nodes)}
    for nodes in remaining.values():
        report.refuse(nodes[0].label, _reason(nodes, layers.get(nodes[0].path), refused))
    folded_away = [call for call in norms if call not in remaining]
    return len(norms) - len(folded_away)


def _is_left(nodes: list[Node]) -> bool:
    """Whether what is left of a norm call still normalises; an activation inside of a norm layer does not."""
    return any(isinstance(node.op, (Affine, LiveNorm)) for node in nodes)


def _reason(nodes: list[Node], layer: NormLayer | None, refused: dict[Node, str]) -> str:
    for node in nodes:
        if isinstance(node.op, LiveNorm):
            return node.op.reason
    if layer is not None and layer.training:
        return "is in training mode, so its statistics still change; call model.eval() before fold(model)"
    # The constants of a norm with opaque operations (a square, a root) are only parts of it.
    whole = not any(isinstance(node.op, Opaque) for node in nodes)
    for node in nodes:
        if whole and node in refused:
            return refused[node]
    return "computes its statistics from what it is given, so no constants stand for it"
