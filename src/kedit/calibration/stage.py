"""One coordinate of a search: its candidates and what they measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kedit.calibration.candidates import Candidate
from kedit.calibration.choice import kept, measured
from kedit.evaluation import EvalReport


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        label: for people.
        value: of the stage's hyper-parameter.
        cases: that it edited.
        metrics: ES, PS, NS, DNS, RS after the edits, in per cent.
        effect: of the MLP in causal tracing, in points of probability.
    """

    label: str
    value: Any
    cases: int
    metrics: dict[str, float]
    effect: float | None = None

    @classmethod
    def of(cls, candidate: Candidate, report: EvalReport, label: str | None = None) -> Row:
        """The row of a candidate's run."""
        value = None if label else candidate.value
        return cls(label or candidate.label, value, len(report.records), measured(report))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rounded = {name: round(value, 1) for name, value in self.metrics.items()}
        effect = {} if self.effect is None else {"traced_effect": self.effect}
        return {"value": self.value, "cases": self.cases, **rounded, "kept": round(kept(self.metrics), 1), **effect}

    def __str__(self) -> str:
        figures = ", ".join(f"{name.upper()} {value:.0f}" for name, value in self.metrics.items())
        return f"{self.label}: {figures} ({self.cases} cases)"


@dataclass(frozen=True)
class Stage:
    """One coordinate of the search.

    Attributes:
        name: the hyper-parameter.
        chosen: the best candidate.
        rows: all that were tried; those on more cases went on to the second round.
        best: number of the chosen row.
    """

    name: str
    chosen: Candidate
    rows: tuple[Row, ...]
    best: int
