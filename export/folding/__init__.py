"""Folds what algebra can fold into weights, in float64, and says why the rest stays.

`trace` gives the truth, `fold_traced` works on it, `fold` is both; `fold_onnx` does the same with an ONNX model, where
torch may be absent. To add a rule: a file in `rules/` that works on the neutral graph, one line in `RULES`, and rows in
the tests' case table, refusals included. To let scales and shifts pass an operation that is opaque so far: one line in
`OPERATIONS` of `traced/read.py` and one in that of `from_onnx/operators.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowprec.export.folding.rules.affine_after_affine import AFFINE_AFTER_AFFINE
from lowprec.export.folding.rules.affine_after_linear import AFFINE_AFTER_LINEAR
from lowprec.export.folding.rules.channel_gauges import CHANNEL_GAUGES
from lowprec.export.folding.rules.identity_affine import IDENTITY_AFFINE
from lowprec.export.folding.rules.parallel_branches import PARALLEL_BRANCHES
from lowprec.export.folding.rules.rule import Rule
from lowprec.export.folding.rules.silent_channels import SILENT_CHANNELS
from lowprec.lazy import resolver
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lowprec.export.folding.from_onnx.fold import fold_onnx
    from lowprec.export.folding.traced.module import FoldedModule
    from lowprec.export.folding.traced.tracing import Traced, trace

__all__ = ["RULES", "FoldedModule", "Rule", "Traced", "fold", "fold_onnx", "fold_traced", "trace"]

# The rules and what folds ONNX models need no torch, so what does resolves on first use.
_HOME = {
    "FoldedModule": "lowprec.export.folding.traced.module",
    "Traced": "lowprec.export.folding.traced.tracing",
    "fold_onnx": "lowprec.export.folding.from_onnx.fold",
    "trace": "lowprec.export.folding.traced.tracing",
}

# In order of application; each goes over the whole graph, and a change sends the graph back to the first. What no local
# rule can fold is left to the last one, which looks at the whole graph once.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        IDENTITY_AFFINE,
        AFFINE_AFTER_LINEAR,
        PARALLEL_BRANCHES,
        AFFINE_AFTER_AFFINE,
        SILENT_CHANNELS,
        CHANNEL_GAUGES,
    )
}


def fold_traced(traced: Traced, folder: Path | None = None) -> tuple[FoldedModule, ChangeReport]:
    """Folds a traced network by every rule of `RULES`.

    Args:
        traced: from `trace`; it stays as it is.
        folder: keep the folded weights in a file there rather than in memory.

    Returns:
        The folded network in the source's type (float32 unless the source is float64), and the report. Facts:
        `float64_error`, `float32_error_ratio`, `norms_found`, `norms_folded`, `norms_left`, `fp16_range`.

    Raises:
        FoldError: the folded network is not the same function in float64, which is a defect of this library.
    """
    from lowprec.export.folding.traced.apply import fold_with_rules

    return fold_with_rules(traced, RULES.values(), folder)


def fold(
    model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None
) -> tuple[FoldedModule, ChangeReport]:
    """Folds norms and other per-channel affines into the weights before them; `model` stays as it is.

    Args:
        model: in evaluation mode.
        example_inputs: the tuple of arguments, as torch.export takes it.
        dynamic_shapes: as torch.export takes it; by default the first axis is free.

    Raises:
        FoldError: the network is in training mode or cannot be traced.
    """
    from lowprec.export.folding.traced.tracing import trace

    return fold_traced(trace(model, example_inputs, dynamic_shapes))


__getattr__ = resolver(__name__, _HOME)
