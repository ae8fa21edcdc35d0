"""Limits and verdicts: what counts as the same, said in one place and as arguments.

Why bands and not one threshold: the floor is itself an estimate, and valid runtimes differ from it by a factor of up
to about 2.5 (order of summation, fused rounding). Between 3 and 6 times the floor nothing is proven, so it passes with
a warning; defects start far above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lowprec.errors import ArtifactError, ConfigError

Verdict = Literal["pass", "warn", "fail", "inconclusive", "info"]
# From harmless to decisive: the verdict of a whole is its worst part's; "info" never decides.
_SEVERITY: tuple[Verdict, ...] = ("info", "pass", "warn", "inconclusive", "fail")


@dataclass(frozen=True)
class Limits:
    """What a comparison is judged by.

    Args:
        warn: rho above this is a warning, in multiples of the noise floor.
        fail: rho above this fails.
        confidence: of every interval.
        min_agreement: share of equal top-1 decisions that is claimed, or None for no claim.
        margin: drop of accuracy, as a share (0.01 is one point), that is claimed not to be exceeded, or None.
    """

    warn: float = 3.0
    fail: float = 6.0
    confidence: float = 0.95
    min_agreement: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.warn <= self.fail < math.inf:
            raise ConfigError(f"limits: warn {self.warn} and fail {self.fail} must be 0 < warn <= fail, and finite")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"limits: confidence {self.confidence} must lie between 0 and 1, such as 0.95")
        if self.min_agreement is not None and not 0 < self.min_agreement < 1:
            raise ConfigError(f"limits: min_agreement {self.min_agreement} must lie between 0 and 1, such as 0.99")
        if self.margin is not None and not 0 < self.margin < 1:
            raise ConfigError(f"limits: margin {self.margin} must lie between 0 and 1; 0.01 is one point of accuracy")

    def band(self, rho: float) -> Verdict:
        """Pass, warn or fail for a figure in multiples of the floor; NaN fails."""
        if rho <= self.warn:
            return "pass"
        return "warn" if rho <= self.fail else "fail"


@dataclass(frozen=True)
class Check:
    """One figure, what it was held against, and what that means.

    Args:
        name: the metric, a colon, the output: `rho:logits`.
        verdict: `info` where the figure decides nothing.
        value: the figure, or None where there is nothing to compute it from.
        limit: what it was held against, or None.
        text: one sentence for people.
        interval: confidence interval of the value, where it estimates a share.
    """

    name: str
    verdict: Verdict
    value: float | None
    limit: float | None
    text: str
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON: infinities and NaN become the strings inf, -inf and nan."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "value": json_number(self.value),
            "limit": json_number(self.limit),
            "text": self.text,
            "interval": None if self.interval is None else list(self.interval),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Check:
        """What `to_dict` gave; raises `ArtifactError` for anything else."""
        try:
            verdict = data["verdict"]
            if verdict not in _SEVERITY:
                raise ValueError(verdict)
            figures = (_number(data["value"]), _number(data["limit"]))
            low_high = data.get("interval")
            interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
            return cls(str(data["name"]), verdict, *figures, str(data["text"]), interval)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"a parity check is damaged: {error!r} in {str(data)[:80]}") from None


def worst(verdicts: list[Verdict]) -> Verdict:
    """The verdict of a whole: fail, else inconclusive, else warn, else pass; inconclusive when nothing decides."""
    deciding = [verdict for verdict in verdicts if verdict != "info"]
    return max(deciding, key=_SEVERITY.index) if deciding else "inconclusive"


def json_number(value: float | None) -> float | str | None:
    """The number, or the string inf, -inf or nan: JSON has no such literals."""
    return value if value is None or math.isfinite(value) else str(float(value))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
