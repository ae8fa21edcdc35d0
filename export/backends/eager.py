"""The backend "torch": a module in memory, run eagerly as its user would, under the names that its export bears."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import UnsupportedError
from lowprec.export.backends.base import Backend, Session
from lowprec.export.tensors import TensorSpec
from lowprec.packages import is_installed

if TYPE_CHECKING:
    import torch
    from torch import nn


class EagerSession(Session):
    """A module in evaluation mode as a session.

    Args:
        module: called with its inputs by position. It may return a tensor, a sequence of tensors or a dict of them.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._like = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        floats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
        device = "cpu" if self._like is None else str(self._like.device)
        dtype = "float32" if self._like is None else str(self._like.dtype).removeprefix("torch.")
        inputs = tuple(TensorSpec(name, None, dtype) for name in forward_names(module))
        arithmetic = f"torch, eager, on {device}; weights in {' and '.join(floats) or 'no floating type'}"
        super().__init__(inputs, (), arithmetic)
        self._module = module

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        tensors = []
        for spec in self.inputs:
            tensor = torch.from_numpy(np.array(feeds[spec.name]))
            like = self._like
            if like is not None:
                tensor = tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            tensors.append(tensor)
        with torch.no_grad():
            found = named_outputs(self._module(*tensors))
        own = getattr(self._module, "output_names", None)
        if isinstance(own, Sequence) and len(own) == len(found):
            return dict(zip(map(str, own), found.values(), strict=True))
        return found


class Eager(Backend):
    """Runs an nn.Module in memory."""

    name = "torch"
    summary = "a module in memory, eagerly"
    suffixes = ()

    def unavailable(self) -> str | None:
        """Why torch cannot be imported, or None."""
        return None if is_installed("torch") else "torch is not installed; pip install torch"

    def cannot_run(self) -> str | None:
        """None: the module is already where it runs."""
        return None

    def accepts(self, artefact: Any) -> bool:
        """An nn.Module."""
        torch = sys.modules.get("torch")  # whoever holds a module has imported it, and verify must not
        return torch is not None and isinstance(artefact, torch.nn.Module)

    def _open(self, artefact: nn.Module) -> Session:
        if artefact.training:
            raise UnsupportedError(
                "asked to run a module that is in training mode, whose outputs depend on the batch; call model.eval()"
            )
        return EagerSession(artefact)


def forward_names(module: nn.Module) -> list[str]:
    """Names of the arguments that forward needs, in order; those with a default are left at it.

    A module that says so itself through `input_names` (a traced one, whose forward takes *args) is believed.
    """
    own = getattr(module, "input_names", None)
    if isinstance(own, Sequence) and own:
        return [str(name) for name in own]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def named_outputs(value: Any) -> dict[str, NDArray[Any]]:
    """Outputs by the names they have in an export: `output`, or `output_0`, `output_1`, ..., or a dict's own keys.

    Raises:
        UnsupportedError: something else than tensors came back.
    """
    if isinstance(value, dict):
        named = {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        named = (
            {f"output_{index}": item for index, item in enumerate(value)} if len(value) > 1 else {"output": value[0]}
        )
    else:
        named = {"output": value}
    return {name: _array(name, item) for name, item in named.items()}


def _array(name: str, tensor: torch.Tensor) -> NDArray[Any]:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedError(f"the module's {name} is a {type(tensor).__name__}; only tensors can be compared")
    found = tensor.detach().cpu()
    # numpy has no bfloat16; float32 holds every one of its values.
    return np.asarray((found.float() if found.dtype == torch.bfloat16 else found).numpy())
