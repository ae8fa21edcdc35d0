"""Defects to plant into the fold, one per thing that can be wrong in it: sign, axis, eps, padding, what passes what.

`python -m tests.benchmarks.mutate_folding` plants each in a copy of the repository and runs the fold's tests there; a
test holds every line below to be in the code exactly once, so that none is planted nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One defect.

    Args:
        file: under export/folding.
        old: text that is there once.
        new: what it becomes.
    """

    file: str
    old: str
    new: str


MUTATIONS = [
    # The algebra: signs, axes, groups.
    Mutation(
        "algebra.py",
        "scaled(weight_OIK, affine_O.scale.reshape(-1, 1))",
        "scaled(weight_OIK, 1 / affine_O.scale.reshape(-1, 1))",
    ),
    Mutation("algebra.py", "* affine_O.scale + affine_O.shift\n", "* affine_O.scale - affine_O.shift\n"),
    Mutation("algebra.py", "np.asarray(bias_O, np.float64) * affine_O.scale", "np.asarray(bias_O, np.float64)"),
    Mutation(
        "algebra.py",
        "_per_row(affine_O.scale.reshape(groups, 1, -1), weight_CMK.shape[0])",
        "_per_row(affine_O.scale.reshape(-1, groups).T.reshape(groups, 1, -1), weight_CMK.shape[0])",
    ),
    Mutation(
        "algebra.py",
        "return np.asarray(table) + affine_O.shift if affine_O.shift.any() else table, None",
        "return table, None",
    ),
    Mutation("algebra.py", "part = factor if len(factor) == 1 else factor[rows]", "part = factor[: len(block)]"),
    Mutation("algebra.py", "self.factors[:index], known * factor, *", "self.factors[:index], factor, *"),
    Mutation("algebra.py", "found *= np.abs(factor)", "found *= factor"),
    Mutation("algebra.py", "else (groups, -1, 1, 1)", "else (groups, 1, -1, 1)"),
    Mutation(
        "algebra.py",
        "added_O if bias_O is None else added_O + bias_O",
        "added_O if bias_O is None else bias_O - added_O",
    ),
    Mutation("algebra.py", ".sum((axis, 3))", ".mean((axis, 3))"),
    Mutation("algebra.py", "start = group % ratio * per_group", "start = group // ratio * per_group"),
    Mutation("algebra.py", "any(map(any, self.padding))", "any(map(all, self.padding))"),
    # What each operation is read as.
    Mutation(
        "traced/read.py", 'np.sqrt(_numpy(variance) + given["eps"])', 'np.sqrt(_numpy(variance) + 1.01 * given["eps"])'
    ),
    Mutation(
        "traced/read.py",
        "return Affine.along(1, _rank(node), affine)",
        "return Affine.along(_rank(node) - 1, _rank(node), affine)",
    ),
    Mutation(
        "traced/read.py",
        '"sub": _read_sum(lambda alpha: (1.0, -alpha))',
        '"sub": _read_sum(lambda alpha: (1.0, alpha))',
    ),
    Mutation(
        "traced/read.py",
        '"rsub": _read_sum(lambda alpha: (-alpha, 1.0))',
        '"rsub": _read_sum(lambda alpha: (-1.0, alpha))',
    ),
    Mutation("traced/read.py", "coefficients[position] * constant", "constant"),
    Mutation("traced/read.py", "scale = 1 / constant if divides else constant", "scale = constant"),
    Mutation("traced/read.py", "constant is None or (divides and position == 0)", "constant is None"),
    Mutation("traced/read.py", "return Affine(-one, 0 * one)", "return Affine(one, 0 * one)"),
    Mutation("traced/read.py", 'if padding == "same":', 'if padding == "never":'),
    Mutation("traced/read.py", "np.asarray(weight).T, None, 1, _rank", "np.asarray(weight), None, 1, _rank"),
    Mutation("traced/read.py", "same and constant.ndim <= _rank(node)", "constant.ndim <= _rank(node)"),
    Mutation(
        "traced/read.py",
        '**dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), _read_homogeneous)',
        '**dict.fromkeys(("relu", "leaky_relu", "prelu", "abs", "gelu"), _read_homogeneous)',
    ),
    Mutation(
        "traced/read.py",
        '**dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), _read_homogeneous)',
        '**dict.fromkeys(("relu", "leaky_relu", "prelu", "abs", "silu"), _read_homogeneous)',
    ),
    Mutation(
        "traced/read.py",
        '**dict.fromkeys(("clamp", "clamp_min"), _read_clamp)',
        '**dict.fromkeys(("clamp", "clamp_min", "hardtanh"), lambda *_: Through(True, False))',
    ),
    Mutation("traced/read.py", 'given["min"] == 0 and given.get("max") is None', 'given["min"] == 0'),
    Mutation(
        "traced/read.py",
        "    return Through(positive=True, shift=False)\n\n\ndef _read_clamp",
        "    return Through(positive=False, shift=False)\n\n\ndef _read_clamp",
    ),
    Mutation(
        "traced/read.py",
        "    return Through(positive=True, shift=False)\n\n\ndef _read_clamp",
        "    return Through(positive=True, shift=True)\n\n\ndef _read_clamp",
    ),
    Mutation(
        "traced/read.py",
        "Through(positive=True, shift=True, mixes=_window_axes(node))",
        "Through(positive=False, shift=True, mixes=_window_axes(node))",
    ),
    Mutation("traced/read.py", 'even = not counts and given.get("divisor_override") is None', "even = True"),
    Mutation(
        "traced/read.py",
        '"sum": _read_reduction(positive=False, shift=False)',
        '"sum": _read_reduction(positive=False, shift=True)',
    ),
    Mutation(
        "traced/read.py",
        '"amax": _read_reduction(positive=True, shift=True)',
        '"amax": _read_reduction(positive=False, shift=True)',
    ),
    Mutation("traced/read.py", 'return ZeroPad(widths) if not given["value"] else Opaque()', "return ZeroPad(widths)"),
    # What each operation demands.
    Mutation("graph.py", "return self.window is None or not self.window.pads", "return True"),
    Mutation(
        "gauges/constraints.py",
        "            if not op.spreads_shift_evenly:\n                self._no_shift(labels, node)\n",
        "",
    ),
    Mutation(
        "gauges/constraints.py", "for label in np.unique(labels).tolist() if op.positive else ():", "for label in ():"
    ),
    Mutation("gauges/constraints.py", "        if not op.shift:\n            self._no_shift(labels, node)\n", ""),
    Mutation(
        "gauges/constraints.py",
        "        if tuple(widths) != op.widths:\n            self._no_shift(labels, node)\n",
        "",
    ),
    Mutation("gauges/constraints.py", "        self._no_shift(fresh, node)\n", ""),
    Mutation(
        "gauges/constraints.py",
        "            self._tie(after, labels, node)\n        by = _called(node)",
        "            pass\n        by = _called(node)",
    ),
    Mutation(
        "gauges/constraints.py",
        "[(label, -1.0), *zip(parts, op.coefficients, strict=True)]",
        "[(label, -1.0), *((part, 1.0) for part in parts)]",
    ),
    Mutation(
        "gauges/constraints.py",
        "        self._pin(gate, node)\n        self._no_shift(passing, node)\n        return _of_rank",
        "        self._no_shift(passing, node)\n        return _of_rank",
    ),
    Mutation(
        "gauges/constraints.py",
        "        self._pin(gate, node)\n        if not (swap and op.means):",
        "        if not (swap and op.means):",
    ),
    Mutation("gauges/constraints.py", "        if not (swap and op.means):\n", "        if not swap:\n"),
    Mutation("gauges/constraints.py", "        passing = self._uniform(passing, summed, node)\n", ""),
    Mutation("gauges/constraints.py", "return self._uniform(values, values.ndim - 2, node)", "return values"),
    Mutation(
        "gauges/constraints.py",
        "                self._pin(labels, node)\n        return self._uniform",
        "                pass\n        return self._uniform",
    ),
    Mutation(
        "gauges/constraints.py",
        "        self._pin(gate, node)\n        self._no_shift(passing, node)\n",
        "        self._pin(gate, node)\n",
    ),
    Mutation(
        "gauges/constraints.py",
        "                refusal = self.scales.tie(label, other, 1.0, by)\n                refusal = refusal or",
        "                refusal =",
    ),
    Mutation(
        "gauges/constraints.py", "refusal or self.shifts.demand([(label, 1.0), (other, -1.0)], 0.0, by)", "refusal"
    ),
    Mutation(
        "gauges/constraints.py",
        "                self._pin(labels, node)\n        return np.full",
        "                pass\n        return np.full",
    ),
    # How demands are kept, granted and written.
    Mutation(
        "gauges/scales.py", "sign = self._sign[root] if ratio > 0 else -self._sign[root]", "sign = self._sign[root]"
    ),
    Mutation("gauges/scales.py", "sign = 1 if factor > 0 else -1", "sign = 1"),
    Mutation("gauges/scales.py", "if math.isclose(own, factor * others, rel_tol=_SAME):", "if True:"),
    Mutation("gauges/scales.py", "return -factor if self._sign[root] < 0 else factor", "return factor"),
    Mutation("gauges/scales.py", "root, onto, ratio = onto, root, 1 / ratio", "root, onto = onto, root"),
    Mutation("gauges/shifts.py", "if abs(rest) <= _NOTHING * magnitude:", "if True:"),
    Mutation("gauges/shifts.py", "scale = -1.0 / left.pop(pivot)", "scale = 1.0 / left.pop(pivot)"),
    Mutation("gauges/shifts.py", "            del self._solved[pivot], self._by[pivot]", "            pass"),
    Mutation(
        "gauges/solve.py", "[(after, -1.0), (before, scale)], shift,", "[(after, -1.0), (before, scale)], -shift,"
    ),
    Mutation(
        "gauges/solve.py",
        "        reason = _tie(constraints, wish) or _shift(constraints, wish)",
        "        reason = _tie(constraints, wish)",
    ),
    Mutation("gauges/apply.py", "shift = -solution.shift(after) * scale", "shift = solution.shift(after) * scale"),
    Mutation(
        "gauges/apply.py",
        "scale = op.scale * solution.scale(before) / out",
        "scale = op.scale * out / solution.scale(before)",
    ),
    Mutation("gauges/apply.py", "+ op.shift - solution.shift(after)) / out", "+ op.shift) / out"),
    # The local rules.
    Mutation(
        "rules/rule.py",
        "    others = [user for user in match.source.users if user is not match.node]",
        "    others: list[Node] = []",
    ),
    Mutation("rules/affine_after_linear.py", "if axes and axes != (linear.axis,):", "if False:"),
    Mutation(
        "rules/parallel_branches.py",
        "weight + factor * part[0], bias + factor * part[1]",
        "weight + part[0], bias + part[1]",
    ),
    Mutation(
        "rules/parallel_branches.py",
        "if groups % base.groups or window.stride != outer.stride or",
        "if groups % base.groups or",
    ),
    Mutation("rules/parallel_branches.py", "if not same_length or any(", "if any("),
    Mutation(
        "rules/parallel_branches.py", "divmod(gap + window.dilation[axis] * tap,", "divmod(window.dilation[axis] * tap,"
    ),
    Mutation(
        "rules/parallel_branches.py",
        "alone = branch.inputs == [source] and all(user is node for user in branch.users)",
        "alone = branch.inputs == [source]",
    ),
    Mutation(
        "rules/silent_channels.py",
        "np.setdiff1d(wish.before[wish.scale == 0], wish.before[wish.scale != 0])",
        "wish.before[wish.scale == 0]",
    ),
    Mutation("rules/silent_channels.py", "    while source.users == [node]:", "    while True:"),
    # The way into and out of the graph.
    Mutation("traced/moves.py", "            return None\n    return labels", "            pass\n    return labels"),
    Mutation(
        "traced/write.py",
        "weight, bias, ones, [0] * (rank - 2), ones, channels)",
        "weight, bias, ones, [0] * (rank - 2), ones, 1)",
    ),
    Mutation("traced/write.py", "if op.shift.any() else None", "if op.scale.any() else None"),
    Mutation(
        "traced/bake.py",
        '        elif node.op == "call_function" and all(',
        '        elif node.op == "call_function" and any(',
    ),
]
