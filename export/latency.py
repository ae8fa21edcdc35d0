"""Latency and throughput, measured the same way for every backend (`lowprec verify --bench`).

All sessions are warmed up, then timed in turn, round after round, so that what else the machine does hits all alike. A
run is a call of `Session.run`: feeds are on the host before it and outputs after it, copies to a device and back
included. The median is trusted when its 95 % interval (order statistics, distribution-free) is narrow.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ConfigError, LowprecError
from lowprec.export import bundle as layout
from lowprec.export.backends import Backend, Session
from lowprec.export.bundle import open_bundle
from lowprec.export.golden import Golden
from lowprec.export.stages import choose_backends, match_names
from lowprec.export.verification import bundle_artefacts
from lowprec.packages import installed_versions

Arrays = Mapping[str, NDArray[Any]]
Progress = Callable[[int, int], None]

MIN_RUNS = 20
HALF_WIDTH = 0.02
"""Of the median's interval, as a share of it, at which a session is measured well enough."""
_WARM_UP = 3  # runs; the first allocates, the second may still choose kernels
_Z = 1.96
_PERCENTILES = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx", "tensorrt", "torch", "onnx", "numpy")


def measure(
    sessions: Mapping[str, Session], feeds: Arrays, seconds: float = 1.0, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Times sessions on one batch, interleaved.

    A session has had enough after MIN_RUNS runs if the half width of its median's interval is at most HALF_WIDTH of
    the median, else after `seconds`; it is timed twice at least.

    Args:
        sessions: by a name of the caller's.
        feeds: one batch.
        seconds: per session, warm-up left out.
        progress: called with (sessions done, sessions).

    Returns:
        By session: `batch`, `runs`, `mean_ms`, `p50_ms`, `p90_ms`, `p99_ms`, `half_width` (of the median, relative),
        `samples_per_s` (batch over mean), `ended_by` (`precision` or `time`).
    """
    batch = len(next(iter(feeds.values())))
    matched = {name: _matched(session, feeds) for name, session in sessions.items()}
    for name, session in sessions.items():
        for _ in range(_WARM_UP):
            session.run(matched[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    ended: dict[str, str] = {}
    while len(ended) < len(sessions):
        for name, session in sessions.items():
            if name not in ended:
                times[name].append(_timed(session, matched[name]))
                reason = _enough(times[name], seconds)
                if reason:
                    ended[name] = reason
        if progress:
            progress(len(ended), len(sessions))
    return {name: {"batch": batch, **_summary(times[name], batch), "ended_by": ended[name]} for name in sessions}


def _timed(session: Session, feeds: dict[str, NDArray[Any]]) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - started


def _enough(times: Sequence[float], seconds: float) -> str | None:
    if len(times) >= MIN_RUNS and _half_width(times) <= HALF_WIDTH:
        return "precision"
    return "time" if sum(times) >= seconds and len(times) >= 2 else None


def _half_width(times: Sequence[float]) -> float:
    """Half the distance of the order statistics n/2 -+ z sqrt(n)/2, over the median."""
    ordered, n = sorted(times), len(times)
    reach = _Z * math.sqrt(n) / 2
    low, high = ordered[max(0, math.floor(n / 2 - reach))], ordered[min(n - 1, math.ceil(n / 2 + reach))]
    return (high - low) / 2 / float(np.median(ordered))


def _summary(times: Sequence[float], batch: int) -> dict[str, Any]:
    milliseconds = np.asarray(times) * 1e3
    spread = {name: float(np.percentile(milliseconds, share)) for name, share in _PERCENTILES.items()}
    mean = float(milliseconds.mean())
    return {
        "runs": len(times),
        "mean_ms": mean,
        **spread,
        "half_width": _half_width(times),
        "samples_per_s": batch / mean * 1e3,
    }


def _matched(session: Session, feeds: Arrays) -> dict[str, NDArray[Any]]:
    taken = match_names(list(feeds), [spec.name for spec in session.inputs])
    return {taken[name]: np.ascontiguousarray(value) for name, value in feeds.items()}


def bench_bundle(
    folder: str | Path,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    seconds: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every artefact of a bundle on every backend that runs it here.

    Args:
        folder: the bundle.
        backends: these only; None for all but the float64 reference, which is no way to run a network.
        batches: sizes of the batch; golden samples are repeated to fill them.
        seconds: per artefact, backend and batch.
        progress: called with (done, total).

    Returns:
        `machine`, `packages`, `seconds` and `rows`: of each artefact, backend and batch what `measure` gives, or the
        `reason` why it was not timed.

    Raises:
        ConfigError: a batch smaller than one, or an unknown backend.
        MissingDependencyError: a backend asked for by name cannot run here.
    """
    if min(batches, default=0) < 1 or seconds <= 0:
        raise ConfigError(f"--bench takes batches of 1 and more and a time above 0; found {list(batches)}, {seconds} s")
    opened = open_bundle(folder)
    golden = Golden.load(opened.path(layout.GOLDEN))
    chosen = {name: b for name, b in choose_backends(backends).items() if backends or name != "reference"}
    sessions: dict[str, tuple[Session, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for artefact in bundle_artefacts(opened):
        for name, backend in chosen.items():
            if backend.accepts(artefact.path):
                found = _opened(backend, artefact.path)
                about = {"artefact": artefact.name, "precision": artefact.precision, "backend": name}
                if isinstance(found, Session):
                    sessions[f"{artefact.name} on {name}"] = (found, about)
                else:
                    rows.append(about | {"reason": found})
    for number, batch in enumerate(batches):
        feeds = {n: np.resize(array, (batch, *array.shape[1:])) for n, array in golden.inputs.items()}
        fitting = {}
        for key, (session, about) in sessions.items():
            reason = _refuses(session, feeds, batch)
            if reason is None:
                fitting[key] = session
            else:
                rows.append(about | {"batch": batch, "reason": reason})
        total = len(batches) * max(len(fitting), 1)

        def report(done: int, count: int, before: int = number, total: int = total) -> None:
            if progress:
                progress(before * count + done, total)

        timed = measure(fitting, feeds, seconds, report) if fitting else {}
        rows += [sessions[key][1] | {"arithmetic": sessions[key][0].arithmetic} | row for key, row in timed.items()]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return {"machine": machine, "packages": installed_versions(_PACKAGES), "seconds": seconds, "rows": rows}


def _refuses(session: Session, feeds: Arrays, batch: int) -> str | None:
    """Why a session cannot be timed on this batch, or None."""
    try:
        ranges = session.batches(_matched(session, feeds))
    except LowprecError as error:
        return str(error)
    if any(batch in sizes for sizes in ranges):
        return None
    return f"it takes batches of {', '.join(f'{sizes[0]} to {sizes[-1]}' for sizes in ranges)}"


def _opened(backend: Backend, path: Path) -> Session | str:
    """A session, or why there is none."""
    try:
        return backend.open(path)
    except LowprecError as error:
        return str(error)
