"""Builds what a config describes: network, optimizer, and the tensors of a batch."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowprec.data import Samples
from lowprec.errors import ConfigError, DataError, MissingDependencyError
from lowprec.methods import convert
from lowprec.methods.replace_norm import synchronise_norms
from lowprec.train.config import Config, OptimConfig
from lowprec.train.factory import build_model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, numpy and Python, and gives the caller's generators back at the end."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        seed_generators(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        torch.cuda.set_rng_state_all(gpu_states)
        np.random.set_state(numpy_state)  # noqa: NPY002 - what models draw from, not ours
        random.setstate(python_state)


def seed_generators(*numbers: int) -> None:
    """Seeds torch, numpy and Python with a hash of `numbers`.

    Done before everything that may draw, so that it is a function of where the run is: a saved state would not be
    enough, since a package that is imported late can draw a number on the way (rich does).
    """
    words = [int(word) for word in np.random.SeedSequence(numbers).generate_state(4)]
    torch.default_generator.manual_seed(words[0] << 32 | words[1])  # torch.manual_seed asks every kind of device
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(words[0] << 32 | words[1])
    np.random.seed(words[2])  # noqa: NPY002 - for models that draw from it
    random.seed(words[3])


def build_network(config: Config, synchronised: bool = False) -> nn.Module:
    """The model of `[model]` with the weights of `[run] seed`, converted by `[method]`, its norms `synchronised`.

    Raises:
        ConfigError: the factory or the method is wrong.
        UnsupportedError: the method finds nothing to do in this network.
    """
    seed_generators(config.run.seed)
    model, _ = build_model(config.model.factory, config.model.args)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    converted = _converted(config, model)
    return synchronise_norms(converted) if synchronised else converted


def _converted(config: Config, model: nn.Module) -> nn.Module:
    method = config.method
    if method.name == "none":
        if method.args:
            raise ConfigError("[method] has args but no name; give the method's name")
    else:
        model, _ = convert(model, method.name, **method.args)
    for name, args in method.also.items():
        model, _ = convert(model, name, **args)
    return model


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `[optim]` over all parameters of `model`.

    Raises:
        ConfigError: there are no parameters.
        MissingDependencyError: one of apex, which is not here.
    """
    params = list(model.parameters())
    if not params:
        raise ConfigError("the model of [model] has no parameters to train")
    home, _, name = config.name.rpartition("-")
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    options |= {"momentum": config.momentum} if name == "sgd" else {"betas": (config.momentum, 0.999)}
    if home:
        optimizers = _apex_optimizers(config.name)
        adam = {} if name == "sgd" else {"adam_w_mode": name == "adamw"}
        made: torch.optim.Optimizer = (optimizers.FusedSGD if name == "sgd" else optimizers.FusedAdam)(
            params, **options, **adam
        )
        return made
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    chosen: torch.optim.Optimizer = kind(params, **options, fused=config.fused or None)
    return chosen


def _apex_optimizers(name: str) -> Any:
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError:
        raise MissingDependencyError(
            f"optim.name {name!r} needs NVIDIA's apex, which is built from source "
            "(APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex) "
            "and is not the package of that name on PyPI; or use the same name without 'apex-'"
        ) from None


def check_inputs(model: nn.Module, samples: Samples) -> None:
    """Raises `DataError` unless `samples` have labels and their arrays can be the arguments of the model's forward."""
    if samples.labels is None:
        raise DataError(f"{samples.source} has no labels; training needs an integer class per sample")
    signature = inspect.signature(model.forward)
    names = [name for name in samples.inputs if name is not None]
    try:
        signature.bind(**dict.fromkeys(names)) if names else signature.bind(None)
    except TypeError as error:
        found = ", ".join(names) or "one unnamed array"
        raise DataError(
            f"{samples.source} holds {found}, but the model is called as forward{signature}: {error}"
        ) from None


def batch_of(
    samples: Samples, index: NDArray[np.int64], device: torch.device, channels_last: bool = False
) -> tuple[dict[str | None, Tensor], Tensor]:
    """Inputs by name and labels of the samples at `index`; floating inputs become float32."""
    if samples.labels is None:
        raise DataError(f"{samples.source} has no labels")
    inputs = {}
    for name, array in samples.inputs.items():
        tensor = torch.from_numpy(array[index]).to(device)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        inputs[name] = tensor.to(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor
    return inputs, torch.from_numpy(samples.labels[index]).to(device)


def logits_of(model: nn.Module, inputs: dict[str | None, Tensor], labels: Tensor) -> Tensor:
    """Calls the model, by position for an unnamed input, and checks that it returns (N, classes)."""
    named = {name: tensor for name, tensor in inputs.items() if name is not None}
    try:
        logits = model(**named) if named else model(inputs[None])
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise DataError(
            "torch's batch norm needs more than one value per channel, and this batch has one; raise data.batch_size"
        ) from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"the model returns {found} for {len(labels)} samples; training needs logits (N, classes)")
    return logits


def check_labels(samples: Samples, classes: int) -> None:
    """Raises `DataError` if a label is not one of `classes`."""
    if samples.labels is not None and not 0 <= samples.labels.min() <= samples.labels.max() < classes:
        low, high = samples.labels.min(), samples.labels.max()
        raise DataError(f"{samples.source}: labels run from {low} to {high}, the model has {classes} classes")


def batches_of_epoch(n: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The samples of each batch of an epoch: a pure function, so that a resumed run continues in the same order.

    A shuffle by the raw stream of PCG64 seeded with (seed, epoch), cut into ceil(n / batch_size) parts whose sizes
    differ by one at most: a rest of one sample would have no batch statistics.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(stream.random_raw(n), kind="stable")
    return np.array_split(order, -(-n // batch_size))
