"""Runs artefacts on backends against the golden samples: the part of parity that export and verify share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import DataError, LowprecError, MissingDependencyError, NoKernelError, UnsupportedError
from lowprec.export.backends import BACKENDS, Backend, EngineBackend, Session, backend_named
from lowprec.export.external_data import external_path
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx, module_path
from lowprec.export.parity import Check, Limits, Stage, judge
from lowprec.export.parity.report import Status
from lowprec.export.sketches import deviations

Arrays = dict[str, NDArray[Any]]

_BATCH = 64
"""Samples per call: large enough to be fast, small enough that activations of image networks fit in memory."""


@dataclass(frozen=True)
class Artefact:
    """One file to be judged.

    Args:
        name: its file name, as the report shows it.
        path: where it is.
        precision: what its stored values are rounded to.
    """

    name: str
    path: Path
    precision: str


def choose_backends(names: Sequence[str] | None) -> dict[str, Backend]:
    """The backends called `names`, or all of them.

    Raises:
        ConfigError: no backend of that name.
        MissingDependencyError: one that was asked for by name cannot run here.
    """
    if names is None:
        return dict(BACKENDS)
    for name in names:
        backend = backend_named(name)
        reason = backend.unavailable() or backend.cannot_run()
        if reason:
            raise MissingDependencyError(f"the backend {name} was asked for and cannot run here: {reason}")
    return {name: BACKENDS[name] for name in names}


def run_stages(
    artefacts: Sequence[Artefact],
    golden: Golden,
    backends: Mapping[str, Backend],
    limits: Limits,
    progress: Callable[[int, int], None] | None = None,
    suffix: str = "",
    named: bool = False,
) -> list[Stage]:
    """One stage per artefact and backend that takes it; those that cannot run here say why.

    Args:
        artefacts: what is judged.
        golden: samples, truth and floors.
        backends: by name.
        limits: the bands of the verdict.
        progress: called with (done, total).
        suffix: of the names of stages.
        named: whether the backends were asked for by name; else one that would hold the weights of a large artefact
            twice is left out, so that memory stays bounded, and an engine for another GPU, version or system is listed
            as not run.

    Raises:
        MissingDependencyError: a backend was asked for by name, and this machine is not what an engine was built for.
    """
    jobs = [(a, n, b) for a in artefacts for n, b in backends.items() if b.accepts(a.path)]
    stages = []
    for done, (artefact, name, backend) in enumerate(jobs):
        if progress:
            progress(done, len(jobs))
        if backend.copies_weights(artefact.precision) and not named and external_path(artefact.path).exists():
            reason = f"it would hold the large weights twice; ask for it with verify --backend {name}"
            title = f"{artefact.precision} on {name}{suffix}"
            stages.append(Stage(title, artefact.name, name, "-", status="not available here", reason=reason))
            continue
        stages.append(_run_stage(artefact, name, backend, golden, limits, suffix, named))
    for artefact in artefacts:
        if artefact.path.suffix == ".onnx":
            stages += _node_stages(artefact, golden, limits, suffix)
    if progress:
        progress(len(jobs), len(jobs))
    return stages


def _run_stage(
    artefact: Artefact, name: str, backend: Backend, golden: Golden, limits: Limits, suffix: str, named: bool
) -> Stage:
    title = f"{artefact.precision} on {name}{suffix}"
    status: Status = "built, not run here" if isinstance(backend, EngineBackend) else "not available here"
    reason = backend.unavailable() or backend.cannot_run()
    if reason:
        return Stage(title, artefact.name, name, "-", status=status, reason=reason)
    try:
        session = backend.open(artefact.path)
        outputs = run_batched(session, golden.inputs)
    except MissingDependencyError as error:
        if named:
            raise
        return Stage(title, artefact.name, name, "-", status=status, reason=str(error))
    except NoKernelError as error:
        return Stage(title, artefact.name, name, "-", status="not available here", reason=str(error))
    except UnsupportedError as error:
        return Stage(title, artefact.name, name, "-", status="failed to run", reason=str(error))
    stage = judged(title, artefact.name, name, session.arithmetic, outputs, golden, artefact.precision, limits)
    return dataclasses.replace(stage, placement=session.placement)


def _node_stages(artefact: Artefact, golden: Golden, limits: Limits, suffix: str) -> list[Stage]:
    """Every node's output in float64 against its sketch: where the first one is off, the cause is.

    No stage where the graph's tensors bear other names than the sketched ones, as after another exporter.
    """
    model = load_onnx(artefact.path)
    if golden.sketches is None:
        return []
    ratios = deviations(golden.sketches, Float64Graph(model), golden.inputs, artefact.precision)
    if not ratios:
        return []
    off = next((name for name, ratio in ratios.items() if ratio > limits.fail), None)
    value = max(ratios.values()) if off is None else ratios[off]
    if off is None:
        text = f"{len(ratios)} node outputs are within {value:.2g} times their own rounding noise"
    else:
        text = f"the first node that is off is {_node_label(model, off)}, by {value:.3g} times its rounding noise"
    check = Check("nodes", limits.band(value), value, limits.fail, text)
    title = f"{artefact.precision} node by node{suffix}"
    return [Stage(title, artefact.name, "reference", "float64", status="ran", checks=(check,))]


def _node_label(model: onnx.ModelProto, tensor: str) -> str:
    """A node by its output: its ONNX name, operator, and the module path that it came from."""
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers[tensor]
    while node.op_type == "Cast" and node.input[0] in makers:  # a conversion at the edge bears the result's name
        node = makers[node.input[0]]
    path = module_path(node)
    return f"{node.name or tensor!r} ({node.op_type}{f' of {path!r}' if path else ''})"


def judged(
    title: str,
    artefact: str,
    backend: str,
    arithmetic: str,
    outputs: Arrays,
    golden: Golden,
    precision: str,
    limits: Limits,
) -> Stage:
    """The stage of outputs that were computed, judged against the golden ones at the floor of `precision`."""
    if precision not in golden.floors:
        raise LowprecError(f"no {precision} rounding-noise floor was recorded, so {artefact} cannot be judged")
    checks = judge(golden.outputs, outputs, golden.floors[precision], labels=golden.labels, limits=limits)
    return Stage(title, artefact, backend, arithmetic, status="ran", checks=tuple(checks))


def run_batched(session: Session, feeds: Mapping[str, NDArray[Any]], batch: int = _BATCH, fill: bool = False) -> Arrays:
    """Outputs of a session on all samples, computed `batch` at a time (or what it takes that is nearest) and joined.

    Args:
        session: what computes them.
        feeds: samples along axis 0.
        batch: samples at a time.
        fill: whether the last batch is filled with copies of the last sample also where the session takes it shorter.

    Raises:
        DataError: the names of the feeds and of the session's inputs differ in a way that leaves a choice.
        UnsupportedError: the session takes samples of another shape.
    """
    taken = match_names(list(feeds), [spec.name for spec in session.inputs])
    feeds = {taken[name]: value for name, value in feeds.items()}
    total = len(next(iter(feeds.values())))
    size = session.batch_near(feeds, batch)
    parts = []
    for start in range(0, total, size):
        count = min(size, total - start)
        short = count < size and not fill and any(count in sizes for sizes in session.batches(feeds))
        rows = slice(start, start + count) if short or count == size else _filled(start, size, total)
        found = session.run({name: value[rows] for name, value in feeds.items()})
        parts.append({name: value[:count] for name, value in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _filled(start: int, size: int, total: int) -> NDArray[np.intp]:
    return np.minimum(np.arange(start, start + size), total - 1)


def match_names(given: list[str], wanted: list[str]) -> dict[str, str]:
    """The input that each array feeds: of the same name, or the only one there is.

    Raises:
        DataError: anything else, since a guess would feed the wrong tensor.
    """
    if set(given) == set(wanted):
        return {name: name for name in given}
    if len(given) == len(wanted) == 1:
        return {given[0]: wanted[0]}
    raise DataError(
        f"the inputs do not match: there are arrays for {', '.join(given)}, the model takes {', '.join(wanted)}; "
        "give both the same names"
    )
