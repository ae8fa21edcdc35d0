"""Every module method on every network of tests/networks.py: what a conversion must keep, and what it must say."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict

import pytest
import torch
from networks import NETWORKS, Doubled
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.errors import UnsupportedError
from lowprec.methods import METHODS, attach, convert
from lowprec.methods.replace_norm import NORM_CLASSES
from lowprec.norm import is_norm

MODULE_METHODS = [name for name, method in METHODS.items() if method.kind == "module"]
FAMILIES = {"l1": "l1", "linf": "linf", "topk": "topk", "l2_half": "l2", "kalman": "kalman"}
OWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
over_networks = pytest.mark.parametrize("network", NETWORKS)
over_families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sharing(model, among=None):
    """Which paths name one object; only the paths in `among`."""
    paths = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if among is None or path in among:
            paths[id(module)].append(path)
    return sorted(paths.values())


def state_of(model):
    return {name: (value.tolist(), value.dtype, value.stride()) for name, value in model.state_dict().items()}


def counted(model):
    """A copy whose modules count their forward calls, and the counts by path."""
    calls = Counter()
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return model, calls


def test_enough_networks_convert():
    for name in MODULE_METHODS:
        converted, refusals = 0, []
        for network in NETWORKS.values():
            try:
                convert(network.make(), name)
                converted += 1
            except UnsupportedError as error:
                refusals.append(str(error))
        assert converted >= 8, name
        assert not any("\n" in sentence for sentence in refusals)


@over_networks
@pytest.mark.parametrize("name", MODULE_METHODS)
def test_conversion_keeps_what_is_not_its_own(name, network):
    model, batch = NETWORKS[network].make(), NETWORKS[network].batch()
    before, text = state_of(model), repr(model)
    hooked, calls = counted(model)
    try:
        converted, report = convert(hooked, name)
    except UnsupportedError:
        return
    calls.clear()  # reading the structure of a network may run it
    assert repr(model) == text
    assert state_of(hooked) == before
    old = dict(model.named_modules(remove_duplicate=False))
    assert sharing(model) == sharing(converted, old)
    for path, module in converted.named_modules():
        if path in old:
            assert module.training == old[path].training, path
    frozen = {key for key, param in model.named_parameters() if not param.requires_grad}
    assert frozen >= {key for key, param in converted.named_parameters() if not param.requires_grad}
    want, result = model(batch), converted(batch)
    assert (result.shape, result.dtype, result.device) == (want.shape, want.dtype, want.device)
    assert result.isfinite().all()
    assert calls == counts(model, batch)
    strides = {key: value.stride() for key, value in model.state_dict().items()}
    assert all(value.stride() == strides.get(key, value.stride()) for key, value in converted.state_dict().items())
    assert report.changed


def counts(model, batch):
    """How often each module is called, by its own hooks."""
    model, calls = counted(model)
    model(batch)
    return calls


@over_networks
@pytest.mark.parametrize("name", MODULE_METHODS)
def test_converted_networks_train_a_step_and_evaluate(name, network):
    model, batch = NETWORKS[network].make(), NETWORKS[network].batch()
    try:
        converted, _ = convert(model, name)
    except UnsupportedError:
        return
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-3)
    attach(converted, optimizer)
    converted(batch).float().square().mean().backward()
    optimizer.step()
    assert all(param.isfinite().all() for param in converted.parameters())
    twin = copy.deepcopy(converted).eval()
    twin.load_state_dict(converted.state_dict())
    assert torch.equal(twin(batch), converted.eval()(batch))
    assert twin(batch).isfinite().all()


@over_networks
@over_families
def test_every_norm_is_replaced_or_the_report_says_why_not(name, network):
    model = NETWORKS[network].make()
    converted, report = convert(model, name)
    old = dict(model.named_modules(remove_duplicate=False))
    new = dict(converted.named_modules(remove_duplicate=False))
    rows = {path: row for row in [*report.changed, *report.refused] for path in row.name.split(" = ")}
    assert set(rows) == {path for path, module in old.items() if is_norm(module)}
    for path, module in old.items():
        if not is_norm(module):
            continue
        if type(module) in OWN:
            dimension = OWN.index(type(module)) + 1
            assert type(new[path]) is NORM_CLASSES[FAMILIES[name]][dimension]
            assert rows[path] in report.changed
            assert_same_state(module, new[path])
        elif type(module) is nn.SyncBatchNorm and name != "l2_half":
            assert type(new[path]).__name__.startswith("Sync")
            assert_same_state(module, new[path])
        elif isinstance(module, nn.SyncBatchNorm | Doubled | nn.GroupNorm | nn.LayerNorm):
            assert type(new[path]) is type(module)
            assert rows[path] in report.refused
    assert sharing(converted, old) == sharing(model)


def assert_same_state(old: _BatchNorm, new: nn.Module) -> None:
    """What means the same is the same, whatever else the new norm has."""
    for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(new, attribute) == getattr(old, attribute), attribute
    for key, value in old.state_dict().items():
        kept = new.state_dict().get(key)
        if kept is None:
            assert key == "running_var"
        else:
            assert torch.equal(kept, value.to(kept.dtype)), key
    for key, param in old.named_parameters():
        assert getattr(new, key).requires_grad == param.requires_grad
        assert getattr(new, key).dtype == param.dtype
