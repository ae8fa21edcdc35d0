"""What a user may name as a model: a run folder or MODULE:FACTORY, opened as a module, or an ONNX file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowprec.artifacts import sha256_of
from lowprec.data import Samples, Split, load_data
from lowprec.errors import ArtifactError, ConfigError
from lowprec.export.backends.eager import forward_names

if TYPE_CHECKING:
    import torch
    from torch import nn

ONNX = ".onnx"
_EXAMPLE_BATCH = 2  # torch.export takes a batch of one for a constant


@dataclass(frozen=True)
class Source:
    """A trained network with what is needed to trace it.

    Args:
        name: what the user called it.
        module: in evaluation mode.
        example_inputs: what it is called with, or None when its factory gave none.
        data: name of the data it was trained on, if known.
        facts: provenance for the manifest.
    """

    name: str
    module: nn.Module
    example_inputs: tuple[torch.Tensor, ...] | None = None
    data: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """What `export` takes."""
        return self.module

    def inputs_for(self, samples: Samples | None) -> tuple[torch.Tensor, ...]:
        """Example inputs: the factory's own, else the first samples of the data. Raises `ConfigError` without both."""
        if self.example_inputs is not None:
            return self.example_inputs
        if samples is None:
            raise ConfigError(
                f"{self.name} says nothing about its inputs; let the factory return (module, example_inputs), "
                "or give data with --calibration"
            )
        return self._tensors(samples, 0, _EXAMPLE_BATCH)

    def batches(self, samples: Samples, size: int) -> list[tuple[torch.Tensor, ...]]:
        """The samples as tuples of input tensors in the order of forward's arguments, `size` at a time."""
        return [self._tensors(samples, start, start + size) for start in range(0, len(samples), size)]

    def _tensors(self, samples: Samples, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        import torch

        feeds = samples.feeds(forward_names(self.module), start, stop)
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values())


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file, which says itself what its inputs are.

    Args:
        name: what the user called it.
        model: where it is.
        facts: provenance for the manifest.
    """

    name: str
    model: Path
    facts: dict[str, Any] = field(default_factory=dict)
    data: str | None = None

    def inputs_for(self, samples: Samples | None) -> None:
        """None: they are drawn from the model where there are no samples."""


def open_model(spec: str) -> Source | OnnxSource:
    """Opens RUN, MODULE:FACTORY or MODEL.onnx; see `open_source` for what it raises."""
    path = Path(spec)
    if path.suffix == ONNX and not path.is_dir():
        if not path.is_file():
            raise ArtifactError(f"no ONNX model at {path}: there is no such file")
        return OnnxSource(path.name, path, {"source_sha256": sha256_of(path)})
    return open_source(spec, f"a run folder, MODULE:FACTORY or MODEL{ONNX}")


def open_source(spec: str, kinds: str = "a run folder or MODULE:FACTORY") -> Source:
    """Opens RUN or MODULE:FACTORY.

    Args:
        spec: what the user wrote.
        kinds: what may be given, for messages.

    Raises:
        ArtifactError: neither a folder nor of the form MODULE:FACTORY, or a run that cannot be read.
        ConfigError: the factory is missing, fails, or returns something else than a module.
    """
    path = Path(spec)
    if path.is_dir():
        return _open_run(path)
    if ":" in spec and not path.exists():
        return _open_factory(spec)
    found = f"a file {path.suffix or 'without an ending'}" if path.exists() else "nothing of that name"
    raise ArtifactError(f"asked for the model {spec}, found {found}; give {kinds}")


def _open_run(path: Path) -> Source:
    from lowprec.train import load_run

    module, config = load_run(path)
    return Source(str(path), module, None, config.data.source, {"run": path.name, "config": asdict(config)})


def _open_factory(spec: str) -> Source:
    from lowprec.train import build_model

    module, example_inputs = build_model(spec)
    return Source(spec, module.eval(), example_inputs, facts={"factory": spec})


def samples_or_none(data: str | None, split: Split = "all") -> Samples | None:
    """`load_data`, or None when no data was named."""
    return None if data is None else load_data(data, split=split)
