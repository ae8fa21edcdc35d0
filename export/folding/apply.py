"""Runs the fold rules over a traced network and says what they did."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lowprec.export.folding.bake import bake_constants
from lowprec.export.folding.fx_graph import read_graph, write_graph
from lowprec.export.folding.graph import Affine, Graph, Linear, LiveNorm, Node
from lowprec.export.folding.measure import check_float64, check_inputs, float32_error_ratio, range_losses
from lowprec.export.folding.module import FoldedModule
from lowprec.export.folding.program import NormLayer
from lowprec.export.folding.rules.rule import Rule
from lowprec.export.folding.trace import Traced
from lowprec.formats import FP16
from lowprec.report import ChangeReport


def fold_with_rules(traced: Traced, rules: Iterable[Rule]) -> tuple[FoldedModule, ChangeReport]:
    """Folds a traced network by `rules` in their order; `fold_traced` is this with the whole table."""
    program = traced.program.copy()
    report = ChangeReport()
    _report_baked(bake_constants(program), program.norms, report)
    view = read_graph(program)
    norms = _norm_calls(view.graph.nodes)
    refused = run_rules(view.graph, rules, report)
    write_graph(program, view)
    program.settle_names()
    left = _report_left(view.graph, program.norms, refused, norms, report)
    folded = FoldedModule(program, traced.interface, traced.source_dtype)
    wide = FoldedModule(program, traced.interface, torch.float64)
    inputs = check_inputs(traced.module)
    narrow = [FoldedModule(source, traced.interface, torch.float32) for source in (traced.program, program)]
    report.facts.update(
        float64_error=check_float64(traced.module, wide, inputs, traced.declared),
        float32_error_ratio=float32_error_ratio(traced.module, narrow[0], narrow[1], inputs),
        norms_found=len(norms),
        norms_folded=len(norms) - left,
        norms_left=left,
        fp16_range=range_losses(folded, FP16),
    )
    return folded, report


def run_rules(graph: Graph, rules: Iterable[Rule], report: ChangeReport) -> dict[Node, str]:
    """Applies each rule to the whole graph, in order of evaluation, so that chains fold link by link.

    Args:
        graph: edited in place.
        rules: in order of application.
        report: gets a row per fold; several folds of one norm call are one row.

    Returns:
        The first refusal at each node that is still there.
    """
    refused: dict[Node, str] = {}
    told: set[tuple[str, str]] = set()
    for rule in rules:
        for node in list(graph.nodes):
            match = rule.find(node)
            if match is None:
                continue
            reason = rule.check(match)
            if reason is not None:
                refused.setdefault(node, reason)
                continue
            refused.pop(node, None)
            key, within_one_norm = node.norm or node.label, node.norm is not None and node.norm == match.source.norm
            done = rule.apply(graph, match)
            if (key, done) not in told and not within_one_norm:
                told.add((key, done))
                report.change(node.label, done)
    return {node: reason for node, reason in refused.items() if node not in graph.bypassed}


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
    first = nodes[0]
    if not isinstance(first.op, Affine) or not first.inputs:
        return "computes its statistics from what it is given, so no constants stand for it"
    source = first.inputs[0]
    if isinstance(source.op, Linear):
        return f"no rule folds it into '{source.label}'"
    return (
        f"it follows '{source.label}' ({source.kind}); a norm folds right after a conv, transposed conv or linear layer"
    )


def _report_baked(baked: dict[str, list[str]], norms: dict[str, NormLayer], report: ChangeReport) -> None:
    """One row per module whose constants were computed once; a norm's own arithmetic is part of its fold."""
    rows: dict[str, list[str]] = {}
    for path, operations in baked.items():
        if path not in norms:
            rows.setdefault(path.partition(".parametrizations")[0], []).extend(operations)
    for path, operations in rows.items():
        report.change(path or "network", f"constants computed once in float64 ({', '.join(dict.fromkeys(operations))})")
