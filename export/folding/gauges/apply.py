"""Writes gauges into a graph's constants; afterwards every tensor is stored as the solution says."""

from __future__ import annotations

import numpy as np

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import fold_affine, squeezed, unfold_input
from lowprec.export.folding.gauges.solve import Solution
from lowprec.export.folding.graph import Affine, Graph, Linear, Node

# Scales come out of a chain of float64 multiplications: one this close to 1 is 1.
_ONE = 1e-14


def apply_gauges(graph: Graph, solution: Solution) -> None:
    """Gives linear operations and kept affines their new constants, and takes out the affines that are granted."""
    granted = set(solution.granted)
    for node in graph.nodes:
        if isinstance(node.op, Linear) and node in solution.constraints.labels:
            _apply_to_linear(graph, solution, node, node.op)
        elif isinstance(node.op, Affine) and node not in granted and node in solution.constraints.labels:
            _apply_to_affine(graph, solution, node, node.op)
    for node in solution.granted:
        graph.bypass(node)


def _apply_to_linear(graph: Graph, solution: Solution, node: Node, op: Linear) -> None:
    """W' = W * S_in / S_out, b' = (b + W T_in - T_out) / S_out."""
    before, after = solution.constraints.channel_labels(node)
    weight, bias = op.stored, op.bias
    if before is not None:
        into = ChannelAffine(solution.scale(before), solution.shift(before))
        if (into.scale != 1).any() or into.shift.any():
            weight, bias = unfold_input(op.kind, weight, bias, into, op.groups)
    scale = 1 / solution.scale(after)
    shift = -solution.shift(after) * scale
    if (scale != 1).any() or shift.any():
        weight, bias = fold_affine(op.kind, weight, bias, ChannelAffine(scale, shift), op.groups)
        if op.bias is None and bias is not None and not bias.any():
            bias = None
    if weight is not op.stored or bias is not op.bias:
        graph.replace(node, op.with_constants(weight, bias))


def _apply_to_affine(graph: Graph, solution: Solution, node: Node, op: Affine) -> None:
    """scale' = scale * S_in / S_out, shift' = (scale * T_in + shift - T_out) / S_out."""
    before, after = solution.constraints.input_labels(node), solution.constraints.labels[node]
    assert not isinstance(after, tuple)
    if not op.is_finite:
        return
    out = solution.scale(after)
    scale = op.scale * solution.scale(before) / out
    shift = (op.scale * solution.shift(before) + op.shift - solution.shift(after)) / out
    scale = np.where(np.abs(scale - 1) <= _ONE, 1.0, scale)
    largest = np.maximum(np.abs(op.shift), np.abs(solution.shift(after))) / np.abs(out)
    shift = np.where(np.abs(shift) <= _ONE * largest, 0.0, shift)
    if not (np.array_equal(scale, op.scale) and np.array_equal(shift, op.shift)):
        graph.replace(node, Affine(squeezed(scale), squeezed(shift)))
