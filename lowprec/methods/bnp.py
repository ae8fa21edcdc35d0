"""The method `bnp`: no batch norm; gradients are preconditioned as if there were one before every layer.

For a layer y = W a + b with inputs of mean mu and variance sigma^2 per column, a step on W and b preconditioned with
P P^T is a plain step on the same layer written for (a - mu) / sigma. Forward, evaluation and export are those of the
plain network: nothing is normalised and there is no noise from the batch, so any batch size trains, one included.

With G, g the gradients of W and b, v = variance + eps1 max(variance) + eps2 and q^2 = max(columns / rows, 1):

    G <- (G - g mu^T) / (q^2 v),    g <- g / q^2 - G mu    (the new G)

In a convolution each kernel position of a channel has the channel's statistics, or exactly its own ("patch").

Source: Lange, Helfrich, Ye, Batch Normalization Preconditioning, JMLR 23(72), 2022. The authors published no code; the
constants are recalled, not read, and the running variance is our own (see `InputStatistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.input_statistics import Columns, InputStatistics, measured, pooled, statistics_shape
from lowprec.methods.method import Handle
from lowprec.methods.norm_free import add_bias, initialise, remove_batch_norms, why_not_plain
from lowprec.methods.rewrite import modules_at, modules_with_paths
from lowprec.methods.stepping import Layer, held_by
from lowprec.precision.averaging import is_sharded
from lowprec.precision.masters import master_of
from lowprec.precision.transforms import GradientTransforms, transforms_of
from lowprec.report import ChangeReport

Rows = Literal["positions", "samples"]

_CHILD = "input_statistics"


def convert_bnp(
    model: nn.Module,
    report: ChangeReport,
    *,
    columns: Columns = "channel",
    remove_norms: bool = True,
    init: bool = True,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Takes the batch norms out and makes every conv and linear layer ready for preconditioning.

    Layers get a bias where they have none, because centring acts through it, and `input_statistics`.

    Args:
        model: a private copy.
        report: gets a row per thing done or left.
        columns: statistics of a convolution's input per "channel", an approximation at zero padding and at strides,
            or exactly, per "patch" element.
        remove_norms: whether batch norms become Identity; the network then is the one that BN was meant to help.
        init: whether weights are drawn anew for a network without norms, see `norm_free.initialise`.
        skip: module paths that are not preconditioned.

    Raises:
        ConfigError: an unknown `columns`, or a path in `skip` that there is not.
        UnsupportedError: there is no conv or linear layer.
    """
    if columns not in ("channel", "patch"):
        raise ConfigError(f"bnp: columns is {columns!r}; choose channel or patch")
    skipped = modules_at(model, skip, "skip")
    if remove_norms:
        remove_batch_norms(model, report)
    statistics: dict[int, InputStatistics] = {}  # by weight: tied layers share them
    for path, layer in modules_with_paths(model):
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        reason = "left out by skip" if layer in skipped else _why_not(layer)
        if reason is not None:
            report.refuse(path, f"is not preconditioned: {reason}")
            continue
        added = " and got a bias of zeros, which centring needs" if add_bias(layer) else ""
        if id(layer.weight) not in statistics:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            shape = statistics_shape(layer, columns)
            statistics[id(layer.weight)] = InputStatistics(shape, dtype, layer.weight.device)
        layer.add_module(_CHILD, statistics[id(layer.weight)].train(layer.training))
        report.change(path, f"its gradients are preconditioned by the statistics of its input{added}")
    if not statistics:
        raise UnsupportedError(f"method 'bnp' found no conv or linear layer in {type(model).__name__}")
    if init and remove_norms:
        initialise(model, report)
    return model


def _why_not(layer: nn.Module) -> str | None:
    if isinstance(layer, _ConvTransposeNd):
        return "the method is not defined for transposed convolutions"
    return why_not_plain(layer)


def attach_bnp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rho: float = 0.99,
    eps1: float = 1e-2,
    eps2: float = 1e-4,
    rows: Rows = "positions",
    sync: bool = True,
) -> Handle:
    """Watches what enters the layers and preconditions their gradients before every step.

    After averaging and unscaling; before clipping where `Precision` clips. Weight decay of the optimizer is added
    afterwards, so it is not preconditioned.

    Args:
        model: converted.
        optimizer: any, made from its parameters.
        rho: decay of the running statistics.
        eps1: added to each variance, times the layer's largest.
        eps2: added to each variance.
        rows: what the q of a convolution counts: output "positions" of all samples, or "samples".
        sync: with several processes, whether statistics are those of all of them. Without it processes whose
            gradients are averaged drift apart.

    Raises:
        ConfigError: a constant out of range, or an optimizer of other parameters.
        UnsupportedError: parameters are sharded.
    """
    if not 0 <= rho < 1 or not eps1 >= 0 or not eps2 > 0 or rows not in ("positions", "samples"):
        raise ConfigError(
            f"bnp: rho={rho}, eps1={eps1}, eps2={eps2}, rows={rows!r}; rho is from 0 to below 1, eps1 at least 0, "
            "eps2 above 0, rows positions or samples"
        )
    named = [(path, layer) for path, layer in model.named_modules() if isinstance(_statistics(layer), InputStatistics)]
    layers = [Layer(f"{path}.weight", layer) for path, layer in named]
    owned = held_by(optimizer, layers, "attach('bnp')")
    if any(is_sharded(param) for layer in owned for param in layer.parameters):
        raise UnsupportedError("bnp needs whole gradients, and these parameters are sharded; use data_parallel")
    modules = [layer.module for layer in owned]
    return Handle(_Preconditioner(modules, transforms_of(optimizer), rho, eps1, eps2, rows, sync).install(optimizer))


def precondition(
    grad: Tensor, bias_grad: Tensor | None, mean: Tensor, variance: Tensor, q2: float, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The formulas of the module; `variance` is what is divided by, eps included.

    Args:
        grad: of the weight, (outputs, columns...).
        bias_grad: (outputs,); None for a layer without a bias that moves, which is scaled but not centred.
        mean: (inputs,) per channel or (inputs, kernel...), inputs of all groups.
        variance: as `mean`.
        q2: q squared.
        groups: of a convolution.
    """
    rows_GOK = grad.reshape(groups, grad.shape[0] // groups, -1)
    taps = rows_GOK.shape[2] * groups // mean.numel()  # kernel positions that share one mean
    mean_G1K, variance_G1K = (
        value.reshape(-1, 1).expand(-1, taps).reshape(groups, 1, -1).to(grad.dtype) for value in (mean, variance)
    )
    if bias_grad is None:
        return (rows_GOK / (q2 * variance_G1K)).reshape(grad.shape), None
    bias_GO1 = bias_grad.reshape(groups, -1, 1)
    new_GOK = (rows_GOK - mean_G1K * bias_GO1) / (q2 * variance_G1K)
    new_GO1 = bias_GO1 / q2 - (new_GOK * mean_G1K).sum(2, keepdim=True)
    return new_GOK.reshape(grad.shape), new_GO1.reshape(bias_grad.shape)


class _Preconditioner:
    """A `GradientTransform`: statistics from the forwards of a step, then the gradients.

    Layers are known by their `InputStatistics`: those that share a weight share them.
    """

    def __init__(
        self,
        modules: list[Any],
        transforms: GradientTransforms,
        rho: float,
        eps1: float,
        eps2: float,
        rows: Rows,
        sync: bool,
    ) -> None:
        self._modules = modules
        self._owners: dict[InputStatistics, Any] = {}
        for module in modules:
            self._owners.setdefault(_statistics(module), module)
        self._parts: dict[InputStatistics, list[Tensor]] = {statistics: [] for statistics in self._owners}
        self._transforms = transforms
        self._rho, self._eps1, self._eps2, self._rows, self._sync = rho, eps1, eps2, rows, sync
        self._saw_backward = False

    def install(self, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        """Returns what takes it off."""
        removers = self._transforms.add(optimizer, self)
        removers += [module.register_forward_pre_hook(self._observe).remove for module in self._modules]
        for module in self._owners.values():
            removers.append(module.weight.register_post_accumulate_grad_hook(self._backward_came).remove)
        return removers

    waits = True  # statistics are kept on the host, and only those of steps that land

    def apply(self) -> None:
        """Statistics first, of all layers in one exchange; then gradients."""
        for statistics, rows in self._take_statistics().items():
            module = self._owners[statistics]
            weight = master_of(module.weight)
            bias = None if module.bias is None else master_of(module.bias)
            if weight.grad is None:
                continue
            divisor = statistics.variance + self._eps1 * statistics.variance.max() + self._eps2
            q2 = max(weight[0].numel() / rows, 1.0)
            bias_grad = None if bias is None else bias.grad
            grad, new = precondition(weight.grad, bias_grad, statistics.mean, divisor, q2, getattr(module, "groups", 1))
            weight.grad.copy_(grad)
            if bias_grad is not None and new is not None:
                bias_grad.copy_(new)

    def discard(self) -> None:
        """The next forward begins a step."""
        for parts in self._parts.values():
            parts.clear()
        self._saw_backward = False

    def _take_statistics(self) -> dict[InputStatistics, float]:
        """Moves the running statistics of all layers that were used; returns the rows that each saw."""
        flat = [pooled(parts) if parts else _nothing(statistics) for statistics, parts in self._parts.items()]
        if self._sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = _of_all_processes(flat)
        rows = {}
        for statistics, found in zip(self._parts, flat, strict=True):
            elements, samples, positions = found[:3].tolist()
            if elements:
                mean, squares = found[3:].chunk(2)
                statistics.take_in(mean, squares / elements, self._rho)
                rows[statistics] = samples if self._rows == "samples" else positions
        return rows

    def _observe(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training or not torch.is_grad_enabled():  # checkpointing runs forward once without gradients
            return
        if self._is_new_step():
            self.discard()
        statistics = _statistics(module)
        columns: Columns = "patch" if statistics.mean.dim() > 1 else "channel"
        self._parts[statistics].append(measured(module, args[0], columns))

    def _is_new_step(self) -> bool:
        """Whether gradients were dropped without a step; a `Precision` says so itself."""
        if self._transforms.managed or not self._saw_backward:
            return False
        return all(module.weight.grad is None for module in self._owners.values())

    def _backward_came(self, param: Tensor) -> None:
        self._saw_backward = True


def _statistics(layer: nn.Module) -> Any:
    return layer._modules.get(_CHILD)


def _nothing(statistics: InputStatistics) -> Tensor:
    mean = statistics.mean
    return torch.zeros(3 + 2 * mean.numel(), dtype=torch.float64, device=mean.device)


def _of_all_processes(flat: list[Tensor]) -> list[Tensor]:
    """Pools each layer's statistics over the processes, through one gather of one message."""
    message = torch.cat(flat)
    gathered = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, message)
    sizes = [part.numel() for part in flat]
    return [pooled(parts) for parts in zip(*(torch.split(rank, sizes) for rank in gathered), strict=True)]
