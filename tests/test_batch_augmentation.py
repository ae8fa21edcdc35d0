"""Batch augmentation: each augmentation by pixel, where copies go, their gradient, and the trainer's part."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import reference_norm as reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec import Trainer, attach, convert
from lowprec.errors import ConfigError, DataError, UnsupportedError
from lowprec.models import mlp
from lowprec.train import BatchAugmentation, Config, parse_config
from lowprec.train.augmentation import AUGMENTATIONS, augmented
from lowprec.train.loop import Loop
from lowprec.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config(*overrides: str, epochs: int = 1) -> Config:
    small = ["data.batch_size=128", "run.device=cpu", "model.args.width=4", "model.args.blocks=1"]
    return parse_config("", [*small, f"run.epochs={epochs}", *overrides])


# --- the augmentations -----------------------------------------------------------------------------------------------


def reference_pixel(name: str, image: np.ndarray, draws: np.ndarray, h: int, w: int) -> np.ndarray:
    """One pixel, all channels, from the definitions."""
    height, width = image.shape[1:]
    if name == "flip":
        return image[:, h, width - 1 - w] if draws[0] < 0.5 else image[:, h, w]
    if name == "crop":
        pad_h, pad_w = math.ceil(height / 8), math.ceil(width / 8)
        padded = np.pad(image, ((0, 0), (pad_h, pad_h), (pad_w, pad_w)))
        return padded[:, h + math.floor(draws[0] * (2 * pad_h + 1)), w + math.floor(draws[1] * (2 * pad_w + 1))]
    centre_h, centre_w = math.floor(draws[0] * height), math.floor(draws[1] * width)
    rows = range(centre_h - height // 4, centre_h - height // 4 + height // 2)
    columns = range(centre_w - width // 4, centre_w - width // 4 + width // 2)
    return np.zeros(len(image)) if h in rows and w in columns else image[:, h, w]


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 21), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_every_pixel_is_where_the_definition_puts_it(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(1, 255, (20, *shape)).to(dtype)
    draws = torch.rand(20, 2)
    draws[0], draws[1] = 0, 1 - 2.0**-24  # the ends of what torch.rand gives
    got = AUGMENTATIONS[name](x, draws)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    for n, image in enumerate(x.numpy()):
        for h in range(shape[1]):
            for w in range(shape[2]):
                want = reference_pixel(name, image, draws[n].double().numpy(), h, w)
                assert got[n, :, h, w].tolist() == want.tolist(), (n, h, w)


def test_every_crop_is_drawn_equally_often_and_half_of_the_images_are_mirrored() -> None:
    count = 20000
    x = torch.arange(1, 65).reshape(1, 1, 8, 8).expand(count, 1, 8, 8)
    corners = augmented({None: x}, ["crop"])[None][:, 0, 4, 4]
    values, counts = corners.unique(return_counts=True)
    assert len(values) == 9
    # 5 standard errors of a share.
    assert (counts / count - 1 / 9).abs().max() <= 5 * math.sqrt(8 / 81 / count)
    mirrored = augmented({None: x}, ["flip"])[None][:, 0, 0, 0] == 8
    assert abs(mirrored.double().mean() - 1 / 2) <= 5 * math.sqrt(1 / 4 / count)


def test_augmentations_follow_each_other_in_the_order_given() -> None:
    x = torch.rand(16, 1, 8, 8)
    torch.manual_seed(1)
    both = augmented({None: x}, ["crop", "cutout"])[None]
    torch.manual_seed(1)
    assert torch.equal(both, augmented(augmented({None: x}, ["crop"]), ["cutout"])[None])


def test_all_images_of_a_sample_move_alike_other_inputs_stay_and_so_does_the_memory_format() -> None:
    x, numbers = torch.rand(16, 3, 8, 8), torch.rand(16, 5)
    given = {"image": x.to(memory_format=torch.channels_last), "mask": x > 0.5, "numbers": numbers}
    got = augmented(given, ["crop", "flip", "cutout"])
    assert list(got) == list(given)
    assert got["numbers"] is numbers
    assert got["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got["mask"], got["image"] > 0.5)
    assert not torch.equal(got["image"], x)
    assert augmented(given, []) is given
    with pytest.raises(
        DataError, match=r"augment is flip, for images .* holds a of shape \(2, 3\), one array of shape"
    ):
        augmented({"a": torch.zeros(2, 3), None: torch.zeros(2, 1)}, ["flip"])


# --- copies ----------------------------------------------------------------------------------------------------------


def identity(inputs: Tensor) -> Tensor:
    return inputs


@pytest.mark.parametrize("soft", [False, True])
def test_copies_come_whole_batch_after_whole_batch_with_their_labels(soft: bool) -> None:
    x = torch.rand(5, 1, 8, 8)
    labels = torch.rand(5, 3).softmax(1) if soft else torch.arange(5)
    same, same_labels = BatchAugmentation(3, identity)(x, labels)
    assert torch.equal(same.reshape(3, 5, 1, 8, 8), x.expand(3, 5, 1, 8, 8))
    assert torch.equal(same_labels.reshape(3, *labels.shape), labels.expand(3, *labels.shape))
    different, _ = BatchAugmentation(3, ["crop", "cutout"])(x, labels)
    first, second, third = different.chunk(3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    named, _ = BatchAugmentation(2, ["flip"])({"x": x, "size": torch.arange(5)}, labels)
    assert named["x"].shape == (10, 1, 8, 8)
    assert named["size"].tolist() == [*range(5), *range(5)]


def test_a_function_that_draws_once_for_a_batch_still_makes_copies_that_differ() -> None:
    copies, _ = BatchAugmentation(4, lambda x: x * torch.rand(()))(torch.ones(2, 1), torch.arange(2))
    assert copies.unique().numel() == 4


@pytest.mark.parametrize(("copies", "norm"), [(4, False), (4, True), (3, True)])
def test_identical_copies_have_the_gradient_of_the_batch_with_and_without_batch_norm(copies: int, norm: bool) -> None:
    """The mean over M equal halves is the mean; duplicated data has the same biased moments."""
    norms = [nn.BatchNorm2d(6, momentum=1.0)] if norm else []
    model = nn.Sequential(nn.Conv2d(2, 6, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).double()
    twin = copy.deepcopy(model)
    x, labels = torch.randn(10, 2, 8, 8, dtype=torch.float64), torch.arange(10) % 5
    F.cross_entropy(model(x), labels).backward()
    many, many_labels = BatchAugmentation(copies, identity)(x, labels)
    F.cross_entropy(twin(many), many_labels).backward()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        # Sums over all positions of all copies, in two layers and forward and backward through a norm.
        reference.close(other.grad, param.grad, terms=10 * 36 * copies * 4)
    if norm:
        n = 10 * 36
        bessel = (copies * n / (copies * n - 1)) / (n / (n - 1))
        reference.close(twin[1].running_mean, model[1].running_mean)
        reference.close(twin[1].running_var, model[1].running_var * bessel)
        assert not torch.allclose(twin[1].running_var, model[1].running_var, rtol=1e-4, atol=0)


def test_the_gradient_of_a_step_has_less_variance_for_it() -> None:
    """Var of the mean of M independent augmentations of one batch is 1 / M of one's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    x, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 3

    def covariance(copies: int) -> Tensor:
        gradients = []
        for _ in range(400):
            images, classes = BatchAugmentation(copies, ["cutout"])(x, labels)
            loss = F.cross_entropy(model(images), classes)
            gradients.append(torch.autograd.grad(loss, model[1].weight)[0].flatten())
        return torch.stack(gradients).T.cov()

    one, four = covariance(1), covariance(4)
    # A trace from n draws has a relative variance of 2 tr C^2 / (n (tr C)^2); there are two of them.
    error = math.sqrt(2 * 2 / 400 * float(one.square().sum() / one.trace() ** 2))
    assert error < 0.1
    assert abs(4 * four.trace() / one.trace() - 1) <= 5 * error


def test_it_goes_over_any_batches_once_an_epoch() -> None:
    x, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4)
    four = BatchAugmentation(4, ["flip"])
    for _ in range(2):
        assert [len(images) for images, _ in four.over(loader)] == [16, 16, 8]
    with pytest.raises(DataError, match="a batch is \\(inputs, labels\\), but the iterable gave a Tensor"):
        next(four.over([x]))


def test_what_batch_augmentation_cannot_do_is_said_in_one_line() -> None:
    for copies in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=f"copies is {copies}; give a whole number of at least 1"):
            BatchAugmentation(copies, ["flip"])
    with pytest.raises(ConfigError, match=r"no augmentation is called 'crp'; choose from crop, flip, cutout; .*'crop'"):
        BatchAugmentation(2, ["flip", "crp"])
    with pytest.raises(ConfigError, match=r"augment is a list of names; write augment=\['flip'\]"):
        BatchAugmentation(2, "flip")
    with pytest.raises(DataError, match=r"different lengths: \[3, 4\]"):
        BatchAugmentation(2, ["flip"])(torch.rand(3, 1, 2, 2), torch.arange(4))
    model = mlp()
    for call in (
        lambda: convert(model, "batch_augmentation"),
        lambda: attach(model, torch.optim.SGD(model.parameters()), "batch_augmentation"),
    ):
        with pytest.raises(UnsupportedError, match=r"acts on the data, .*set \[data\] copies and augment, or use"):
            call()


# --- the trainer -----------------------------------------------------------------------------------------------------


def parts_of_a_step(loop: Loop, processes: Processes) -> list[np.ndarray]:
    """The samples that each micro-batch of one process gets."""
    seen: list[np.ndarray] = []

    def loss(index: np.ndarray) -> Tensor:
        seen.append(index)
        return torch.zeros(())

    loop.processes, loop._loss = processes, loss
    loop.precision.backward = lambda loss: None
    loop.precision.step = lambda **options: False
    loop._step(loop._batches(0)[0])
    return seen


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_part_of_a_batch_holds_a_sample_twice_if_it_need_not(processes: int, accumulate: int) -> None:
    overrides = ['data.augment=["flip"]', "data.copies=4", f"optim.accumulate={accumulate}", "data.batch_size=101"]
    loop = Loop(config(*overrides), ALONE, None, None)
    batch = loop._batches(0)[0]
    parts = [
        part
        for rank in range(processes)
        for part in parts_of_a_step(loop, Processes(rank, processes, torch.device("cpu")))
    ]
    assert len(parts) == processes * accumulate
    together = np.concatenate(parts)
    assert sorted(together) == sorted(np.tile(batch, 4))
    for part in parts:
        counts = np.unique(part, return_counts=True)[1]
        assert counts.max() == math.ceil(len(part) / len(batch))


def test_a_batch_can_be_cut_into_as_many_parts_as_it_has_copies() -> None:
    overrides = ['data.augment=["flip"]', "data.copies=4", "data.batch_size=5"]
    smallest = min(len(batch) for batch in Loop(config(*overrides), ALONE, None, None)._batches(0))
    Loop(config(*overrides, f"optim.accumulate={4 * smallest}"), ALONE, None, None)
    with pytest.raises(ConfigError, match=f"batches of {4 * smallest} samples cannot be cut into"):
        Loop(config(*overrides, f"optim.accumulate={4 * smallest + 1}"), ALONE, None, None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_identical_copies_make_the_trainers_step_of_the_plain_batch(accumulate: int) -> None:
    moved = []
    for copies in (1, 3):
        overrides = [f"data.copies={copies}", "precision.mode=fp32", "data.batch_size=60"]
        more = [f"optim.accumulate={accumulate}"] if copies == 3 else []
        loop = Loop(config(*overrides, *more), ALONE, None, lambda inputs, labels: (inputs, labels))
        seen: list[Tensor] = []
        loop.optimizer.register_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.extend(
                p.grad.double().flatten() for group in optimizer.param_groups for p in group["params"]
            )
        )
        loop._step(loop._batches(0)[0])
        moved.append(torch.cat(seen))
    # Float32 sums of up to 60 * 64 terms in another order, in each of a dozen layers and their norms.
    rounding = 12 * 2.0**-24 * math.sqrt(60 * 64)
    assert (moved[0] - moved[1]).norm() <= rounding * moved[0].norm()


def test_the_trainer_augments_each_copy_and_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    augment = 'data.augment=["crop", "flip", "cutout"]'
    chosen = config("data.copies=4", augment, "optim.accumulate=2", "run.checkpoint_every_steps=4")
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(inputs, labels):
        seen.append((inputs[None].clone(), labels))
        return inputs, labels

    whole = Trainer(chosen, transform=watch).fit(tmp_path / "whole")
    plain = Trainer(config()).fit()
    assert (whole.steps, len(seen)) == (plain.steps, 2 * plain.steps)
    images, labels = seen[0]
    smallest = len(labels) // 2
    assert torch.equal(labels[:smallest], labels[-smallest:])
    assert not torch.equal(images[:smallest], images[-smallest:])
    first = list(seen)
    seen.clear()
    Trainer(chosen, transform=watch).fit(tmp_path / "parts", stop_after_steps=5)
    torch.manual_seed(99)
    resumed = Trainer(chosen, transform=watch).fit(tmp_path / "parts", resume=True)
    assert all(torch.equal(a, b) for now, then in zip(seen, first, strict=True) for a, b in zip(now, then, strict=True))
    assert resumed.losses == whole.losses
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert stored[0] == stored[1]


def test_a_network_learns_from_augmented_copies() -> None:
    chosen = ["model.args.width=8", "model.args.blocks=2", "data.batch_size=32", "optim.lr=0.1", "optim.warmup=5"]
    result = Trainer(config(*chosen, "data.copies=2", 'data.augment=["crop"]', epochs=2)).fit()
    assert result.accuracy > 0.5


def test_the_command_line_shows_and_refuses(command, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("")
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 64), np.float32), labels=np.arange(20) % 2)
    shown = command(
        "train", "c.toml", "--set", "data.copies=4", 'data.augment=["crop","flip"]', "--dry-run", cwd=tmp_path
    )
    assert shown.status == 0, shown.stderr
    assert 'copies = 4\naugment = ["crop", "flip"]' in shown.stdout
    assert parse_config(shown.stdout).data.augment == ["crop", "flip"]
    for overrides, message in (
        (["data.copies=0"], "data.copies is 0; give at least 1"),
        (["data.copies=1.5"], "data.copies is a number (1.5); it must be a whole number"),
        (['data.augment=["crp"]'], "data.augment is 'crp'; did you mean 'crop'?"),
        (['data.augment=["zzz"]'], "data.augment is 'zzz'; choose from crop, flip, cutout"),
        (["data.augment=[1]"], "data.augment is '1'; choose from crop, flip, cutout"),
        (["data.augment=crop"], "data.augment is a string ('crop'); it must be an array"),
        (["data.copies=4"], "data.copies is 4, but nothing makes the copies differ; set data.augment, or give"),
        (['data.augment=["flip"]', "data.source=d.npz"], "d.npz holds x of shape (16, 64); leave it empty"),
        (["method.name=batch_augmentation"], "acts on the data, not on a network; set [data] copies and augment"),
    ):
        done = command("train", "c.toml", "-o", "run", "--set", *overrides, cwd=tmp_path)
        assert done.status == 2, overrides
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
