"""How a traced network is called: the flat tensors behind its arguments and behind its result.

The structures are kept as text, because torch's tree specs do not pickle quietly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lowprec.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Interface:
    """Names, structure and example of a network's inputs and outputs.

    Args:
        input_names: one per tensor input.
        output_names: one per output.
        dynamic_shapes: per tensor input, names of the free axes.
        example_inputs: one tensor per input.
        fixed: position among the flat arguments and value of each argument that is not a tensor.
        arguments: structure of the arguments, as text.
        result: structure of the result, as text.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, str], ...]
    example_inputs: tuple[Tensor, ...]
    fixed: dict[int, Any]
    arguments: str
    result: str

    def tensors_from_args(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensor inputs in order; raises `UnsupportedError` where the call differs from the traced one."""
        leaves, spec = pytree.tree_flatten(args)
        if spec != _spec_from_text(self.arguments):
            raise UnsupportedError(
                f"a folded network is called as it was traced, with {', '.join(self.input_names)}; "
                f"found {len(args)} arguments of another structure"
            )
        for position, value in self.fixed.items():
            if leaves[position] is not value and leaves[position] != value:
                raise UnsupportedError(
                    f"argument {position} was {value!r} when the network was traced and is part of it; found "
                    f"{leaves[position]!r}; fold the network again with that value"
                )
        return [leaf for position, leaf in enumerate(leaves) if position not in self.fixed]

    def result_from_outputs(self, outputs: tuple[Tensor, ...]) -> Any:
        """Puts flat outputs back in the structure that the original network returns."""
        return pytree.tree_unflatten(list(outputs), _spec_from_text(self.result))


@functools.lru_cache(maxsize=64)
def _spec_from_text(text: str) -> pytree.TreeSpec:
    return pytree.treespec_loads(text)
