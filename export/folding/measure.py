"""What a fold did to the numbers: its algebra in float64, its rounding in float32, its constants in half.

Algebra and rounding are judged apart: in float64 a wrong formula cannot hide behind a tolerance that is meant for
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import FoldError
from lowprec.export.folding.module import FoldedModule
from lowprec.formats import FloatFormat, rounding_loss

# Far above what reordering float64 sums leaves (measured: at most 1e-14) and far below any defect of a fold.
MAX_FLOAT64_ERROR = 1e-10


def check_inputs(truth: FoldedModule, seed: int = 0) -> list[list[Tensor]]:
    """The example inputs, and as many random ones.

    Random floats have the mean and spread of the example; other types, whose valid values are not known, get the
    example's own entries in another order along the first axis.

    Args:
        truth: gives the example inputs.
        seed: of the random values; the global generator is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return [list(truth.example_inputs), [_random_like(example, generator) for example in truth.example_inputs]]


def _random_like(example: Tensor, generator: torch.Generator) -> Tensor:
    if not example.is_floating_point():
        return example.flip(0) if example.ndim else example
    spread = example.std(correction=0) if example.numel() else torch.ones(())
    noise = torch.randn(example.shape, generator=generator, dtype=example.dtype)
    return noise * torch.where(spread > 0, spread, torch.ones_like(spread)) + example.mean()


def relative_error(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> float:
    """Largest over the floating outputs of max |candidate - reference| / rms(reference), in float64.

    A difference in which elements are not finite counts as infinite; an output that is zero everywhere is compared
    absolutely.
    """
    worst = 0.0
    for expected, found in zip(reference, candidate, strict=True):
        if not expected.is_floating_point() or not expected.numel():
            continue
        finite = expected.isfinite()
        expected, found = expected.double(), found.double()
        if not torch.equal(finite, found.isfinite()):
            return math.inf
        difference = float((found - expected)[finite].abs().max()) if finite.any() else 0.0
        worst = max(worst, difference / (_rms([expected[finite]]) or 1.0))
    return worst


def check_float64(
    truth: FoldedModule, folded: FoldedModule, inputs: Sequence[Sequence[Tensor]], declared: Sequence[str] = ()
) -> float:
    """The float64 error of a fold; raises `FoldError` where it cannot be rounding.

    Args:
        truth: the network unfolded.
        folded: the network folded, in float64.
        inputs: batches to compare on.
        declared: layers that were taken at their word, which the message then names.
    """
    error = max(relative_error(truth.run_flat(batch), folded.run_flat(batch)) for batch in inputs)
    if error > MAX_FLOAT64_ERROR and declared:
        raise FoldError(
            f"the network folded by what {', '.join(map(repr, declared))} say in inference_affine differs from the "
            f"original by {error:.2g} in float64; let inference_affine state what the layer computes, or remove it"
        )
    if error > MAX_FLOAT64_ERROR:
        raise FoldError(
            f"internal: the folded network differs from the original by {error:.2g} in float64, limit "
            f"{MAX_FLOAT64_ERROR:.0e}; this is a defect in lowprec, please report the network"
        )
    return error


def float32_error_ratio(
    truth: FoldedModule, plain: FoldedModule, folded: FoldedModule, inputs: Sequence[Sequence[Tensor]]
) -> float | None:
    """rms error of the folded float32 network over that of the unfolded one, both against float64.

    Returns:
        The ratio; 1 where both are exact, None where only the unfolded one is.
    """
    errors = [0.0, 0.0]
    for batch in inputs:
        expected = [value for value in truth.run_flat(batch) if value.is_floating_point()]
        for index, network in enumerate((folded, plain)):
            found = [value for value in network.run_flat(batch) if value.is_floating_point()]
            differences = [(a.double() - b)[b.isfinite()] for a, b in zip(found, expected, strict=True)]
            errors[index] = math.hypot(errors[index], _rms(differences))
    if errors[1] == 0:
        return 1.0 if errors[0] == 0 else None
    return errors[0] / errors[1]


def range_losses(folded: FoldedModule, fmt: FloatFormat) -> dict[str, dict[str, int]]:
    """Counts of constants that overflow, vanish or turn subnormal in `fmt`, for each tensor that has any."""
    losses: dict[str, dict[str, int]] = {}
    for name, tensor in folded.network.named_parameters():
        loss: Any = rounding_loss(tensor.double().numpy(), fmt)
        if loss:
            losses[name] = {"overflow": loss.overflow, "vanished": loss.vanished, "subnormal": loss.subnormal}
    return losses


def _rms(tensors: Sequence[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors) / count) if count else 0.0
