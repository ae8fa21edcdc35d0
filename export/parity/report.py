"""The parity report: stages from the trained network to the engine, each with its checks, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lowprec.artifacts import json_text
from lowprec.errors import ArtifactError, ParityError
from lowprec.export.parity.verdicts import Check, Verdict, json_number, worst

Status = Literal["ran", "built, not run here", "not available here", "failed to run"]
STATUSES: tuple[Status, ...] = ("ran", "built, not run here", "not available here", "failed to run")


@dataclass(frozen=True)
class Stage:
    """One artefact on one backend, held against the reference.

    Args:
        name: unique in the report, for people (`fp16 on onnxruntime`).
        artefact: file name, or what was compared in memory.
        backend: the backend's name.
        arithmetic: what the backend really computes in.
        status: whether it ran. A stage that did not run decides nothing; one that failed to run fails.
        reason: why it did not run; empty when it ran.
        checks: what was found; empty when it did not run.
        placement: how many nodes ran where, by device or execution provider; empty where the backend does not say.
    """

    name: str
    artefact: str
    backend: str
    arithmetic: str
    status: Status = "ran"
    reason: str = ""
    checks: tuple[Check, ...] = ()
    placement: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst of its checks; `info` when it was not run here."""
        if self.status == "failed to run":
            return "fail"
        return worst([check.verdict for check in self.checks]) if self.status == "ran" else "info"

    def worst(self, metric: str) -> Check | None:
        """The check of a metric that is worst over the stage's outputs; None where it has no figure."""
        found = [c for c in self.checks if c.name.partition(":")[0] == metric and c.value is not None]
        sign = -1.0 if metric == "agreement" else 1.0  # the one figure in the waterfall of which more is better
        return max(found, key=lambda check: sign * (check.value or 0.0), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON."""
        return {
            "name": self.name,
            "artefact": self.artefact,
            "backend": self.backend,
            "arithmetic": self.arithmetic,
            "status": self.status,
            "reason": self.reason,
            "verdict": self.verdict,
            "checks": [check.to_dict() for check in self.checks],
            "placement": self.placement,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stage:
        """What `to_dict` gave; raises `ArtifactError` for anything else."""
        try:
            if data["status"] not in STATUSES:
                raise ValueError(data["status"])
            texts = {key: str(data[key]) for key in ("name", "artefact", "backend", "arithmetic", "reason")}
            checks = tuple(Check.from_dict(c) for c in data["checks"])
            placement = {str(where): int(count) for where, count in data.get("placement", {}).items()}
            return cls(**texts, status=data["status"], checks=checks, placement=placement)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"a stage of the parity report is damaged: {error!r}") from None


@dataclass(frozen=True)
class ParityReport:
    """Stages in the order of the waterfall, and facts about the whole.

    Args:
        stages: each artefact on each backend.
        facts: limits, versions, samples, hashes; values that JSON can hold.
    """

    stages: tuple[Stage, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the stages that ran; `inconclusive` when none did."""
        return worst([stage.verdict for stage in self.stages])

    @property
    def passed(self) -> bool:
        """Whether parity holds, warnings included."""
        return self.verdict in ("pass", "warn")

    @property
    def absent(self) -> dict[str, str]:
        """Backends that no artefact could be run on here for one and the same reason, which is the value."""
        reasons: dict[str, set[str]] = {}
        for stage in self.stages:
            here = "" if stage.status != "not available here" else stage.reason
            reasons.setdefault(stage.backend, set()).add(here)
        return {backend: next(iter(said)) for backend, said in reasons.items() if len(said) == 1 and said != {""}}

    def raise_if_failed(self) -> None:
        """Raises `ParityError` unless parity holds, naming the first stage and check of the worst verdict."""
        if not self.passed:
            raise ParityError(self.failure())

    def failure(self) -> str:
        """Which stage and check stand against parity, with the figures, in one line; empty when parity holds."""
        if self.passed:
            return ""
        verdict = self.verdict
        word = "fails" if verdict == "fail" else "is undecided"
        for stage in self.stages:
            if stage.verdict != verdict:
                continue
            if stage.status == "failed to run":
                return f"parity fails in stage {stage.name!r}: it could not be run: {stage.reason}"
            for check in stage.checks:
                if check.verdict == verdict:
                    figures = f"value {_figure(check.value)}, limit {_figure(check.limit)}"
                    return f"parity {word} in stage {stage.name!r}, check {check.name!r} ({figures}): {check.text}"
            return f"parity {word}: stage {stage.name!r} holds no check that decides"
        return "parity is undecided: no stage ran here"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON; infinities and NaN are strings."""
        stages = [stage.to_dict() for stage in self.stages]
        facts: dict[str, Any] = _strict(self.facts)
        return {"verdict": self.verdict, "passed": self.passed, "stages": stages, "facts": facts}

    def to_json(self) -> str:
        """Deterministic strict JSON."""
        return json_text(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParityReport:
        """What `to_dict` gave; verdicts are derived anew. Raises `ArtifactError` for anything else."""
        try:
            return cls(tuple(Stage.from_dict(stage) for stage in data["stages"]), dict(data["facts"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the parity report is damaged: {error!r}") from None


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
