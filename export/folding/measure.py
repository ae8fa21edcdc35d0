"""What a fold did to the numbers: its algebra in float64, its rounding in float32, its constants in half.

Algebra and rounding are judged apart: in float64 a wrong formula cannot hide behind a tolerance that is meant for
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowprec.errors import FoldError
from lowprec.export.folding.interface import Interface
from lowprec.export.folding.module import FoldedModule
from lowprec.export.folding.program import Program
from lowprec.formats import FloatFormat, rounding_loss

# Far above what reordering float64 sums leaves (measured: at most 1e-14) and far below any defect of a fold.
MAX_FLOAT64_ERROR = 1e-10
# A fold is accepted if rounding to float32 costs at most this many times what it costs the network as it was.
MAX_FLOAT32_RATIO = 2.0

# Small networks are measured on many samples, because the ratio of two errors over a few numbers is mostly chance;
# three images of 224 x 224 pixels are what a large one gets.
_MAX_SAMPLES = 64
_MIN_SAMPLES = 3
_MAX_INPUT = 3 * 3 * 224 * 224


@dataclass(frozen=True)
class Measured:
    """Errors of a folded network against the truth.

    Args:
        float64_error: largest relative error in float64.
        float32_error_ratio: rms error in float32 over that of the network as it was; None where that one is exact and
            the folded one is not.
    """

    float64_error: float
    float32_error_ratio: float | None

    @property
    def is_right(self) -> bool:
        """Whether the algebra holds."""
        return self.float64_error <= MAX_FLOAT64_ERROR

    @property
    def is_accepted(self) -> bool:
        """Whether the fold is right and loses no more to rounding than it may."""
        return self.is_right and self.float32_error_ratio is not None and self.float32_error_ratio <= MAX_FLOAT32_RATIO


class Truth:
    """What the network as it was computes on a few inputs, in float64, and how far float32 strays from it.

    Args:
        module: the network as it was, in float64.
        plain: the same in float32.
        interface: its inputs.
    """

    def __init__(self, module: FoldedModule, plain: FoldedModule, interface: Interface) -> None:
        self.inputs = check_inputs(interface)
        self.expected = [module.run_flat(batch) for batch in self.inputs]
        self._plain_error = self._error(plain)

    def measure(self, wide: FoldedModule, narrow: FoldedModule) -> Measured:
        """Errors of a folded network.

        Args:
            wide: the folded network in float64.
            narrow: the same in float32.
        """
        found = [wide.run_flat(batch) for batch in self.inputs]
        error = max(map(relative_error, self.expected, found))
        narrow_error = self._error(narrow)
        if self._plain_error == 0:
            return Measured(error, 1.0 if narrow_error == 0 else None)
        return Measured(error, narrow_error / self._plain_error)

    def _error(self, network: FoldedModule) -> float:
        """rms over all finite elements of all outputs."""
        differences = []
        for batch, expected in zip(self.inputs, self.expected, strict=True):
            found = network.run_flat(batch)
            pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.is_floating_point()]
            differences += [(a.double() - b)[b.isfinite()] for a, b in pairs]
        return _rms(differences)


def check_inputs(interface: Interface, seed: int = 0) -> list[list[Tensor]]:
    """The example inputs with random ones beside them, in one batch where the network takes any, else in two.

    Random floats have the mean and spread of the example; other types, whose valid values are not known, get entries of
    the example's own. The batch has another length than the one that was traced, so that nothing holds for that alone.

    Args:
        interface: gives the example inputs.
        seed: of the random values; the global generator is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = interface.example_inputs
    batch = _batch_axis(interface)
    if batch is None:
        return [list(examples), [_random_like(example, example.shape, generator) for example in examples]]
    per_sample = sum(example[:1].numel() for example, free in zip(examples, batch, strict=True) if free)
    count = min(_MAX_SAMPLES, max(_MIN_SAMPLES, _MAX_INPUT // max(per_sample, 1)))
    count += any(free and len(example) == count for example, free in zip(examples, batch, strict=True))
    inputs = []
    for example, free in zip(examples, batch, strict=True):
        kept = example[: count // 2]
        random = _random_like(example, (count - len(kept), *example.shape[1:]), generator) if free else None
        inputs.append(example if random is None else torch.cat([kept, random]))
    return [inputs]


def _batch_axis(interface: Interface) -> list[bool] | None:
    """For each input whether its first axis is the batch; None where free axes are tied in another way."""
    names = [axes.get(0) for axes in interface.dynamic_shapes]
    batch = next((name for name in names if name is not None), None)
    others = {name for axes in interface.dynamic_shapes for axis, name in axes.items() if axis > 0}
    if batch is None or batch in others or set(names) - {batch, None}:
        return None
    return [name is not None for name in names]


def _random_like(example: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if not example.numel():
        return example.new_zeros(tuple(shape))
    if not example.is_floating_point():
        return example.reshape(-1)[torch.randint(example.numel(), tuple(shape), generator=generator)]
    spread = example.std(correction=0)
    noise = torch.randn(tuple(shape), generator=generator, dtype=example.dtype)
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


def refuse_wrong(measured: Measured, declared: Sequence[str] = ()) -> None:
    """Raises `FoldError` where the float64 error of a fold cannot be rounding.

    Args:
        measured: errors of the fold.
        declared: layers that were taken at their word, which the message then names.
    """
    error = measured.float64_error
    if not measured.is_right and declared:
        raise FoldError(
            f"the network folded by what {', '.join(map(repr, declared))} say in inference_affine differs from the "
            f"original by {error:.2g} in float64; let inference_affine state what the layer computes, or remove it"
        )
    if not measured.is_right:
        raise FoldError(
            f"internal: the folded network differs from the original by {error:.2g} in float64, limit "
            f"{MAX_FLOAT64_ERROR:.0e}; this is a defect in lowprec, please report the network"
        )


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


def tensor_sizes(program: Program, inputs: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """rms of every float tensor of a program in float64, by node, over a few inputs."""
    sizes: dict[str, float] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.is_floating_point() and n.op != "get_attr":
                sizes[n.name] = max(sizes.get(n.name, 0.0), _rms([result[result.isfinite()]]))
            return result

        def fetch_attr(self, target: str) -> Any:
            return program.constants[target]

    recorder = Recorder(nn.Module(), graph=program.graph)
    with torch.no_grad():
        for batch in inputs:
            recorder.run(*(value.double() if value.is_floating_point() else value for value in batch))
    return sizes
