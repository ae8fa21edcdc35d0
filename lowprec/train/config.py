"""The config of a run: one frozen dataclass per TOML section.

Dataclasses and not a dictionary, so that a misspelt key is an error with the nearest name instead of a default that
nobody asked for, and a resolved config (all defaults written out) can be stored with the run and read back unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from lowprec.errors import ConfigError
from lowprec.precision.modes import mode_named
from lowprec.precision.scale import ScalePolicy
from lowprec.train.augmentation import AUGMENTATIONS
from lowprec.train.schedule import SCHEDULES
from lowprec.train.toml import parse_toml, read_config, toml_text

OPTIMIZERS = ("sgd", "adam", "adamw", "apex-sgd", "apex-adam", "apex-adamw")
DEVICES = ("auto", "cpu", "cuda")
STATISTICS = ("reduce", "sync")


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: `factory` is `module:function`, called with `args`; it returns a module, or (module, examples)."""

    factory: str = "lowprec.models:small_resnet"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodConfig:
    """`[method]`: a name in METHODS and its arguments; `none` leaves the network as it is.

    `also` names methods that follow it, each with its arguments: `also = { agc = { clip = 0.1 } }`.
    """

    name: str = "none"
    args: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, args in self.also.items():
            if not isinstance(args, Mapping):
                raise ConfigError(
                    f"method.also.{name} is {_kind(args)}; it must be a table of arguments, {{}} for none"
                )


@dataclass(frozen=True)
class PrecisionConfig:
    """`[precision]`: the arguments of `lowprec.Precision`, but `synchronise`: the trainer looks at every step."""

    mode: str = "fp16-master"
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 2.0**-2
    max_scale: float = 2.0**24
    hysteresis: int = 1
    health_every: int = 200

    def __post_init__(self) -> None:
        values = asdict(self)
        mode_named(values.pop("mode"))
        _at_least("precision.health_every", values.pop("health_every"), 0)
        ScalePolicy(**values)


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: anything that `load_data` takes; `test_fraction` of the samples is held out.

    A source with a test part of its own (CIFAR, images under `train` and `val`) holds that out, whatever the fraction.

    `batch_size` is an upper bound: an epoch is cut into batches of nearly equal size, so that no batch is so small
    that its statistics mean nothing. With `validation_fraction` that share of the training part is taken out of it and
    evaluated after each epoch, and the test part is looked at once, at the end.

    With `copies` every batch holds so many copies of its samples, each augmented by itself in the ways that `augment`
    lists, names in `AUGMENTATIONS`; epochs have as many steps as without. Evaluation augments nothing.
    """

    source: str = "digits"
    batch_size: int = 64
    test_fraction: float = 0.2
    validation_fraction: float = 0.0
    copies: int = 1
    augment: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.copies", self.copies, 1)
        for name in self.augment:
            _one_of("data.augment", str(name), AUGMENTATIONS)
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"data.test_fraction is {self.test_fraction}; give a number between 0 and 1")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}; give 0, or a number below 1")


@dataclass(frozen=True)
class OptimConfig:
    """`[optim]`: the optimizer and how its learning rate moves.

    Args:
        name: one of `OPTIMIZERS`; those of apex need apex and a GPU.
        fused: torch's fused kernels, for those that are torch's.
        lr: the highest learning rate.
        momentum: of sgd; Adam's first beta.
        weight_decay: L2 for sgd and adam, decoupled for adamw.
        clip_norm: total gradient norm after unscaling; 0 does not clip.
        clip_value: largest magnitude of a gradient after unscaling; 0 does not clip.
        accumulate: micro-batches that a batch is cut into; their gradients add up to one step.
        ema: decay of a float32 moving average of weights and running statistics, which evaluation and the written
            model use; 0 for none. It starts at (1 + n) / (10 + n) after n landed steps.
        schedule: one of `SCHEDULES`.
        warmup: landed steps of linear warm-up.
        schedule_on_skip: skipped steps move the schedule too; by default only those that land do.
        step_epochs: for `step`, epochs between two drops.
        gamma: for `step`, the factor of a drop.
    """

    name: str = "sgd"
    fused: bool = False
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    clip_value: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    schedule: str = "cosine"
    schedule_on_skip: bool = False
    warmup: int = 0
    step_epochs: int = 10
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, OPTIMIZERS)
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"optim.lr is {self.lr}; give a positive number")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum is {self.momentum}; give a number from 0 to below 1")
        for name in ("weight_decay", "clip_norm", "clip_value", "warmup"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        _at_least("optim.accumulate", self.accumulate, 1)
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema is {self.ema}; give a decay from 0 (none) to below 1")
        _at_least("optim.step_epochs", self.step_epochs, 1)
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"optim.gamma is {self.gamma}; give a factor above 0, at most 1")


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: how long, from which seed, and how often state is saved.

    Args:
        epochs: passes over the training samples.
        seed: of weights, data order and whatever the model draws.
        evaluate_every: epochs between two evaluations; 0 evaluates after the last only.
        checkpoint_every_steps: a checkpoint after so many steps; 0 saves at the end of each epoch only.
        keep: the newest so many checkpoints stay.
        device: `auto` is the GPU if there is one.
        channels_last: images and convolution weights in channels-last memory.
        compile: the forward through `torch.compile`.
        statistics: of several processes, `reduce` averages running statistics after each step, `sync` makes batch norms
            synchronised ones.
        tensorboard: also writes RUN/tensorboard.
    """

    epochs: int = 10
    seed: int = 0
    evaluate_every: int = 1
    checkpoint_every_steps: int = 0
    keep: int = 2
    device: str = "auto"
    channels_last: bool = False
    compile: bool = False
    statistics: str = "reduce"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _at_least("run.epochs", self.epochs, 1)
        _at_least("run.seed", self.seed, 0)
        _at_least("run.evaluate_every", self.evaluate_every, 0)
        _at_least("run.checkpoint_every_steps", self.checkpoint_every_steps, 0)
        _at_least("run.keep", self.keep, 1)
        _one_of("run.device", self.device, DEVICES)
        _one_of("run.statistics", self.statistics, STATISTICS)


@dataclass(frozen=True)
class Config:
    """A whole config; see the section classes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_toml(self) -> str:
        """The config with all defaults written out; `parse_config` reads it back to an equal one."""
        return toml_text(asdict(self))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides.

    Raises:
        ConfigError: the file is missing, not TOML, or holds an unknown or wrong value.
    """
    return parse_config(read_config(path), overrides, str(path))


def parse_config(text: str, overrides: Iterable[str] = (), name: str = "the config") -> Config:
    """Parses TOML text; `name` stands for it in errors. Raises `ConfigError`."""
    return config_from(parse_toml(text, overrides, name))


def config_from(raw: Mapping[str, Any]) -> Config:
    """Builds a config from nested plain data. Raises `ConfigError`."""
    sections = get_type_hints(Config)
    for name, value in raw.items():
        if name not in sections:
            raise ConfigError(f"unknown section [{name}]; {_nearest(name, sections)}")
        if not isinstance(value, Mapping):
            raise ConfigError(f"[{name}] is {_kind(value)}; it must be a section of keys and values")
    return Config(**{name: section_from(name, sections[name], values) for name, values in raw.items()})


def section_from(section: str, cls: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` from plain data, its keys and types checked. Raises `ConfigError`."""
    types = get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"unknown key {key!r} in [{section}]; {_nearest(key, types)}")
        checked[key] = _checked(f"{section}.{key}", value, get_origin(types[key]) or types[key])
    return cls(**checked)


_KINDS: dict[type, str] = {
    float: "a number", int: "a whole number", str: "a string", dict: "a table", bool: "true or false",
    list: "an array",
}  # fmt: skip


def _checked(name: str, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{name} is {_kind(value)}; it must be {_KINDS[wanted]}")
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; {_nearest(value, known)}")


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least or value == float("inf"):
        raise ConfigError(f"{name} is {value}; give at least {least}")


def _kind(value: Any) -> str:
    text = _KINDS.get(type(value), type(value).__name__)
    return f"{text} ({value!r})" if isinstance(value, (bool, int, float, str)) else text
