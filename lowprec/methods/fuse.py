"""Lets norms compute the ReLU, or the addition and the ReLU, that follows them: one pass over memory instead of two.

The network's code stays as it is: the norm gets a child `act`, the ReLU's place an `Identity`, and an addition written
in forward is finished by what the norm returns (see `lowprec.norm.activation`). So a ReLU module can be taken out only
where every call of it comes after such a norm, and a ReLU written as a function cannot be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from torch import nn

from lowprec.methods.relu_sites import ReluCall, Site, read_calls
from lowprec.methods.rewrite import replace_module
from lowprec.methods.tracing import is_plain_sequential
from lowprec.norm import ScaleBatchNorm
from lowprec.norm.activation import AddReLU


def fuse_relus(model: nn.Module, norms: Iterable[ScaleBatchNorm]) -> dict[nn.Module, str]:
    """Fuses what follows each of `norms` into it, in place.

    Args:
        model: a private copy.
        norms: norms of it that have a kernel and are not hooked.

    Returns:
        a sentence for each norm that computes a ReLU now, or is followed by one that it could not take in.
    """
    plan = ReluPlan(model, norms)
    sentences: dict[nn.Module, str] = {norm: f"not fused: {why}" for norm, why in plan.reasons.items()}
    for norm in plan.fused:
        assert isinstance(norm, ScaleBatchNorm)
        before = "the addition and " if plan.adds(norm) else ""
        sentences[norm] = f"it computes {before}the ReLU {plan.relus_after(norm)} after it"
        norm.act = AddReLU().train(norm.training)
        norm.awaits_residual = plan.adds(norm)
    plan.take_out()
    return sentences


class ReluPlan:
    """Which norms can take in what follows them.

    Args:
        model: a private copy; stays as it is until `take_out`.
        norms: the norms of it that may, of any class.

    Attributes:
        fused: the calls of each norm that can.
        reasons: why not, for each norm that is followed by a ReLU and cannot.
    """

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module]) -> None:
        among = set(norms)
        self._model = model
        self._calls = read_calls(model, among)
        self._relus: dict[nn.Module, list[ReluCall]] = defaultdict(list)
        for call in self._calls.relus:
            self._relus[call.relu].append(call)
        self._parents: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for parent in model.modules():
            for child in parent.children():
                self._parents[child].append(parent)
        self._paths = {module: path for path, module in model.named_modules()}
        self.fused: dict[nn.Module, list[Site]] = {}
        self.reasons: dict[nn.Module, str] = {}
        sites: dict[nn.Module, list[Site]] = defaultdict(list)
        for site in self._calls.sites:
            sites[site.norm].append(site)
        for norm in filter(among.__contains__, model.modules()):
            self._consider(norm, sites[norm])
        self._settle()

    def adds(self, norm: nn.Module) -> bool:
        """Whether an addition stands between a norm of `fused` and the ReLU."""
        return self.fused[norm][0].kind == "sum"

    def relus_after(self, norm: nn.Module) -> str:
        """The paths of the ReLUs after a norm of `fused`, in words."""
        relus = (self._paths[site.relu] for site in self.fused[norm] if site.relu is not None)
        return " and ".join(dict.fromkeys(map(repr, relus)))

    def _settle(self) -> None:
        """Leaves out norms whose ReLU has to stay; each may make another ReLU stay, so until nothing changes."""
        while True:
            staying = {relu: why for relu in self._relus if (why := self._why_stays(relu)) is not None}
            losing = {
                norm: staying[site.relu]
                for norm, sites in self.fused.items()
                for site in sites
                if site.relu in staying and not self._goes_by_slot(site)
            }
            if not losing:
                return
            self.reasons.update(losing)
            self.fused = {norm: sites for norm, sites in self.fused.items() if norm not in losing}

    def take_out(self) -> None:
        """Puts an Identity in the place of each ReLU that the norms of `fused` compute."""
        identities: dict[nn.Module, nn.Module] = {}
        whole = {relu for relu in self._relus if self._why_stays(relu) is None}
        for norm, sites in self.fused.items():
            for site in sites:
                assert site.relu is not None
                identity = identities.setdefault(site.relu, nn.Identity().train(site.relu.training))
                if site.relu in whole:
                    replace_module(self._model, site.relu, identity)
                elif site.order is not None:
                    _replace_after(site.order, norm, identity)

    def _consider(self, norm: nn.Module, sites: list[Site]) -> None:
        kinds = {site.kind for site in sites}
        reason = next((site.reason for site in sites if site.reason is not None), None)
        hidden = [parent for parent in self._parents[norm] if parent not in self._calls.seen]
        if hidden:
            unread = (self._calls.unread[parent] for parent in hidden if parent in self._calls.unread)
            reason = next(unread, "what follows it is hidden in a part that torch.fx cannot trace")
        elif reason is None and len(kinds) > 1:
            reason = "what follows it is not the same in every call, in training and in evaluation"
        if reason is not None:
            self.reasons[norm] = reason
        elif kinds and kinds != {None}:
            self.fused[norm] = sites

    def _why_stays(self, relu: nn.Module) -> str | None:
        """Why a ReLU module cannot vanish as a whole; None if every call of it comes after a fused norm."""
        if any(parent not in self._calls.seen for parent in self._parents[relu]):
            return "the ReLU after it is shared with a part that torch.fx cannot trace"
        if all(call.site is not None and call.site.norm in self.fused for call in self._relus[relu]):
            return None
        return "the ReLU after it is one module that is also called elsewhere, where no norm can compute it"

    def _goes_by_slot(self, site: Site) -> bool:
        """Whether the ReLU can be taken out of one place alone: Sequentials call it, each in its order."""
        assert site.relu is not None
        return site.order is not None and all(call.in_order for call in self._relus[site.relu])


def _replace_after(order: nn.Module, norm: nn.Module, new: nn.Module) -> None:
    """Puts `new` after every occurrence of `norm` in a Sequential."""
    assert is_plain_sequential(order)
    names = list(order._modules)
    for name, follower in pairwise(names):
        if order._modules[name] is norm:
            order._modules[follower] = new
