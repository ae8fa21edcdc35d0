"""`Precision`: one object between a training loop and its optimizer, the same calls in every mode.

torch offers half weights without a loss scale, or a loss scale without half weights (`GradScaler` refuses half
gradients), and lets a skipped step move batch-norm statistics. Here one step is one transaction: weights, optimizer
state and running statistics move together, when every gradient is finite, or none of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.precision.averaging import data_parallel, is_sharded
from lowprec.precision.conditional import ConditionalStep
from lowprec.precision.health import Health, HealthProbe
from lowprec.precision.hooks import HalfHooks, device_of, has_half_hooks
from lowprec.precision.masters import master_of
from lowprec.precision.modes import Mode, mode_named
from lowprec.precision.overflow import OverflowWatch
from lowprec.precision.scale import ScalePolicy
from lowprec.precision.scaling import DeviceScaling, HostScaling, Scaling
from lowprec.precision.transforms import transforms_of
from lowprec.precision.updates import KEPT, UPDATES, Update
from lowprec.statistics import CopiedStatistics, HeldStatistics

ModelT = TypeVar("ModelT", bound=nn.Module)
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class _Bound:
    """What `prepare` ties together."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, probe: HealthProbe) -> None:
        self.model = model
        self.optimizer = optimizer
        self.hooks: HalfHooks | None = None
        self.update: Update | None = None
        self.probe = probe
        self.parallel: DistributedDataParallel | None = None
        self.scaling: Scaling | None = None
        self.unscaled: bool | Tensor | None = None  # whether the gradients that were unscaled already are finite
        self.held: HeldStatistics | CopiedStatistics = HeldStatistics(model)
        self.watch = OverflowWatch(model)
        self.step = ConditionalStep(optimizer)
        self.transforms = transforms_of(optimizer)
        self.transforms.managed = True


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
        health_every: of so many steps one is measured for `health`; 0 for none.
        synchronise: whether each step waits for the device to know whether it landed; by default on a CPU only. Where
            it does not, overflows are named by their gradient alone, and `ScaleFloorError` comes up to 16 steps late.

    Raises:
        ConfigError: an unknown mode, or values that contradict each other.
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
        health_every: int = 200,
        synchronise: bool | None = None,
    ) -> None:
        if isinstance(health_every, bool) or not isinstance(health_every, int) or health_every < 0:
            raise ConfigError(f"health_every is {health_every}; give a whole number of steps, or 0 for never")
        self.health_every = health_every
        self._steps = 0
        self._mode: Mode = mode_named(mode)
        self._policy = ScalePolicy(
            init_scale, growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis
        )
        self._synchronise = synchronise
        self._bound: _Bound | None = None

    @property
    def mode(self) -> str:
        """The mode's name."""
        return self._mode.name

    @property
    def scale(self) -> float:
        """The loss scale now; 1 in modes without one. Where steps do not synchronise, reading it does."""
        if not self._mode.scaled:
            return 1.0
        scaling = self._bound.scaling if self._bound else None
        return scaling.value if scaling else float(self._policy.init_scale)

    @property
    def last_overflow(self) -> str | None:
        """Where the last overflow began, in a phrase that names the layer; None if there was none."""
        scaling = self._bound.scaling if self._bound else None
        return scaling.last_overflow if scaling else None

    @property
    def health(self) -> Health | None:
        """The last step that was measured, or None before the first."""
        return None if self._bound is None else self._bound.probe.last

    def prepare(self, model: ModelT, optimizer: OptimizerT) -> tuple[ModelT, OptimizerT]:
        """Puts `model` and `optimizer` into this mode, in place, and returns the same two objects.

        In a mode with half weights all floating parameters and buffers become half, except those of norm layers and
        of each module's `wide_parameters`. In `fp16-master` the optimizer's groups hold float32 masters in their place
        with order, hyper-parameters and state kept; in the other half modes the parameters themselves, which are
        float32 while the optimizer steps. The model then narrows its floating inputs and widens its outputs by itself.
        Values loaded into the model later reach masters and Kahan terms through `load_state_dict` only.

        Raises:
            UnsupportedError: the model is prepared already, the optimizer is not this model's or needs a closure, or a
                parameter does not fit in half; nothing was changed.
        """
        self._check(model, optimizer)
        half: torch.dtype = getattr(torch, self._mode.half or "float16")
        bound = _Bound(model, optimizer, HealthProbe(model, half, self.health_every))
        if self._mode.half is not None:
            if self._mode.update is not None:
                bound.update = UPDATES[self._mode.update](model, optimizer, half)
            bound.hooks = HalfHooks(half, autocast=bound.update is None)
            bound.hooks.install(model)
        if self._mode.scaled:
            device = device_of(model)
            at_once = device.type == "cpu" if self._synchronise is None else self._synchronise
            policy, watch = self._policy, bound.watch
            bound.scaling = HostScaling(policy, watch) if at_once else DeviceScaling(policy, watch, device)
        self._bound = bound
        return model, optimizer

    def data_parallel(self, **options: Any) -> DistributedDataParallel:
        """The prepared model in torch's DistributedDataParallel, averaging half gradients without overflow.

        Gradients travel in float32: a sum of scaled half gradients need not be finite, and one divided by the number of
        processes before loses its small values. Micro-batches are averaged one by one, so `no_sync` is refused.
        Running statistics are not exchanged; use synchronised norms, or average the buffers.

        Args:
            options: as for DistributedDataParallel.

        Raises:
            UnsupportedError: there is no process group, or the model is wrapped already.
        """
        bound = self._prepared()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise UnsupportedError("data_parallel needs a process group; call torch.distributed.init_process_group")
        if bound.parallel is not None:
            raise UnsupportedError("the model is in DistributedDataParallel already")
        bound.parallel = data_parallel(bound.model, **options)
        return bound.parallel

    def compile(self, **options: Any) -> None:
        """Compiles the forward of the prepared model with `torch.compile`, once more at most for a measured step.

        Running statistics are then kept by copies of the buffers, not collected: the micro-batches of one step move
        them one after the other, and a skipped step puts them back.

        Args:
            options: as for `torch.compile`.

        Raises:
            UnsupportedError: weights would be narrowed in the forward on a CPU, whose compiled code torch gets wrong.
        """
        bound = self._prepared()
        if self._mode.half is not None and bound.update is None and device_of(bound.model).type == "cpu":
            raise UnsupportedError(
                f"compiled {self.mode} crashes on a CPU in torch {torch.__version__}; use fp16-master, or no compiler"
            )
        bound.held = CopiedStatistics(bound.model)
        bound.model.forward = torch.compile(bound.model.forward, **options)  # hooks stay outside

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
                stack.enter_context(bound.watch.forward())
            stack.enter_context(bound.probe.forward(self._steps, bound.scaling.factor if bound.scaling else 1.0))
            try:
                yield
            except BaseException:
                bound.held.discard()
                raise

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of the scaled loss; gradients add up in float32, still scaled, until `step`.

        A loss that is itself half holds the scale to 2^15, because the scale is its gradient; compute it from the
        model's output, which is float32.

        Args:
            loss: one number.
            retain_graph: keep what another backward through the same forward needs.

        Raises:
            UnsupportedError: the loss is not one number that depends on parameters, gradients were unscaled already,
                or they are averaged by a DistributedDataParallel that is not `data_parallel()`.
        """
        bound = self._prepared()
        if bound.unscaled is not None:
            raise UnsupportedError("backward after unscale would mix scaled and unscaled gradients; call step first")
        if bound.parallel is not None and not bound.parallel.require_backward_grad_sync:
            raise UnsupportedError("backward under no_sync() would lose the gradients of the other processes; leave it")
        if loss.numel() != 1 or not loss.requires_grad:
            raise UnsupportedError(
                f"the loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}; give one number that "
                "depends on the parameters"
            )
        # Activation checkpointing runs parts of the forward again in the backward: in the same arithmetic, and without
        # moving statistics a second time.
        with ExitStack() as stack:
            stack.enter_context(bound.held.recomputation())
            stack.enter_context(bound.probe.backward())
            if bound.hooks is None:
                torch.autograd.backward(loss, retain_graph=retain_graph)
                return
            stack.enter_context(bound.hooks.arithmetic(device_of(bound.model)))
            at_once = bound.update if bound.parallel is None else None
            stack.enter_context(bound.watch.backward(loss, lambda name: at_once.take(name) if at_once else None))
            scaled = loss * (bound.scaling.factor if bound.scaling else 1.0)
            # Not torch.autograd.backward: that is a torch function itself, so the mode would be closed while it runs.
            torch.autograd.Variable._execution_engine.run_backward(
                (scaled,), (torch.ones_like(scaled),), retain_graph, False, (), allow_unreachable=True,
                accumulate_grad=True,
            )  # fmt: skip
            self._take_averaged(bound)

    def _take_averaged(self, bound: _Bound) -> None:
        """Gradients of half weights that are there after a backward were averaged over processes by now."""
        if bound.update is None:
            return
        if bound.parallel is None and any(param.grad is not None for param in bound.update.params.values()):
            raise UnsupportedError(
                "the model is in a DistributedDataParallel that averages what has been taken already; "
                "make it with precision.data_parallel()"
            )
        bound.update.take(*bound.update.params)

    def zero_grad(self) -> None:
        """Drops the gradients of a step that will not be made. Not needed after `step`, which drops them itself."""
        self._drop_gradients(self._prepared())

    def unscale(self) -> None:
        """Divides the gradients by the scale now, once, for callers that look at them or change them before `step`.

        Afterwards they are float32, unscaled, and found at the parameters that the optimizer holds.

        Raises:
            UnsupportedError: there is no gradient, or one that did not come from `precision.backward`.
        """
        bound = self._prepared()
        if bound.unscaled is None:
            named = self._gradients(bound)
            bound.unscaled = bound.scaling is None or bound.scaling.judge(list(named), list(named.values()))

    def step(
        self, loss: Tensor | None = None, clip_norm: float | None = None, clip_value: float | None = None
    ) -> bool | Tensor:
        """One optimizer step: backward, unscale, check, clip, update, scale update; then all gradients are None.

        Gradients are multiplied by the exact 1/scale in float32. If any is not finite the step is skipped: weights,
        optimizer state and running statistics stay as they were, and the scale shrinks. The check reads one number
        back from the device.

        Args:
            loss: what to differentiate; None after `backward` calls.
            clip_norm: the gradients are scaled down to at most this total 2-norm, after unscaling.
            clip_value: each gradient is cut to [-clip_value, clip_value], after unscaling and before `clip_norm`.

        Returns:
            Whether the step landed: a bool on a CPU, a 0-d bool tensor on other devices. Always true in `fp32`.

        Raises:
            ScaleFloorError: the step overflowed at the floor of the scale; weights and buffers are untouched.
            UnsupportedError: there is no gradient, or one that did not come from `precision.backward`.
        """
        bound = self._prepared()
        for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; give a positive number, or None for no clipping")
        if loss is not None:
            self.backward(loss)
        self.unscale()
        landed = bound.unscaled
        assert landed is not None
        if bound.scaling is not None:
            with bound.held.recomputation():
                bound.scaling.explain(landed)
        if landed is not False:
            self._land(bound, landed, clip_norm, clip_value)
        bound.held.commit(landed)
        bound.probe.finish()
        self._steps += 1
        self._drop_gradients(bound)
        try:
            if bound.scaling is not None:
                bound.scaling.settle(landed)
        finally:
            bound.watch.reset()
        device = device_of(bound.model)
        return torch.tensor(landed, device=device) if isinstance(landed, bool) and device.type != "cpu" else landed

    def wide_weights(self) -> dict[str, Tensor]:
        """Every parameter by name as the optimizer knows it: float32 masters, weight plus Kahan term, else itself."""
        bound = self._prepared()
        known = bound.update.params if bound.update else {}
        return {
            name: bound.update.wide(name) if bound.update and name in known else param.detach()
            for name, param in bound.model.named_parameters()
        }

    def state_dict(self) -> dict[str, Any]:
        """Scale, its counters and what the half weights do not hold (masters, Kahan terms) by parameter name."""
        bound = self._prepared()
        return {
            "mode": self.mode,
            "steps": self._steps,
            **(bound.scaling.state() if bound.scaling else {"scale": 1.0}),
            **{kind: {} for kind in KEPT},
            **(bound.update.state() if bound.update else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, after the model's own state; half weights become the rounding of the masters.

        Raises:
            ConfigError: the state is of another mode, model or scale policy; nothing was changed.
        """
        bound = self._prepared()
        if state.get("mode") != self.mode:
            raise ConfigError(f"the precision state is of mode {state.get('mode')!r}, this is {self.mode!r}")
        for kind, held in (bound.update.state() if bound.update else {}).items():
            stored = state.get(kind, {})
            if set(stored) != set(held):
                name = min(set(stored) ^ set(held))
                raise ConfigError(f"the precision state is of another model: {name!r} is in one of the two only")
            for name, tensor in held.items():
                found, wanted = tuple(stored[name].shape), tuple(tensor.shape)
                if found != wanted:
                    raise ConfigError(
                        f"the precision state is of another model: {name!r} is {found} there, {wanted} here"
                    )
        if bound.scaling is not None:
            bound.scaling.load(state)
        self._steps = int(state["steps"])
        if bound.update is not None:
            bound.update.load(state)

    def _check(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self._bound is not None:
            raise UnsupportedError("this Precision has prepared a model already; make one Precision per model")
        if has_half_hooks(model):
            raise UnsupportedError("the model was prepared already; apply without_half_hooks to a copy to start afresh")
        if isinstance(optimizer, LBFGS):
            raise UnsupportedError("LBFGS evaluates the loss several times in a step; use an optimizer without closure")
        if self._mode.update is not None and any(is_sharded(param) for param in model.parameters()):
            raise UnsupportedError(
                f"{self.mode} keeps half weights, and FSDP shards float32 ones; use fp16-autocast or bf16 with it"
            )
        mine = {id(param) for param in model.parameters()}
        if not any(id(param) in mine for group in optimizer.param_groups for param in group["params"]):
            raise UnsupportedError("the optimizer holds no parameter of this model; build it from model.parameters()")

    def _prepared(self) -> _Bound:
        if self._bound is None:
            raise UnsupportedError("nothing is prepared; call precision.prepare(model, optimizer) first")
        return self._bound

    def _land(self, bound: _Bound, landed: bool | Tensor, clip_norm: float | None, clip_value: float | None) -> None:
        if bound.transforms.wait:
            landed = bool(landed)
            if not landed:
                return
        with bound.update.opened() if bound.update else nullcontext():
            bound.transforms.apply()
            params = [param for group in bound.optimizer.param_groups for param in group["params"]]
            if clip_value is not None:
                nn.utils.clip_grad_value_(params, clip_value)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(params, clip_norm)
            with bound.probe.update(bound.update.params if bound.update else {}):
                bound.step(landed)

    def _gradients(self, bound: _Bound) -> dict[str, Tensor]:
        """By the name of the parameter, where the model has it, else a number."""
        if bound.update is not None:
            bound.update.check(bound.optimizer)
            bound.update.present()
        params = [param for group in bound.optimizer.param_groups for param in group["params"]]
        params = [param for param in params if param.grad is not None]
        if not params:
            raise UnsupportedError("step found no gradient; pass the loss, or call precision.backward(loss) before it")
        if any(param.grad.is_sparse for param in params):
            raise UnsupportedError("a gradient is sparse; build the embedding with sparse=False")
        names = {id(master_of(param)): name for name, param in bound.model.named_parameters()}
        return {names.get(id(param), str(index)): param.grad for index, param in enumerate(params)}

    def _drop_gradients(self, bound: _Bound) -> None:
        bound.unscaled = None
        bound.transforms.discard()
        bound.optimizer.zero_grad(set_to_none=True)
        bound.model.zero_grad(set_to_none=True)
        if bound.update is not None:
            bound.update.forget()
