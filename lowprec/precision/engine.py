"""`Precision`: one object between a training loop and its optimizer, the same calls in every mode.

torch offers half weights without a loss scale, or a loss scale without half weights (`GradScaler` refuses half
gradients), and lets a skipped step move batch-norm statistics. Here one step is one transaction: weights, optimizer
state and running statistics move together, when every gradient is finite, or none of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lowprec.errors import ConfigError, ScaleFloorError, UnsupportedError
from lowprec.precision.hooks import HalfHooks, device_of, has_half_hooks
from lowprec.precision.masters import master_of, weights_from_masters
from lowprec.precision.modes import Mode, mode_named
from lowprec.precision.narrow import narrow_
from lowprec.precision.overflow import OverflowWatch
from lowprec.precision.scale import LossScale, ScalePolicy, is_power_of_two
from lowprec.statistics import HeldStatistics

ModelT = TypeVar("ModelT", bound=nn.Module)
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class _Bound:
    """What `prepare` ties together."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.hooks: HalfHooks | None = None
        self.with_master: dict[str, nn.Parameter] = {}
        self.held = HeldStatistics(model)
        self.watch = OverflowWatch(model)


class Precision:
    """Runs a training loop in one of `MODES`.

    ```
    model, optimizer = precision.prepare(model, optimizer)
    with precision.forward():
        loss = criterion(model(x), y)
    landed = precision.step(loss)
    ```

    Args:
        mode: a name in `MODES`. In `fp32` the same calls do what plain torch does: no scale, and a non-finite
            gradient is not hidden, it reaches the weights.
        init_scale: see `ScalePolicy`, as for the arguments that follow. All scales are powers of two.

    Raises:
        ConfigError: an unknown mode, or values that contradict each other.
        UnsupportedError: a reserved mode that this version does not have.
    """

    def __init__(
        self,
        mode: str = "fp16-master",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 2.0**-2,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
    ) -> None:
        self._mode: Mode = mode_named(mode)
        self._scale = LossScale.start(
            ScalePolicy(init_scale, growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis)
        )
        self._last_overflow: str | None = None
        self._last_landed = True
        self._bound: _Bound | None = None

    @property
    def mode(self) -> str:
        """The mode's name."""
        return self._mode.name

    @property
    def scale(self) -> float:
        """The loss scale now; 1 in modes without one."""
        return self._scale.value if self._mode.scaled else 1.0

    @property
    def last_overflow(self) -> str | None:
        """Where the last overflow began, in a phrase that names the layer; None if there was none."""
        return self._last_overflow

    def prepare(self, model: ModelT, optimizer: OptimizerT) -> tuple[ModelT, OptimizerT]:
        """Puts `model` and `optimizer` into this mode, in place, and returns the same two objects.

        In a mode with half weights all floating parameters and buffers become half, except those of norm layers and
        of each module's `wide_parameters`, and the optimizer's groups hold float32 masters in their place with order,
        hyper-parameters and state kept. The model then narrows its floating inputs and widens its outputs by itself.
        Values loaded into the model later reach the masters through `load_state_dict` only.

        Raises:
            UnsupportedError: the model is prepared already, the optimizer is not this model's or needs a closure, or a
                parameter does not fit in half; nothing was changed.
        """
        self._check(model, optimizer)
        bound = _Bound(model, optimizer)
        if self._mode.half is not None:
            half: torch.dtype = getattr(torch, self._mode.half)
            if self._mode.narrow_weights:
                bound.with_master = narrow_(model, optimizer, half)
            bound.hooks = HalfHooks(half, autocast=not self._mode.narrow_weights)
            bound.hooks.install(model)
        self._bound = bound
        return model, optimizer

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Wraps the forward and the loss of one (micro-)batch.

        Running statistics of norms in training mode are held back until a step lands; several blocks before one step
        are its micro-batches. A block that raises discards what was held.
        """
        bound = self._prepared()
        with ExitStack() as stack:
            stack.enter_context(bound.held.forward())
            if bound.hooks is not None:
                stack.enter_context(bound.hooks.arithmetic(device_of(bound.model)))
            if self._mode.scaled:
                stack.enter_context(bound.watch.forward(armed=not self._last_landed or self._scale.exhausted))
            try:
                yield
            except BaseException:
                bound.held.discard()
                raise

    def backward(self, loss: Tensor) -> None:
        """Backward of the scaled loss; gradients add up in float32, still scaled, until `step`.

        A loss that is itself half holds the scale to 2^15, because the scale is its gradient; compute it from the
        model's output, which is float32.

        Raises:
            UnsupportedError: the loss is not one number that depends on parameters.
        """
        bound = self._prepared()
        if loss.numel() != 1 or not loss.requires_grad:
            raise UnsupportedError(
                f"the loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}; give one number that "
                "depends on the parameters"
            )
        # Activation checkpointing runs parts of the forward again in the backward: in the same arithmetic, and without
        # moving statistics a second time.
        with ExitStack() as stack:
            stack.enter_context(bound.held.recomputation())
            if bound.hooks is None:
                torch.autograd.backward(loss)
                return
            stack.enter_context(bound.hooks.arithmetic(device_of(bound.model)))
            stack.enter_context(bound.watch.backward(loss))
            scaled = loss * self.scale
            # Not torch.autograd.backward: that is a torch function itself, so the mode would be closed while it runs.
            torch.autograd.Variable._execution_engine.run_backward(
                (scaled,), (torch.ones_like(scaled),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def step(self, loss: Tensor | None = None, clip_norm: float | None = None) -> bool | Tensor:
        """One optimizer step: backward, unscale, check, clip, update, scale update; then all gradients are None.

        Gradients are multiplied by the exact 1/scale in float32. If any is not finite the step is skipped: weights,
        optimizer state and running statistics stay as they were, and the scale shrinks. The check reads one number
        back from the device.

        Args:
            loss: what to differentiate; None after `backward` calls.
            clip_norm: the gradients are scaled down to at most this total 2-norm, after unscaling.

        Returns:
            Whether the step landed: a bool on a CPU, a 0-d bool tensor on other devices. Always true in `fp32`.

        Raises:
            ScaleFloorError: the step overflowed at the floor of the scale; weights and buffers are untouched.
            UnsupportedError: there is no gradient, or one that did not come from `precision.backward`.
        """
        bound = self._prepared()
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm is {clip_norm}; give a positive number, or None for no clipping")
        if loss is not None:
            self.backward(loss)
        params = self._parameters_with_gradient(bound)
        landed = not self._mode.scaled or self._unscale(params)
        if landed:
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(params, clip_norm)
            bound.optimizer.step()
            weights_from_masters(bound.with_master.values())
        else:
            self._last_overflow = bound.watch.explain(self.scale)
        bound.held.commit(landed)
        self._drop_gradients(bound)
        self._last_landed = landed
        self._update_scale(landed)
        device = device_of(bound.model)
        return landed if device.type == "cpu" else torch.tensor(landed, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Scale, its counters and the float32 masters by parameter name: what weights and optimizer do not hold."""
        bound = self._prepared()
        return {
            "mode": self.mode,
            "scale": self.scale,
            "landed_in_a_row": self._scale.landed_in_a_row,
            "overflows_left": self._scale.overflows_left,
            "last_landed": self._last_landed,
            "masters": {name: master_of(param).detach() for name, param in bound.with_master.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; half weights become the rounding of the masters.

        Raises:
            ConfigError: the state is of another mode, model or scale policy; nothing was changed.
        """
        bound = self._prepared()
        masters = state.get("masters", {})
        if state.get("mode") != self.mode:
            raise ConfigError(f"the precision state is of mode {state.get('mode')!r}, this is {self.mode!r}")
        if set(masters) != set(bound.with_master):
            name = min(set(masters) ^ set(bound.with_master))
            raise ConfigError(f"the precision state is of another model: {name!r} has a master in one of the two only")
        for name, param in bound.with_master.items():
            if masters[name].shape != param.shape:
                found, wanted = tuple(masters[name].shape), tuple(param.shape)
                raise ConfigError(f"the precision state is of another model: {name!r} is {found} there, {wanted} here")
        self._load_scale(state)
        self._last_landed = bool(state["last_landed"])
        with torch.no_grad():
            for name, param in bound.with_master.items():
                master_of(param).copy_(masters[name])
        weights_from_masters(bound.with_master.values())

    def _load_scale(self, state: dict[str, Any]) -> None:
        if not self._mode.scaled:
            return
        policy, value = self._scale.policy, state["scale"]
        if not is_power_of_two(value) or not policy.min_scale <= value <= policy.max_scale:
            raise ConfigError(f"the stored loss scale {value} is outside {policy.min_scale} to {policy.max_scale}")
        self._scale = LossScale(policy, float(value), int(state["landed_in_a_row"]), int(state["overflows_left"]))

    def _check(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self._bound is not None:
            raise UnsupportedError("this Precision has prepared a model already; make one Precision per model")
        if has_half_hooks(model):
            raise UnsupportedError("the model was prepared already; apply without_half_hooks to a copy to start afresh")
        if isinstance(optimizer, LBFGS):
            raise UnsupportedError("LBFGS evaluates the loss several times in a step; use an optimizer without closure")
        mine = {id(param) for param in model.parameters()}
        if not any(id(param) in mine for group in optimizer.param_groups for param in group["params"]):
            raise UnsupportedError("the optimizer holds no parameter of this model; build it from model.parameters()")

    def _prepared(self) -> _Bound:
        if self._bound is None:
            raise UnsupportedError("nothing is prepared; call precision.prepare(model, optimizer) first")
        return self._bound

    def _parameters_with_gradient(self, bound: _Bound) -> list[Tensor]:
        for name, param in bound.with_master.items():
            if param.grad is not None:
                raise UnsupportedError(
                    f"{name!r} has a gradient that is not scaled: it came from loss.backward(); "
                    "use precision.backward(loss) or precision.step(loss)"
                )
        params: list[Tensor] = [param for group in bound.optimizer.param_groups for param in group["params"]]
        if self._mode.narrow_weights and any(param.dtype == torch.float16 for param in params):
            raise UnsupportedError("a half parameter joined the optimizer after prepare; add all parameters before it")
        params = [param for param in params if param.grad is not None]
        if not params:
            raise UnsupportedError("step found no gradient; pass the loss, or call precision.backward(loss) before it")
        if any(param.grad is not None and param.grad.is_sparse for param in params):
            raise UnsupportedError("a gradient is sparse; build the embedding with sparse=False")
        return params

    @torch.no_grad()
    def _unscale(self, params: list[Tensor]) -> bool:
        """Multiplies gradients by 1/scale and says whether all are finite."""
        grads = [param.grad for param in params if param.grad is not None]
        torch._foreach_mul_(grads, 1.0 / self.scale)
        largest = torch._foreach_norm(grads, float("inf"))  # NaN and infinity survive a maximum
        return bool(torch.stack([value.to(largest[0].device) for value in largest]).isfinite().all())

    def _drop_gradients(self, bound: _Bound) -> None:
        bound.optimizer.zero_grad(set_to_none=True)
        bound.model.zero_grad(set_to_none=True)

    def _update_scale(self, landed: bool) -> None:
        bound = self._prepared()
        bound.watch.reset()
        if not self._mode.scaled:
            return
        if not landed and self._scale.exhausted:
            raise ScaleFloorError(
                f"the loss scale is at its floor of {self.scale:g} and gradients still overflow, first in "
                f"{self._last_overflow}; weights and buffers are as before this step: lower the learning rate, "
                "normalise that layer, or keep it wide"
            )
        self._scale = self._scale.update(landed)
