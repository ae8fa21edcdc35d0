"""Folds a traced network: reads it into the neutral graph, lets the rules work there, and writes the edits back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from lowprec.export.folding.accuracy import Measured, Run, Truth, refuse_wrong
from lowprec.export.folding.attempts import Attempt, balance_graph, best_attempt, fold_graph, report_baked
from lowprec.export.folding.gauges.balance import leaves_range
from lowprec.export.folding.rules.rule import Rule
from lowprec.export.folding.traced.bake import bake_constants
from lowprec.export.folding.traced.measure import check_inputs, run_of, tensor_sizes, visit_tensors
from lowprec.export.folding.traced.module import FoldedModule
from lowprec.export.folding.traced.program import Program
from lowprec.export.folding.traced.read import read_graph
from lowprec.export.folding.traced.tracing import Traced
from lowprec.export.folding.traced.write import write_graph
from lowprec.export.weight_file import WeightFile
from lowprec.formats import FP16
from lowprec.report import ChangeReport


def fold_with_rules(
    traced: Traced, rules: Iterable[Rule], folder: Path | None = None
) -> tuple[FoldedModule, ChangeReport]:
    """Folds a traced network by `rules` in their order; `fold_traced` is this with the whole table."""
    program = traced.program.copy()
    files: list[WeightFile] = []
    report = ChangeReport()
    report_baked(bake_constants(program), program.norms, report)
    inputs = check_inputs(traced.interface)
    arrays = [[value.numpy() for value in batch] for batch in inputs]
    # What the network as it was computes is the truth, not its constants baked by us or stated by a layer.
    truth = Truth(_run_module(traced.module), run_of(program, torch.float32), arrays)

    def attempt(chosen: list[Rule]) -> Attempt[FoldedModule]:
        edited = program.copy()
        if folder is not None:
            edited.file = WeightFile(folder)
            files.append(edited.file)
        return _attempt(traced, edited, chosen, truth, inputs)

    best = best_attempt(rules, attempt, lambda: tensor_sizes(program, inputs))
    for file in files:
        if file is not best.folded.file:
            file.discard()
    refuse_wrong(best.measured, traced.declared)
    report.changed += best.report.changed
    report.refused += best.report.refused
    report.facts.update(best.report.facts)
    return best.folded, report


def _run_module(module: FoldedModule) -> Run:
    return lambda arrays: [output.numpy() for output in module.run_flat([torch.from_numpy(a) for a in arrays])]


def _attempt(
    traced: Traced, program: Program, rules: list[Rule], truth: Truth, inputs: list[list[torch.Tensor]]
) -> Attempt[FoldedModule]:
    view = read_graph(program)
    report = fold_graph(view.graph, rules, program.norms)
    write_graph(program, view)
    view.graph.forget()  # the weights before and after, which would stay until the garbage is collected
    view = read_graph(program)
    if leaves_range(view.graph, FP16):
        balance_graph(view.graph, functools.partial(visit_tensors, program, inputs), FP16, report)
        write_graph(program, view)
    view.graph.forget()
    program.settle_names()
    error = truth.float64_error(run_of(program, torch.float64))
    program.round_constants(traced.source_dtype, traced.program)
    measured = Measured(error, *truth.float32_ratio(run_of(program, torch.float32)))
    folded = FoldedModule(program, traced.interface, traced.source_dtype, shares=True)
    return Attempt.judged(folded, report, measured, _weights(folded))


def _weights(folded: FoldedModule) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, weight in folded.network.named_parameters():
        yield name, weight.detach().numpy()
        folded.release()
