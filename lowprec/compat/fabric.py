"""A precision plugin for Lightning Fabric, in the extra `lowprec[fabric]`.

    plugin = LowprecPrecision("fp16-master")
    fabric = Fabric(plugins=plugin)
    plugin.prepare(model.to(fabric.device), optimizer)
    model, optimizer = fabric.setup(model, optimizer)
    ...
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()                                   # plugin.landed says whether it did

Fabric's own 16-true has no loss scale, and its 16-mixed no half weights. One device: for several use
`Precision.data_parallel`, which averages half gradients without overflow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowprec.errors import MissingDependencyError, UnsupportedError
from lowprec.precision import Precision

try:
    from lightning_fabric.plugins.precision import Precision as FabricPrecision
except ImportError:
    raise MissingDependencyError("the Fabric plugin needs lightning-fabric: pip install 'lowprec[fabric]'") from None


class LowprecPrecision(FabricPrecision):  # type: ignore[misc, unused-ignore]  # untyped where it is not installed
    """`lowprec.Precision` in Fabric's places.

    Args:
        mode: a name in `MODES`.
        options: of `lowprec.Precision`.

    Attributes:
        engine: the `Precision` itself: `scale`, `last_overflow`, `health`.
        landed: whether the last step did.
    """

    def __init__(self, mode: str = "fp16-master", **options: Any) -> None:
        self.engine = Precision(mode, **options)
        self.landed: bool | Tensor = True
        self._model: nn.Module | None = None

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Puts both into the mode, in place; before `fabric.setup`, with the model where it will stay."""
        self.engine.prepare(model, optimizer)
        self._model = model

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module as it is. Raises `UnsupportedError` if it was not prepared."""
        if module is not self._model:
            raise UnsupportedError("call plugin.prepare(model, optimizer) before fabric.setup(model, optimizer)")
        return module

    def forward_context(self) -> AbstractContextManager[None]:
        """The engine's, in training."""
        return self.engine.forward()

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Backward of the scaled loss."""
        if args or set(kwargs) - {"retain_graph"}:
            raise UnsupportedError("fabric.backward takes the loss and retain_graph here, nothing else")
        self.engine.backward(tensor, **kwargs)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> None:
        """A step that lands or is skipped."""
        if kwargs.get("closure") is not None:
            raise UnsupportedError("a step with a closure cannot be skipped; call optimizer.step() without one")
        self.landed = self.engine.step()

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Called by `fabric.clip_gradients`."""
        self.engine.unscale()

    def state_dict(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.engine.load_state_dict(state_dict)
