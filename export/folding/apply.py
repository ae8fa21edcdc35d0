"""Runs the fold rules over a traced network and says what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lowprec.export.folding.bake import bake_constants
from lowprec.export.folding.fx_read import read_graph
from lowprec.export.folding.fx_write import write_graph
from lowprec.export.folding.graph import Affine, Graph, LiveNorm, Node
from lowprec.export.folding.measure import Measured, Truth, range_losses, refuse_wrong, tensor_sizes
from lowprec.export.folding.module import FoldedModule
from lowprec.export.folding.program import NormLayer, Program
from lowprec.export.folding.rules.channel_gauges import ChannelGauges
from lowprec.export.folding.rules.rule import Rule
from lowprec.export.folding.trace import Traced
from lowprec.formats import FP16
from lowprec.report import ChangeReport


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One way to fold, and what it did to the numbers."""

    folded: FoldedModule
    report: ChangeReport
    measured: Measured


def fold_with_rules(traced: Traced, rules: Iterable[Rule]) -> tuple[FoldedModule, ChangeReport]:
    """Folds a traced network by `rules` in their order; `fold_traced` is this with the whole table.

    Where the result loses more to rounding in float32 than it may, shifts that are large against the tensors they would
    travel through are left where they are, from a hundred times as large on down to all of them.
    """
    program = traced.program.copy()
    baked = bake_constants(program)
    truth = Truth(traced.module, FoldedModule(program, traced.interface, torch.float32), traced.interface)
    rules = list(rules)
    attempt = _attempt(traced, program, rules, truth)
    if not attempt.measured.is_accepted and any(isinstance(rule, ChannelGauges) for rule in rules):
        sizes = tensor_sizes(program, truth.inputs)
        for limit in _LIMITS:
            cautious = [_limited(rule, limit, sizes) for rule in rules]
            attempt = _attempt(traced, program, cautious, truth)
            if attempt.measured.is_accepted:
                break
    refuse_wrong(attempt.measured, traced.declared)
    report = ChangeReport()
    _report_baked(baked, program.norms, report)
    report.changed += attempt.report.changed
    report.refused += attempt.report.refused
    report.facts.update(attempt.report.facts)
    return attempt.folded, report


# Shifts, in multiples of the rms of what they are added to, beyond which an affine stays where it is.
_LIMITS = (100.0, 10.0, 1.0, 0.0)


def _limited(rule: Rule, limit: float, sizes: dict[str, float]) -> Rule:
    return dataclasses.replace(rule, largest_shift=limit, sizes=sizes) if isinstance(rule, ChannelGauges) else rule


def _attempt(traced: Traced, baked: Program, rules: list[Rule], truth: Truth) -> _Attempt:
    program, report = baked.copy(), ChangeReport()
    view = read_graph(program)
    norms = _norm_calls(view.graph.nodes)
    refused = run_rules(view.graph, rules, report)
    write_graph(program, view)
    program.settle_names()
    left = _report_left(view.graph, program.norms, refused, norms, report)
    wide = FoldedModule(program, traced.interface, torch.float64, shares=True)
    folded = FoldedModule(program, traced.interface, traced.source_dtype)
    narrow = folded if traced.source_dtype is torch.float32 else FoldedModule(program, traced.interface, torch.float32)
    measured = truth.measure(wide, narrow)
    report.facts.update(
        float64_error=measured.float64_error,
        float32_error_ratio=measured.float32_error_ratio,
        norms_found=len(norms),
        norms_folded=len(norms) - left,
        norms_left=left,
        fp16_range=range_losses(folded, FP16),
    )
    return _Attempt(folded, report, measured)


def run_rules(graph: Graph, rules: list[Rule], report: ChangeReport) -> dict[Node, str]:
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
    layers: dict[str, NormLayer],
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
    for node in nodes:
        if node in refused:
            return refused[node]
    return "computes its statistics from what it is given, so no constants stand for it"


def _report_baked(baked: dict[str, list[str]], norms: dict[str, NormLayer], report: ChangeReport) -> None:
    """One row per module whose constants were computed once; a norm's own arithmetic is part of its fold."""
    rows: dict[str, list[str]] = {}
    for path, operations in baked.items():
        if path not in norms:
            rows.setdefault(path.partition(".parametrizations")[0], []).extend(operations)
    for path, operations in rows.items():
        report.change(path or "network", f"constants computed once in float64 ({', '.join(dict.fromkeys(operations))})")
