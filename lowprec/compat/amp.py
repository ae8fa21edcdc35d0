"""apex.amp's interface on `lowprec.Precision`: an apex script runs after changing one import.

    from lowprec.compat import amp                                # was: from apex import amp
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
    with amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
    optimizer.step()

O0 is fp32, O1 fp16-autocast, O2 fp16-master, O3 fp16-pure. What differs from apex is better or refused: a skipped step
leaves running statistics alone and says which layer overflowed; the scale has a floor (`ScaleFloorError`); `state_dict`
holds the masters, which apex lost; batch norms stay float32 at every level, gradients are None after a step, and one
loss scale serves all losses of an optimizer.
"""

from __future__ import annotations

import functools
import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowprec.compat.levels import mode_of, refuse_foreign, rounded_scale, scale_arguments
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.precision import Precision
from lowprec.precision.arithmetic import cast_floats, tensors_in

_log = logging.getLogger(__name__)
_sessions: list[_Session] = []
_enabled = True


class _Session:
    """One optimizer, the model whose parameters it holds, and the engine between them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision) -> None:
        self.precision = precision
        self.optimizer = optimizer
        self._stepping = False
        self._calls: list[ExitStack] = []
        precision.prepare(model, optimizer)
        # Scripts call the model without a context: the engine's is opened around each call.
        model.register_forward_pre_hook(self._enter, prepend=True)
        model.register_forward_hook(self._leave, always_call=True)
        self._step, self._zero_grad = optimizer.step, optimizer.zero_grad
        # Functions bound to the optimizer, because schedulers take `step` apart and bind it again.
        optimizer.step = types.MethodType(lambda _, closure=None: self._stepped(closure), optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = types.MethodType(lambda _, set_to_none=True: self._zeroed(), optimizer)  # type: ignore[method-assign]

    def _enter(self, module: nn.Module, args: Any) -> None:
        stack = ExitStack()
        if torch.is_grad_enabled():
            stack.enter_context(self.precision.forward())
        self._calls.append(stack)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._calls:
            self._calls.pop().close()

    def _stepped(self, closure: Callable[[], Any] | None) -> None:
        if self._stepping:
            self._step()
            return
        if closure is not None:
            raise UnsupportedError("an optimizer step with a closure cannot be skipped; call step() without one")
        scale = self.precision.scale
        self._stepping = True
        try:
            landed = bool(self.precision.step())
        finally:
            self._stepping = False
        if not landed:
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks whether it was called
            warnings.warn(
                f"step skipped at loss scale {scale:g}, overflow in {self.precision.last_overflow}; the scale is now "
                f"{self.precision.scale:g}",
                stacklevel=4,
            )

    def _zeroed(self) -> None:
        if self._stepping:
            self._zero_grad(set_to_none=True)
            return
        self._stepping = True
        try:
            self.precision.zero_grad()
        finally:
            self._stepping = False


class _ScaledLoss:
    """What `scale_loss` gives: the scaled loss, whose backward is the engine's."""

    def __init__(self, loss: Tensor, precision: Precision) -> None:
        self._loss = loss
        self._precision = precision

    def backward(self, gradient: None = None, retain_graph: bool | None = None, create_graph: bool = False) -> None:
        """Backward of the loss, scaled."""
        if gradient is not None or create_graph:
            raise UnsupportedError("scaled_loss.backward takes no gradient and makes no graph; only retain_graph")
        self._precision.backward(self._loss, retain_graph=bool(retain_graph))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss.detach() * self._precision.scale, name)

    def __float__(self) -> float:
        return float(self._loss.detach()) * self._precision.scale


def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | None = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: bool | str | None = None,
    master_weights: bool | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float = 2.0**24,
) -> Any:
    """Prepares models and optimizers, in place, and returns them nested as they came.

    Args:
        models: a module or a list of them.
        optimizers: one, a list, or None for models that only evaluate.
        enabled: False leaves everything as it is, here and in `scale_loss`.
        opt_level: `O0` to `O3`.
        cast_model_type: what the level says, or None.
        patch_torch_functions: likewise.
        keep_batchnorm_fp32: norms stay float32 at every level; False is refused.
        master_weights: overrides the level: O2 without is fp16-pure, O3 with is fp16-master.
        loss_scale: "dynamic" or a number, which is rounded down to a power of two, with a warning. At O3 1.0, at O0
            none, else dynamic.
        cast_model_outputs: outputs are float32; another type is refused.
        num_losses: one scale serves all.
        verbosity: 0 says nothing of the choices made.
        min_loss_scale: by default 2^-2, where `ScaleFloorError` is raised.
        max_loss_scale: the ceiling.

    Raises:
        ConfigError: an unknown level, or a value that is none.
        UnsupportedError: what this engine does not have, or an optimizer over several models.
    """
    global _enabled
    _enabled = enabled
    _sessions.clear()
    if not enabled:
        return models if optimizers is None else (models, optimizers)
    mode = mode_of(opt_level, master_weights)
    refuse_foreign(opt_level, cast_model_type, patch_torch_functions, keep_batchnorm_fp32, cast_model_outputs)
    scale = scale_arguments(opt_level, loss_scale, min_loss_scale, max_loss_scale)
    given_models = list(models) if isinstance(models, Sequence) else [models]
    given_optimizers = (
        [] if optimizers is None else list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    )
    pairs = [(_owner(optimizer, given_models), optimizer) for optimizer in given_optimizers]
    for model in given_models:
        if all(model is not owner for owner, _ in pairs):
            # It only evaluates: no masters, and an optimizer that nobody sees.
            frozen = Precision("fp16-pure" if mode == "fp16-master" else mode, **scale)
            frozen.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for model, optimizer in pairs:
        _sessions.append(_Session(model, optimizer, Precision(mode, **scale)))
    if verbosity:
        _log.info("%s is %s; %d losses share a scale", opt_level, mode, num_losses)
    return models if optimizers is None else (models, optimizers)


@contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: Optimizer | Sequence[Optimizer],
    loss_id: int = 0,
    model: nn.Module | None = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Any]:
    """Inside, `scaled_loss.backward()`; afterwards gradients are unscaled, float32, at `master_params(optimizer)`.

    Args:
        loss: one number.
        optimizers: one that was initialized, alone or in a list.
        loss_id: all losses share a scale.
        model: not needed.
        delay_unscale: leave gradients scaled; for all micro-batches but the last.
        delay_overflow_check: the check comes with `optimizer.step()` in any case.

    Raises:
        UnsupportedError: several optimizers, or one that was not initialized.
    """
    if not _enabled:
        yield loss
        return
    held = _listed(optimizers)
    if len(held) != 1:
        raise UnsupportedError(
            f"scale_loss got {len(held)} optimizers; a backward belongs to one: put the models into one module with "
            "one optimizer, or take the losses apart"
        )
    precision = _session_of(held[0]).precision
    yield _ScaledLoss(loss, precision)
    if not delay_unscale:
        precision.unscale()


def master_params(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters that the optimizer moves: float32 masters at O2."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict(destination: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loss scales as apex names them, and all of the engine's state, masters included."""
    state = {} if destination is None else destination
    for index, session in enumerate(_sessions):
        own = session.precision.state_dict()
        state[f"loss_scaler{index}"] = {"loss_scale": own["scale"], "unskipped": own.get("landed_in_a_row", 0)}
        state[f"precision{index}"] = own
    return state


def load_state_dict(state: dict[str, Any]) -> None:
    """Restores `state_dict()`, after the models and optimizers; of apex's own, which has no masters, the loss scale.

    Raises:
        ConfigError: another number of optimizers, another mode or another model.
    """
    count = sum(name.startswith("loss_scaler") for name in state)
    if count != len(_sessions):
        raise ConfigError(f"the amp state is of {count} loss scalers, here are {len(_sessions)}; initialize as many")
    for index, session in enumerate(_sessions):
        own = state.get(f"precision{index}")
        if own is None:
            scaler = state[f"loss_scaler{index}"]
            own = session.precision.state_dict()
            own |= {"scale": rounded_scale(scaler["loss_scale"]), "landed_in_a_row": scaler["unskipped"]}
        session.precision.load_state_dict(own)


def half_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: floating arguments become half."""
    return _casting(function, lambda arguments: torch.float16)


def float_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: floating arguments become float32."""
    return _casting(function, lambda arguments: torch.float32)


def promote_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: floating arguments become the widest type among them."""

    def widest(arguments: Any) -> torch.dtype:
        types = [tensor.dtype for tensor in tensors_in(arguments) if tensor.is_floating_point()]
        return functools.reduce(torch.promote_types, types, torch.float16)

    return _casting(function, widest)


def register_half_function(module: Any, name: str) -> None:
    """Puts `half_function` around `module.name`."""
    setattr(module, name, half_function(getattr(module, name)))


def register_float_function(module: Any, name: str) -> None:
    """Puts `float_function` around `module.name`."""
    setattr(module, name, float_function(getattr(module, name)))


def register_promote_function(module: Any, name: str) -> None:
    """Puts `promote_function` around `module.name`."""
    setattr(module, name, promote_function(getattr(module, name)))


def _casting(function: Callable[..., Any], wanted: Callable[[Any], torch.dtype]) -> Callable[..., Any]:
    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if not _enabled:
            return function(*args, **kwargs)
        args, kwargs = cast_floats((args, kwargs), wanted((args, kwargs)))
        return function(*args, **kwargs)

    return cast


def _owner(optimizer: Optimizer, models: list[nn.Module]) -> nn.Module:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    owners = [model for model in models if any(id(param) in held for param in model.parameters())]
    if len(owners) != 1:
        raise UnsupportedError(
            f"an optimizer holds parameters of {len(owners)} of the {len(models)} models; it must be one: put them "
            "into one module"
        )
    return owners[0]


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _session_of(optimizer: Optimizer) -> _Session:
    for session in _sessions:
        if session.optimizer is optimizer:
            return session
    raise UnsupportedError("this optimizer did not go through amp.initialize; pass it there")
