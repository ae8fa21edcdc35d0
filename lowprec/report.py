"""What a transformation did and what it did not do: the one report shape of convert, fold and re-estimation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowprec.errors import ArtifactError


@dataclass(frozen=True)
class Row:
    """One place in a network and one sentence about it.

    Args:
        name: the module path (`layer1.0.bn1`) or graph name.
        reason: what was done there, or why it was not.
    """

    name: str
    reason: str


@dataclass
class ChangeReport:
    """Rows of what changed and of what was refused, and the figures that go with them.

    Args:
        changed: what was done, in graph order.
        refused: what was left alone, each with its reason.
        facts: figures about the whole, JSON-serialisable (`{"float64_error": 3e-16}`).
    """

    changed: list[Row] = field(default_factory=list)
    refused: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def change(self, name: str, reason: str) -> None:
        """Adds a row to `changed`."""
        self.changed.append(Row(name, reason))

    def refuse(self, name: str, reason: str) -> None:
        """Adds a row to `refused`."""
        self.refused.append(Row(name, reason))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ChangeReport:
        """What `to_dict` gave, further keys ignored; raises `ArtifactError` for anything else."""
        try:
            rows = {key: [Row(str(r["name"]), str(r["reason"])) for r in data[key]] for key in ("changed", "refused")}
            return cls(**rows, facts=dict(data["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"a report of changes is damaged: {error!r}") from None
