"""The result of an evaluation: records, estimates with intervals, and the forms they are written in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kedit.edit import json_lines
from kedit.errors import EditError
from kedit.evaluation.journal import make_folder, write_text
from kedit.evaluation.metrics import METRICS, Metric, chosen
from kedit.evaluation.records import CaseRecord
from kedit.evaluation.statistics import Estimate, Floats, case_weights, difference
from kedit.utils.registry import import_target

Estimates = dict[str, Estimate | None]


@dataclass(eq=False)
class EvalReport:
    """A finished evaluation.

    Attributes:
        records: per case, everything that was measured.
        meta: the run: editor, regularizers, model, machine, versions.
        names: the metrics to report; ``None``: all that have values.
    """

    records: list[CaseRecord]
    meta: dict[str, Any]
    names: Sequence[str] | None = None
    _weights: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Draw the cases of the bootstrap, once for all metrics."""
        self._weights = case_weights(len(self.records))

    def __getitem__(self, name: str) -> Estimate:
        """A metric after the edits; raises ``EditError`` where no case has a value for it."""
        estimate = METRICS[name].measure(self.records, self._weights)["after"]
        if estimate is None:
            raise EditError(
                f"No case of this run has a value for {name!r}: it reads {sorted(METRICS[name].kinds)} probes."
            )
        return estimate

    @cached_property
    def estimates(self) -> dict[str, Estimates]:
        """By metric: the estimate before, after, and their paired difference."""
        measured = {metric.name: metric.measure(self.records, self._weights) for metric in self.metrics}
        return {name: states for name, states in measured.items() if states["after"] is not None}

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that are reported, where they have values."""
        return chosen(self.names)

    @property
    def failures(self) -> dict[str, str]:
        """The reasons why edits failed, by case."""
        return {record.id: record.failure for record in self.records if record.failure}

    @property
    def seconds(self) -> dict[str, float]:
        """Time by stage, over all cases."""
        total = {"prepare": float(self.meta.get("prepare_seconds", 0.0))}
        for record in self.records:
            for stage, seconds in record.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def compare(self, other: EvalReport, names: Sequence[str] | None = None) -> dict[str, Estimate | None]:
        """This run minus another one on the same cases, after the edits: paired differences with intervals."""
        mine, theirs = ({record.id: record for record in report.records} for report in (self, other))
        if mine.keys() != theirs.keys():
            raise EditError(
                f"The runs have different cases ({len(mine.keys() ^ theirs.keys())} are in one of them only)."
            )
        paired = [theirs[record.id] for record in self.records]
        differences = {}
        for metric in chosen(names if names is not None else self.names):
            now, then = metric.tallies(self.records, "after"), metric.tallies(paired, "after")
            differences[metric.name] = difference(now, then, self._weights)
        return {name: value for name, value in differences.items() if value is not None or names is not None}

    def summary(self) -> dict[str, Any]:
        """The whole report but for the records, as JSON values."""
        measured = {}
        for name, states_of in self.estimates.items():
            metric = METRICS[name]
            about = {key: getattr(metric, key) for key in ("label", "direction", "protocol", "source", "summary")}
            states = {state: None if value is None else value.to_dict() for state, value in states_of.items()}
            measured[name] = {**about, **states}
        return {"run": self.meta, "metrics": measured, "failures": self.failures, "seconds": self.seconds}

    def to_markdown(self) -> str:
        """Title, a table of the metrics, failures and time."""
        lines = [f"# {self.title}", "", f"{len(self.records)} cases, {self._state()}.", ""]
        lines += [
            "| metric | before | after | difference | n (cases) | protocol |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        for name, states in self.estimates.items():
            metric, after = METRICS[name], states["after"]
            assert after is not None
            arrow = "↑" if metric.direction == "higher" else "↓"
            cells = [
                f"{metric.label} {arrow}",
                *(show(states[state], metric) for state in ("before", "after", "difference")),
            ]
            lines.append(f"| {' | '.join(cells)} | {after.n} ({after.cases}) | {metric.protocol} |")
        lines += [
            "",
            "In brackets: 95% bootstrap interval by case; n counts prompts, or cases where a protocol averages by case.",
        ]
        if self.failures:
            lines += ["", f"{len(self.failures)} edits failed and count as unedited:", ""]
            lines += [f"- {name}: {reason}" for name, reason in self.failures.items()]
        lines += ["", "Time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()) + "."]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """One page with tables and a figure (with ``kedit[plot]``), without anything from elsewhere."""
        return str(import_target("kedit.report.evaluation:evaluation_page")(self))

    def save(self, folder: str | Path) -> Path:
        """Write ``records.jsonl``, ``summary.json``, ``summary.md`` and ``report.html``; returns the folder.

        Raises:
            EditError: the folder cannot be made or written.
        """
        target = make_folder(folder)
        lines = [json.dumps(record.to_dict(), ensure_ascii=False) for record in self.records]
        write_text(target / "records.jsonl", "\n".join(lines) + "\n")
        write_text(target / "summary.json", json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n")
        write_text(target / "summary.md", self.to_markdown())
        write_text(target / "report.html", self.to_html())
        return target

    @classmethod
    def load(cls, folder: str | Path) -> EvalReport:
        """Read back what :meth:`save` wrote."""
        target = Path(folder)
        try:
            lines = (target / "records.jsonl").read_text(encoding="utf-8")
            summary = json.loads((target / "summary.json").read_text(encoding="utf-8"))
            records = [CaseRecord.from_dict(json.loads(line)) for _, line in json_lines(lines)]
            meta = dict(summary["run"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EditError(f"{target} holds no finished evaluation ({error}). Run it to its end first.") from error
        return cls(records, meta)

    @property
    def title(self) -> str:
        """The run in a line."""
        editor = self.meta.get("editor") or "the unedited model"
        names = [item["name"] for item in self.meta.get("regularizers") or []]
        model = self.meta.get("model", {})
        on = model.get("name") or model.get("type", "a model")
        return f"{editor}{' + ' + ', '.join(names) if names else ''} on {on}, {self.meta.get('mode', 'single')}"

    def _state(self) -> str:
        restored = "weights restored" if self.meta.get("weights_restored") else "WEIGHTS NOT RESTORED"
        dropped = self.meta.get("dropped_probes", 0)
        return restored + (
            f", {dropped} probes left out because the run edits the facts they ask for" if dropped else ""
        )

    def __repr__(self) -> str:
        labelled = {
            METRICS[name].label: show(self.estimates[name]["after"]) for name in self.estimates if name in _SHORT
        }
        return f"EvalReport({self.title}: {', '.join(f'{label} {text}' for label, text in labelled.items())})"


_SHORT = ("es", "ps", "ns", "rs", "dns", "score")


def show(value: Estimate | None, metric: Metric | None = None) -> str:
    """``98.50 (97.00 to 100.00)``, or a dash; more digits for metrics that are no percentages."""
    if value is None:
        return "–"
    digits = 2 if metric is None or metric.scale == 100.0 else 4
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"
