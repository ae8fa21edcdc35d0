"""What a traced network is measured on, and how it is run for that; `accuracy` judges what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from lowprec.export.folding.accuracy import Arrays, Run, rms, samples_to_measure
from lowprec.export.folding.traced.interface import Interface
from lowprec.export.folding.traced.program import Program


def run_of(program: Program, dtype: torch.dtype) -> Run:
    """A program as a function of numpy arrays that computes in `dtype`."""

    def run(arrays: Arrays) -> Arrays:
        outputs = _Runner(program, dtype).run_on([torch.from_numpy(array) for array in arrays])
        return [output.numpy() for output in outputs]

    return run


class _Runner(fx.Interpreter):
    """Evaluates a program without a second copy of its weights: each is cast where it is used and dropped again."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        super().__init__(nn.Module(), garbage_collect_values=True, graph=program.graph)
        self._program, self._dtype = program, dtype

    def run_on(self, inputs: Sequence[Tensor]) -> Any:
        """Outputs in order; floating inputs are cast."""
        with torch.no_grad():
            return self.run(*map(self._cast, inputs))

    def fetch_attr(self, target: str) -> Any:
        """A constant in the type that is computed in."""
        return self._cast(self._program.tensor(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation, where a floating type that it names is the one that is computed in."""
        result = super().call_function(
            target, fx.node.map_aggregate(args, self._narrow), fx.node.map_aggregate(kwargs, self._narrow)
        )
        if self._program.file is not None:
            self._program.file.release()
        return result

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._dtype) if value.is_floating_point() else value

    def _narrow(self, value: Any) -> Any:
        return self._dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


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
    count = samples_to_measure(per_sample)
    count += any(free and len(example) == count for example, free in zip(examples, batch, strict=True))
    inputs = []
    for example, free in zip(examples, batch, strict=True):
        kept = example[: max(1, count // 2)]
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


def tensor_sizes(program: Program, inputs: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """rms of every float tensor of a program in float64, by node, over a few inputs."""
    sizes: dict[str, float] = {}

    def see(name: str, value: NDArray[np.float64]) -> None:
        sizes[name] = max(sizes.get(name, 0.0), rms([value[np.isfinite(value)]]))

    visit_tensors(program, inputs, see)
    return sizes


def visit_tensors(
    program: Program, inputs: Sequence[Sequence[Tensor]], see: Callable[[str, NDArray[np.float64]], None]
) -> None:
    """Runs a program in float64 and shows every float tensor that it computes, with the name of its node."""

    class Visitor(_Runner):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.is_floating_point() and n.op != "get_attr":
                see(n.name, result.numpy())
            return result

    visitor = Visitor(program, torch.float64)
    for batch in inputs:
        visitor.run_on(batch)
