"""How half weights take what an optimizer makes of them.

Every optimizer of torch works in float32 here, whatever it is: its arithmetic and its state are float32 (an Adam in
half divides by an eps that is zero), and it sees float32 parameters. Where those come from is what the entries of
`UPDATES` differ in. `master`: from float32 copies that last, which the optimizer holds instead of the parameters. The
others: from the half parameters, as float32 stand-ins that exist during a step only; what is then rounded to half is
lost (`nearest`), kept in a second half number (`kahan`), or kept on average (`stochastic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowprec.errors import UnsupportedError
from lowprec.precision.masters import kahan_term_of, make_kahan_term, master_of, set_master, weights_from_masters
from lowprec.precision.narrow import exchange, narrow_, swap_in_masters, widen_state
from lowprec.precision.stochastic import stochastic_round

# The Kahan term is kept in units of 2^-11: unscaled, the term of a weight below 2^-3 would be subnormal.
_KAHAN_UNIT = 2.0**-11


KEPT = ("masters", "kahan_terms")
"""What an update may keep beside the weights."""

Kept = dict[str, dict[str, Tensor]]
"""Tensors by parameter name, by one of `KEPT`."""


class Update(Protocol):
    """Half weights and how they are updated; made by one of `UPDATES` while the model is narrowed."""

    params: dict[str, nn.Parameter]
    """The half parameters that the optimizer moves, by name."""

    def check(self, optimizer: Optimizer) -> None:
        """Raises `UnsupportedError` if parameters or gradients are there that this cannot move."""

    def take(self, *names: str) -> None:
        """Adds the half gradients of those of these parameters that are moved to their float32 gradients."""

    def present(self) -> None:
        """Puts float32 gradients where the optimizer looks for them."""

    def forget(self) -> None:
        """Drops all gradients."""

    def opened(self) -> Any:
        """A context in which the optimizer's parameters and gradients are float32; half weights follow at its end."""

    def wide(self, name: str) -> Tensor:
        """The value of a parameter as the optimizer knows it, float32."""

    def state(self) -> Kept:
        """What has to be saved besides weights and optimizer."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `state()` gave; names and shapes have been checked."""


def _refuse_unscaled(params: Mapping[str, nn.Parameter]) -> None:
    for name, param in params.items():
        if param.grad is not None:
            raise UnsupportedError(
                f"{name!r} has a gradient that is not scaled: it came from loss.backward(); "
                "use precision.backward(loss) or precision.step(loss)"
            )


def _refuse_strangers(optimizer: Optimizer, known: set[int]) -> None:
    held = (param for group in optimizer.param_groups for param in group["params"])
    if any(param.dtype == torch.float16 and id(param) not in known for param in held):
        raise UnsupportedError("a half parameter joined the optimizer after prepare; add all parameters before it")


class Masters:
    """Float32 copies that last."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, half: torch.dtype) -> None:
        self.params = narrow_(model, optimizer, half, before=lambda params: swap_in_masters(optimizer, params))

    def check(self, optimizer: Optimizer) -> None:
        """Every gradient went to a master, and every parameter has one."""
        _refuse_unscaled(self.params)
        _refuse_strangers(optimizer, set())

    def take(self, *names: str) -> None:
        """The gradient of a parameter becomes, or is added to, that of its master."""
        for name in names:
            param = self.params.get(name)
            if param is not None and param.grad is not None:
                master = master_of(param)
                grad = param.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def present(self) -> None:
        """They are there already."""

    def forget(self) -> None:
        """Masters are the optimizer's, which drops them."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The optimizer holds the masters; at the end weights are their rounding."""
        yield
        weights_from_masters(self.params.values())

    def wide(self, name: str) -> Tensor:
        """The master."""
        return master_of(self.params[name]).detach()

    def state(self) -> Kept:
        """The masters."""
        return {"masters": {name: self.wide(name) for name in self.params}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Half weights become the rounding of the masters."""
        with torch.no_grad():
            for name, param in self.params.items():
                master_of(param).copy_(state["masters"][name])
        weights_from_masters(self.params.values())


class InPlace:
    """Half parameters in whose place the optimizer finds float32 stand-ins while it steps.

    Between steps the optimizer holds the parameters themselves and the stand-ins hold no memory. Gradients add up in
    float32 beside the parameters (`Tensor.grad_dtype` lets a half parameter show one). A parameter never changes its
    type or its memory, which others have pointers and hooks to.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, half: torch.dtype) -> None:
        self.params = narrow_(model, optimizer, half, before=self._take)
        self._optimizer = optimizer
        self._stand_ins = {name: nn.Parameter(torch.empty(0, device=p.device)) for name, p in self.params.items()}
        self._grads: dict[str, Tensor] = {}
        widen_state(optimizer)
        # torch casts loaded state to the type of the parameter, which has to be float32 then.
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: self._lend())
        optimizer.register_load_state_dict_post_hook(lambda optimizer: self._return())

    def check(self, optimizer: Optimizer) -> None:
        """Every gradient was taken, and every half parameter is known."""
        _refuse_unscaled(self.params)
        _refuse_strangers(optimizer, {id(param) for param in self.params.values()})

    def take(self, *names: str) -> None:
        """Gradients are kept aside, in float32."""
        for name in names:
            param = self.params.get(name)
            if param is not None and param.grad is not None:
                grad = param.grad.float()
                self._grads[name] = self._grads[name].add_(grad) if name in self._grads else grad
                param.grad = None

    def present(self) -> None:
        """Parameters show their float32 gradients."""
        for name, grad in self._grads.items():
            self.params[name].grad_dtype = torch.float32
            self.params[name].grad = grad
        self._grads.clear()

    def forget(self) -> None:
        """The next gradient is half again."""
        self._grads.clear()
        for param in self.params.values():
            param.grad = None
            param.grad_dtype = param.dtype

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The optimizer holds stand-ins; if that ends in an error the weights are as they were before."""
        self._lend()
        try:
            yield
            for name, param in self.params.items():
                self._round(name, param.data, self._stand_ins[name].data)
        finally:
            self._return()

    def wide(self, name: str) -> Tensor:
        """The half value, in float32."""
        return self.params[name].detach().float()

    def state(self) -> Kept:
        """Nothing: the weights are all there is."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""

    def _take(self, params: Mapping[str, nn.Parameter]) -> None:
        """Called with the parameters before they are half."""

    def _lend(self) -> None:
        self._return()
        for name, param in self.params.items():
            stand_in = self._stand_ins[name]
            stand_in.data = self.wide(name)
            stand_in.grad, param.grad = param.grad, None
            set_master(param, stand_in)
        exchange(self._optimizer, {id(param): self._stand_ins[name] for name, param in self.params.items()})

    def _round(self, name: str, half: Tensor, wide: Tensor) -> None:
        """Puts what the optimizer made of a weight into it."""
        half.copy_(wide)

    def _return(self) -> None:
        exchange(self._optimizer, {id(stand_in): self.params[name] for name, stand_in in self._stand_ins.items()})
        for name, stand_in in self._stand_ins.items():
            set_master(self.params[name], None)
            stand_in.grad = None
            stand_in.data = stand_in.data.new_empty(0)


class Stochastic(InPlace):
    """Rounds at random, with the numbers of torch's generator: the mean of many weights takes every update."""

    def _round(self, name: str, half: Tensor, wide: Tensor) -> None:
        half.copy_(stochastic_round(wide))


class Kahan(InPlace):
    """Keeps what rounding cut off in a half number per weight, 22 bits in all: w = half + term * 2^-11."""

    def wide(self, name: str) -> Tensor:
        """Weight plus term: exact, since together they have less bits than float32."""
        term = kahan_term_of(self.params[name])
        return super().wide(name).add_(term.float(), alpha=_KAHAN_UNIT)

    def state(self) -> Kept:
        """The terms."""
        return {"kahan_terms": {name: kahan_term_of(param) for name, param in self.params.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Terms are copied; the weights come with the model."""
        for name, param in self.params.items():
            kahan_term_of(param).copy_(state["kahan_terms"][name])

    @torch.no_grad()
    def _take(self, params: Mapping[str, nn.Parameter]) -> None:
        for param in params.values():
            make_kahan_term(param, _cut_off(param.float(), param.half()))

    def _round(self, name: str, half: Tensor, wide: Tensor) -> None:
        half.copy_(wide)
        kahan_term_of(self.params[name]).copy_(_cut_off(wide, half))


def _cut_off(wide: Tensor, half: Tensor) -> Tensor:
    return ((wide - half.float()) / _KAHAN_UNIT).half()


UPDATES: dict[str, Callable[[nn.Module, Optimizer, torch.dtype], Update]] = {
    "master": Masters,
    "nearest": InPlace,
    "kahan": Kahan,
    "stochastic": Stochastic,
}
