"""apex.amp's interface: whole scripts with one import changed, and each call by itself."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lowprec.compat import amp
from lowprec.errors import ConfigError, UnsupportedError
from lowprec.precision import master_of

# The main loop of a script as people wrote them for apex, in which the first line alone is another.
SCRIPT = """
from lowprec.compat import amp
import torch
import torch.nn as nn
from sklearn.datasets import load_digits

def main(opt_level, epochs=3, **options):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    model, optimizer = amp.initialize(model, optimizer, opt_level=opt_level, verbosity=0, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(1437).split(64):
            output = model(images[batch])
            loss = criterion(output, labels[batch])
            optimizer.zero_grad()
            with amp.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 5.0)
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        correct = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
    return model, optimizer, correct
"""


def script(level: str, **options: object) -> tuple[nn.Module, torch.optim.Optimizer, float]:
    names: dict[str, object] = {}
    exec(compile(SCRIPT, "script.py", "exec"), names)
    return names["main"](level, **options)  # type: ignore[operator]


def small(level: str = "O2", lr: float = 1.0, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return amp.initialize(model, optimizer, opt_level=level, verbosity=0, **{"loss_scale": 256, **options})


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0, **options: object) -> None:
    torch.manual_seed(1)
    loss = model(torch.randn(16, 4)).square().mean() * factor
    with amp.scale_loss(loss, optimizer, **options) as scaled:
        scaled.backward()


@pytest.mark.parametrize(
    ("level", "mode", "dtype"),
    [
        ("O0", "fp32", torch.float32),
        ("O1", "fp16-autocast", torch.float32),
        ("O2", "fp16-master", torch.float16),
        ("O3", "fp16-pure", torch.float16),
    ],
)
def test_a_script_learns_at_every_level(level: str, mode: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler's, too
        model, _, accuracy = script(level)
    assert accuracy > 0.85
    assert model[0].weight.dtype == dtype
    assert model[1].running_var.dtype == torch.float32
    assert amp.state_dict()["precision0"]["mode"] == mode
    assert amp.state_dict()["loss_scaler0"]["loss_scale"] == (2.0**16 if level in ("O1", "O2") else 1.0)


def test_gradients_are_unscaled_float32_for_clipping_and_the_step_uses_what_is_there() -> None:
    model, optimizer = small("O2", lr=1.0)
    before = [param.detach().clone() for param in amp.master_params(optimizer)]
    backward(model, optimizer)
    grads = [param.grad for param in amp.master_params(optimizer)]
    assert all(grad.dtype == torch.float32 for grad in grads)
    total = nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1e-3)
    assert total < 100
    assert float(total) > 1e-3
    optimizer.step()
    moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(amp.master_params(optimizer), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_an_overflow_skips_the_step_halves_the_scale_and_names_the_layer() -> None:
    model, optimizer = small("O2", loss_scale="dynamic")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    backward(model, optimizer, factor=math.inf)
    with pytest.warns(UserWarning, match=r"step skipped at loss scale 65536, overflow in .*; the scale is now 32768"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    backward(model, optimizer, factor=2.0**-10)
    optimizer.step()
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1
    assert amp.state_dict()["loss_scaler0"] == {"loss_scale": 2.0**15, "unskipped": 1}


def test_a_static_scale_stays_where_it_is() -> None:
    model, optimizer = small("O2", loss_scale=128)
    for _ in range(40):
        backward(model, optimizer, factor=math.inf)
        with pytest.warns(UserWarning, match="step skipped at loss scale 128"):
            optimizer.step()
    with pytest.warns(UserWarning, match="loss scale 100 is taken as 64, a power of two"):
        small("O2", loss_scale=100)


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_accumulation_with_delayed_unscaling_adds_up(level: str) -> None:
    grads = []
    for parts in (1, 4):
        model, optimizer = small(level)
        model.eval()  # batch statistics would not add up
        for part in range(parts):
            torch.manual_seed(1)
            x = torch.randn(16, 4).chunk(parts)[part]
            with amp.scale_loss(model(x).square().mean() / parts, optimizer, delay_unscale=part < parts - 1) as scaled:
                scaled.backward()
        grads.append(torch.cat([param.grad.flatten() for param in amp.master_params(optimizer)]))
    rounding = 2.0**-24 if level == "O0" else 2.0**-11
    assert (grads[0] - grads[1]).norm() <= 4 * 4 * rounding * grads[0].norm()  # four parts, four layers


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_script_resumes_bit_for_bit_masters_included(level: str) -> None:
    ends = []
    for interrupted in (False, True):
        model, optimizer = small(level, lr=0.1)
        for step in range(6):
            if interrupted and step == 3:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), amp.state_dict()))
                model, optimizer = small(level, lr=0.1)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                amp.load_state_dict(saved[2])
            backward(model, optimizer)
            optimizer.step()
        ends.append([param.detach().clone() for param in amp.master_params(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert set(amp.state_dict()["precision0"]["masters"]) == (set() if level != "O2" else {
        "0.weight", "0.bias", "3.weight", "3.bias"
    })  # fmt: skip


def test_a_checkpoint_of_apex_restores_the_scale() -> None:
    model, optimizer = small("O2", loss_scale="dynamic")
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 1024.0, "unskipped": 17}})
    assert amp.state_dict()["loss_scaler0"] == {"loss_scale": 1024.0, "unskipped": 17}
    backward(model, optimizer)
    optimizer.step()
    with pytest.raises(ConfigError, match="is of 2 loss scalers, here are 1"):
        amp.load_state_dict({"loss_scaler0": {}, "loss_scaler1": {}})


def test_lists_come_back_as_lists_and_each_pair_has_its_own_scale() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizers = [torch.optim.SGD(models[1].parameters(), lr=0.1), torch.optim.SGD(models[0].parameters(), lr=0.1)]
    found = amp.initialize(models, optimizers, opt_level="O2", verbosity=0)
    assert found[0] is models
    assert found[1] is optimizers
    assert all(model.weight.dtype == torch.float16 for model in models)
    with amp.scale_loss(models[0](torch.ones(1, 2)).sum() * math.inf, optimizers[1]) as scaled:
        scaled.backward()
    with pytest.warns(UserWarning, match="step skipped"):
        optimizers[1].step()
    state = amp.state_dict()
    assert (state["loss_scaler0"]["loss_scale"], state["loss_scaler1"]["loss_scale"]) == (2.0**16, 2.0**15)
    assert models[2](torch.ones(1, 2)).dtype == torch.float32  # it evaluates without an optimizer
    assert master_of(models[2].weight) is models[2].weight


def test_disabled_it_does_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert amp.initialize(model, optimizer, enabled=False) == (model, optimizer)
    loss = model(torch.ones(1, 2)).sum()
    with amp.scale_loss(loss, optimizer) as scaled:
        assert scaled is loss
    assert amp.half_function(lambda x: x)(torch.ones(1)).dtype == torch.float32
    assert amp.state_dict() == {}


def test_the_scaled_loss_reads_as_a_number() -> None:
    model, optimizer = small("O2", loss_scale=256)
    loss = model(torch.randn(16, 4)).sum() * 0 + 3.0
    with amp.scale_loss(loss, optimizer) as scaled:
        assert float(scaled) == scaled.item() == 768.0
        scaled.backward(retain_graph=True)
        scaled.backward()


def test_function_casts() -> None:
    small("O1")
    wide, half = torch.ones(2), torch.ones(2, dtype=torch.float16)
    assert amp.half_function(lambda a, b: a + b)(wide, half).dtype == torch.float16
    assert amp.float_function(lambda a: a)(half).dtype == torch.float32
    assert amp.promote_function(torch.add)(half, wide.double()).dtype == torch.float64

    class Module:
        add = staticmethod(torch.add)

    amp.register_half_function(Module, "add")
    assert Module.add(wide, wide).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"opt_level": "02"}, ConfigError, r"opt_level is '02'; give O0, O1, O2 or O3 \(the letter O"),
        ({"keep_batchnorm_fp32": False}, UnsupportedError, "batch norms stay float32 at every level"),
        ({"cast_model_outputs": torch.float16}, UnsupportedError, "outputs are float32"),
        ({"cast_model_type": torch.bfloat16}, UnsupportedError, "is not what O1 is here"),
        ({"patch_torch_functions": False}, UnsupportedError, "does not go with O1"),
        ({"loss_scale": "much"}, ConfigError, "loss scale is 'much'; give 'dynamic' or a positive number"),
    ],
)
def test_what_the_engine_does_not_have_is_refused(options: dict[str, object], kind: type, message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(kind, match=message):
        amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"opt_level": "O1", **options})


def test_an_optimizer_over_two_models_and_a_loss_for_two_optimizers_are_refused() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    both = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    with pytest.raises(UnsupportedError, match="holds parameters of 2 of the 2 models"):
        amp.initialize([a, b], both, verbosity=0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (a, b)]
    amp.initialize([a, b], optimizers, verbosity=0)
    with pytest.raises(UnsupportedError, match="a backward belongs to one"), amp.scale_loss(a.weight.sum(), optimizers):
        pass
    with (
        pytest.raises(UnsupportedError, match=r"did not go through amp.initialize"),
        amp.scale_loss(a.weight.sum(), both),
    ):
        pass
