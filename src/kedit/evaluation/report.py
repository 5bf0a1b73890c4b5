"""The result of an evaluation: records, estimates with intervals, and the forms they are written in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from kedit.edit import json_lines
from kedit.errors import DependencyError, EditError, PatchError
from kedit.evaluation.journal import make_folder, write_text
from kedit.evaluation.metrics import METRICS, Metric, chosen
from kedit.evaluation.records import CaseRecord
from kedit.evaluation.statistics import Estimate, Floats, case_weights, difference
from kedit.utils.files import write_whole
from kedit.utils.registry import import_target
from kedit.utils.validation import check_choice

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
    def missing(self) -> dict[str, str]:
        """The metrics that were asked for by name and have no value, with the reason."""
        return {
            metric.name: self._why_missing(metric)
            for metric in self.metrics
            if self.names and metric.name not in self.estimates
        }

    def _why_missing(self, metric: Metric) -> str:
        if metric.parts:
            parts = [
                name for name in metric.parts if METRICS[name].measure(self.records, self._weights)["after"] is None
            ]
            return "; ".join(f"{name}: {self._why_missing(METRICS[name])}" for name in parts)
        kinds = {probe.kind for record in self.records for probe in record.after.probes}
        if metric.kinds and not metric.kinds & kinds:
            return f"no case has {' or '.join(sorted(metric.kinds))} probes"
        if metric.name in MEASURED_BY:
            return f"it is measured with {MEASURED_BY[metric.name]}"
        return "none of the probes that it reads has what it needs (such as a wrong answer)"

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

    def rows(self, of: Literal["probes", "metrics"] = "probes") -> list[dict[str, Any]]:
        """The report as rows of plain values, for tables.

        Args:
            of: ``"probes"``: a row for each probe of each case, with its texts and its scores before and after (``nll_right``,
                ``probability_right``, ``accuracy_right``, the same of the wrong answer, ``exact``, ``text``, ...); ``"metrics"``:
                a row for each metric, with its value, interval and n before and after, and the difference.

        Raises:
            ConfigError: ``of`` is neither.
        """
        check_choice("of", of, ("probes", "metrics"))
        return (
            list(_metric_rows(self.estimates))
            if of == "metrics"
            else [row for record in self.records for row in _probe_rows(record)]
        )

    def to_frame(self, of: Literal["probes", "metrics"] = "probes") -> Any:
        """The rows as a ``pandas.DataFrame``; needs the package pandas.

        Raises:
            DependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise DependencyError(
                'to_frame() needs pandas: pip install pandas, or pip install "kedit[tables]". rows() gives the same as a list.'
            ) from error
        return pandas.DataFrame(self.rows(of))

    def to_csv(self, of: Literal["probes", "metrics"] = "probes") -> str:
        """The rows as CSV with a header."""
        rows = self.rows(of)
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_parquet(self, path: str | Path, of: Literal["probes", "metrics"] = "probes") -> Path:
        """Write the rows as a Parquet file, which pandas, polars and DuckDB read; needs the package pyarrow.

        Args:
            path: the new file; an existing one is replaced.
            of: which rows, as for :meth:`rows`.

        Returns:
            The path.

        Raises:
            DependencyError: pyarrow is not installed.
            EditError: the file cannot be written.
        """
        check_parquet()
        import pyarrow
        from pyarrow import parquet

        rows = self.rows(of)
        names = dict.fromkeys(name for row in rows for name in row)

        def write(file: IO[bytes]) -> None:
            columns = {name: pyarrow.array([row.get(name) for row in rows]) for name in names}
            # A column without any value gets a type too, so that the files of several runs can be read as one.
            empty = {name: column.cast("string") for name, column in columns.items() if column.type == pyarrow.null()}
            parquet.write_table(pyarrow.table({**columns, **empty}), file)

        try:
            return write_whole(Path(path), write)
        except PatchError as error:
            raise EditError(str(error)) from error

    def summary(self) -> dict[str, Any]:
        """The whole report but for the records, as JSON values."""
        measured = {}
        for name, states_of in self.estimates.items():
            metric = METRICS[name]
            about = {key: getattr(metric, key) for key in ("label", "direction", "protocol", "source", "summary")}
            states = {state: None if value is None else value.to_dict() for state, value in states_of.items()}
            measured[name] = {**about, **states}
        summary = {"run": self.meta, "metrics": measured, "failures": self.failures, "seconds": self.seconds}
        return {**summary, "missing": self.missing} if self.missing else summary

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
        if self.missing:
            lines += ["", "Asked for, and not measured:", ""]
            lines += [f"- {METRICS[name].label} (`{name}`): {reason}." for name, reason in self.missing.items()]
        if self.failures:
            lines += ["", f"{len(self.failures)} edits failed and count as unedited:", ""]
            lines += [f"- {name}: {reason}" for name, reason in self.failures.items()]
        lines += ["", "Time: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()) + "."]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """One page with tables and a figure (with ``kedit[plot]``), without anything from elsewhere."""
        return str(import_target("kedit.report.evaluation:evaluation_page")(self))

    def save(self, folder: str | Path) -> Path:
        """Write ``records.jsonl``, ``summary.json``, ``summary.md``, ``probes.csv`` and ``report.html``; returns the folder.

        Raises:
            EditError: the folder cannot be made or written.
        """
        target = make_folder(folder)
        lines = [json.dumps(record.to_dict(), ensure_ascii=False) for record in self.records]
        write_text(target / "records.jsonl", "\n".join(lines) + "\n")
        write_text(target / "summary.json", json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n")
        write_text(target / "summary.md", self.to_markdown())
        write_text(target / "probes.csv", self.to_csv())
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
        dropped, unnamed = self.meta.get("dropped_probes", 0), self.meta.get("cases_not_in_patch", 0)
        state = restored + (
            f", {dropped} probes left out because the run edits the facts they ask for" if dropped else ""
        )
        return state + (f", {unnamed} cases are about edits that the patch does not name" if unnamed else "")

    def __repr__(self) -> str:
        labelled = {
            METRICS[name].label: show(self.estimates[name]["after"]) for name in self.estimates if name in _SHORT
        }
        return f"EvalReport({self.title}: {', '.join(f'{label} {text}' for label, text in labelled.items())})"


def check_parquet() -> None:
    """Raise ``DependencyError`` where Parquet files cannot be written."""
    if find_spec("pyarrow") is None:
        raise DependencyError(
            'A Parquet file needs pyarrow. Install it with pip install "kedit[tables]", or take probes.csv (to_csv()).'
        )


MEASURED_BY = {
    "fluency": "generate=100 (--generate 100)",
    "reference_score": "generate=100 (--generate 100), on cases with references",
    "perplexity": "texts (--texts FILE)",
    "kl_drift": "texts (--texts FILE)",
    "attention_drift": "attention=True (--attention)",
    "attention_gain": "attention=True (--attention)",
    **{f"{name}_exact": "exact=True (without --no-exact)" for name in ("rewrite", "paraphrase", "portability")},
}


def _metric_rows(estimates: Mapping[str, Estimates]) -> Iterator[dict[str, Any]]:
    for name, states in estimates.items():
        row: dict[str, Any] = {"metric": name, "label": METRICS[name].label, "direction": METRICS[name].direction}
        for state, estimate in states.items():
            if estimate is not None:
                row |= {state: estimate.value, f"{state}_low": estimate.low, f"{state}_high": estimate.high}
                row |= {"n": estimate.n, "cases": estimate.cases}
        yield row


def _probe_rows(record: CaseRecord) -> Iterator[dict[str, Any]]:
    asked = record.asked or [None] * len(record.after.probes)
    for number, probe in enumerate(asked):
        before, after = record.before.probes[number], record.after.probes[number]
        row: dict[str, Any] = {"case": record.id, "edit": record.prompt, "probe": number, "kind": str(after.kind)}
        row |= {name: getattr(probe, name, None) for name in ("prompt", "right", "wrong")}
        for state, score in (("before", before), ("after", after)):
            for side in ("right", "wrong"):
                answer = getattr(score, side)
                if answer is not None:
                    measured = {"nll": answer.nll, "probability": answer.probability, "accuracy": answer.accuracy}
                    row |= {f"{what}_{side}_{state}": value for what, value in measured.items()}
            known = {name: getattr(score, name) for name in ("exact", "text", "entropy")}
            row |= {f"{name}_{state}": value for name, value in known.items() if value is not None}
            row |= {f"attention_{name}_{state}": value for name, value in score.attention.items()}
        yield {**row, "failure": record.failure}


_SHORT = ("es", "ps", "ns", "rs", "dns", "score")


def show(value: Estimate | None, metric: Metric | None = None) -> str:
    """``98.50 (97.00 to 100.00)``, or a dash; more digits for metrics that are no percentages."""
    if value is None:
        return "–"
    digits = 2 if metric is None or metric.scale == 100.0 else 4
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"
