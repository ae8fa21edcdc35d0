"""Merges parallel linear branches of one tensor that are added: RepVGG, MobileOne, RepViT, x + conv(x).

A branch is a convolution or linear layer, a per-channel affine, or the tensor itself. The affine and the tensor itself
are 1x1 depthwise kernels; a small kernel is a large one with zeros around it. Recognised by algebra and not by class
name: the branches' own norms are folded into them by then.

Fold: (W1 x + b1) + (W2 x + b2) = (W1 + W2) x + (b1 + b2), exact where both windows read the same places.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowprec.export.folding.algebra import Array, Window, input_channels, widen_groups
from lowprec.export.folding.graph import Affine, Graph, Linear, Node, Sum
from lowprec.export.folding.rules.rule import LocalRule, Match


def _find(node: Node) -> Match | None:
    """The source that both operands of a sum are linear branches of; one branch at least is a real operation."""
    if not isinstance(node.op, Sum) or len(node.inputs) != 2:
        return None
    for source in dict.fromkeys(root for branch in node.inputs for root in (branch, *branch.inputs)):
        if all(_is_branch(branch, source, node) for branch in node.inputs):
            return Match(source, node)
    return None


def _is_branch(branch: Node, source: Node, node: Node) -> bool:
    if branch is source:
        return source.shape == node.shape and bool(source.shape)
    alone = branch.inputs == [source] and all(user is node for user in branch.users) and branch.shape == node.shape
    if isinstance(branch.op, Affine):
        return alone and branch.op.is_per_channel and branch.op.is_finite
    return alone and isinstance(branch.op, Linear) and branch.op.kind in ("conv", "linear")


def _check(match: Match) -> str | None:
    return None if isinstance(_merged(match), (Linear, Affine)) else "its branches have windows of different places"


def _apply(graph: Graph, match: Match) -> str:
    merged, node = _merged(match), match.node
    branches = [branch for branch in dict.fromkeys(node.inputs) if branch is not match.source]
    added = ["its input"] * (match.source in node.inputs)
    base = _base(branches)
    names = " and ".join([f"'{branch.label}'" for branch in branches if branch is not base] + added)
    if base is None:
        assert isinstance(merged, Affine)
        norm = next((branch for branch in branches if branch.norm is not None), None)
        if norm is not None:  # the report accounts for what is left of it under its own name
            node.norm, node.path = norm.norm, norm.path
        graph.replace_by_affine(node, merged, match.source)
        return f"{names} became one affine"
    assert isinstance(merged, Linear)
    graph.replace(base, merged)
    graph.bypass(node, base)
    return f"{names} merged into '{base.label}'" if names else f"added to itself in '{base.label}'"


def _merged(match: Match) -> Linear | Affine | None:
    """The operation that the whole sum is, or None where there is none."""
    node = match.node
    assert isinstance(node.op, Sum)
    base = _base([branch for branch in node.inputs if branch is not match.source])
    if base is None:
        return _merged_affines(match)
    op = base.op
    assert isinstance(op, Linear)
    weight, bias = np.zeros(op.stored.shape), np.zeros(op.channels)
    has_bias = False
    for branch, factor in zip(node.inputs, node.op.coefficients, strict=True):
        part = _as_branch_of(op, branch, match.source)
        if part is None:
            return None
        weight, bias = weight + factor * part[0], bias + factor * part[1]
        has_bias |= bool(part[1].any())
    return op.with_constants(weight, bias if has_bias or op.bias is not None else None)


def _merged_affines(match: Match) -> Affine | None:
    node = match.node
    assert isinstance(node.op, Sum)
    one = np.ones((1,) * len(node.shape))
    total = Affine(0 * one, 0 * one)
    for branch, factor in zip(node.inputs, node.op.coefficients, strict=True):
        part = _affine_of(branch, match.source)
        total = Affine(total.scale + factor * part.scale, total.shift + factor * part.shift)
    return total if total.is_per_channel else None


def _affine_of(branch: Node, source: Node) -> Affine:
    """A branch that is no linear operation: an affine, or the source itself."""
    if branch is not source and isinstance(branch.op, Affine):
        return branch.op
    one = np.ones((1,) * len(source.shape))
    return Affine(one, 0 * one)


def _base(branches: list[Node]) -> Node | None:
    """The linear branch whose kernel has room for the others: fewest groups, then the largest window."""
    linear = [(branch, branch.op) for branch in branches if isinstance(branch.op, Linear)]
    ordered = sorted(linear, key=lambda pair: (pair[1].groups, -math.prod(pair[1].stored.shape[2:])))
    return ordered[0][0] if ordered else None


def _as_branch_of(base: Linear, branch: Node, source: Node) -> tuple[Array, Array] | None:
    """Weight and bias of a branch in the shape of `base`, or None where its window reads other places."""
    op = branch.op
    if isinstance(op, Linear) and branch is not source:
        if op.kind != base.kind or op.axis != base.axis:
            return None
        bias = np.zeros(op.channels) if op.bias is None else op.bias
        if base.window is None or op.window is None:
            return op.weight, bias
        weight = _embedded(base, op.weight, op.groups, op.window)
        return None if weight is None else (weight, bias)
    channels = input_channels(base.kind, base.stored, base.groups)
    affine = _affine_of(branch, source)
    if channels != base.channels or affine.axes not in ((), (base.axis,)):
        return None
    spread = affine.per_channel(channels)
    scale, shift = spread.scale, spread.shift
    if base.window is None:
        return np.diag(scale), shift
    axes = base.stored.ndim - 2
    weight = _embedded(base, scale.reshape(channels, 1, *[1] * axes), channels, Window.plain(axes))
    return None if weight is None else (weight, shift)


def _embedded(base: Linear, weight: Array, groups: int, window: Window) -> Array | None:
    """A kernel written as a larger one that reads the same places and more, with zeros there.

    Tap t of a window reads `o * stride - padding + dilation * t`, so tap t of the small one is tap
    (padding' - padding + dilation * t) / dilation' of the large one, with the padding before. Outputs are equally many
    where padding' - dilation' * (length' - 1) is the same, with the padding on both sides.
    """
    assert base.window is not None
    outer = base.window
    if groups % base.groups or window.stride != outer.stride or window.varies or outer.varies:
        return None
    places: list[Any] = [range(base.stored.shape[0]), range(base.stored.shape[1])]
    for axis, (small, large) in enumerate(zip(weight.shape[2:], base.stored.shape[2:], strict=True)):
        gap, gap_after = (new - old for new, old in zip(outer.padding[axis], window.padding[axis], strict=True))
        same_length = gap + gap_after == outer.dilation[axis] * (large - 1) - window.dilation[axis] * (small - 1)
        taps = [divmod(gap + window.dilation[axis] * tap, outer.dilation[axis]) for tap in range(small)]
        if not same_length or any(rest or not 0 <= place < large for place, rest in taps):
            return None
        places.append([place for place, _ in taps])
    result = np.zeros(base.stored.shape)
    result[np.ix_(*places)] = widen_groups(weight, groups, base.groups)
    return result


PARALLEL_BRANCHES = LocalRule(
    "parallel-branches", "linear branches of one tensor that are added become one", _find, _check, _apply
)
