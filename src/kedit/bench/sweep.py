"""A grid of hyper-parameters of one editor over development cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kedit.bench.choice import FIVE, LEAST_ES, balance, mean_of_parts, value
from kedit.bench.experiment import CHUNK
from kedit.bench.progress import TimeLeft
from kedit.bench.suite import Suite
from kedit.editors import editor_class
from kedit.editors.base import Editor
from kedit.errors import ConfigError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.metrics import METRICS, Metric
from kedit.evaluation.report import MEASURED_BY, EvalReport
from kedit.evaluation.statistics import Estimate, Floats, case_weights, harmonic_means
from kedit.regularizers import make, takes_gamma
from kedit.regularizers.base import Regularizer
from kedit.utils.progress import logger

BALANCE = "balance"
Point = tuple[Any, ...]


@dataclass
class Sweep:
    """A grid over development cases.

    Attributes:
        suite: the model and where runs are kept.
        editor: by name.
        grid: values by hyper-parameter of the editor, or by field of a regularizer: ``"sadr.select"``; ``"gamma"`` is γ of all
            regularizers that have one.
        cases: on which every point is run.
        regularizers: by name.
        by: what makes a point the best: a metric, or ``"balance"``, the harmonic mean of ES, PS, NS, RS and DNS (the mean of those
            that there are, where one is missing).
        chunk: cases whose values are optimised together.
        reports: what is finished, by the values of a point.
    """

    suite: Suite
    editor: str
    grid: Mapping[str, Sequence[Any]]
    cases: Sequence[EditCase]
    regularizers: Sequence[str] = ()
    by: str = BALANCE
    chunk: int = CHUNK
    reports: dict[Point, EvalReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of the grid and the metric, and that the cases have its probes."""
        self.check(self.editor, self.grid, self.regularizers, self.by)
        asked = {probe.kind for case in self.cases for probe in case.probes}
        for metric in _parts(self.by):
            if metric.kinds and not metric.kinds & asked:
                raise ConfigError(
                    f"No case has {' or '.join(sorted(metric.kinds))} probes, so {metric.label} is not measured and cannot tell "
                    f"which point is the best. Use another metric (--by) than {self.by}, or cases with such probes."
                )

    @staticmethod
    def check(editor: str, grid: Mapping[str, Sequence[Any]], regularizers: Sequence[str], by: str) -> None:
        """Raise ``ConfigError`` or ``UnknownNameError`` where a name of a sweep is unknown, or the metric not measured by one.

        Needs no model.
        """
        if not grid or not all(grid.values()):
            raise ConfigError("A sweep needs values to try. Give at least one --set KEY=VALUE,VALUE.")
        for metric in _parts(by):
            if metric.name in MEASURED_BY:
                raise ConfigError(
                    f"A sweep does not measure {metric.name}: that needs {MEASURED_BY[metric.name]} of an evaluation. Choose "
                    "by balance, or a metric of probes, such as ns or dns."
                )
        known = editor_class(editor).Config.field_names()
        for key in grid:
            if key == "gamma":
                if not any(map(takes_gamma, regularizers)):
                    raise ConfigError("gamma belongs to a regularizer that has a γ. Add --regularizer sadr.")
            elif "." in key:
                if not any(_is_of(key, name) for name in regularizers):
                    prefix = key.partition(".")[0]
                    raise ConfigError(f"{key} is a field of {prefix}, which is not used. Add --regularizer {prefix}.")
            elif key not in known:
                raise ConfigError(f"{editor} has no hyper-parameter {key!r}. It has {', '.join(sorted(known))}.")

    @property
    def keys(self) -> list[str]:
        """What is varied or set."""
        return list(self.grid)

    @property
    def points(self) -> list[Point]:
        """All combinations, the last key varying fastest."""
        return list(itertools.product(*self.grid.values()))

    def go(self, after_each: Callable[[], object] = lambda: None) -> None:
        """Run what is not finished; ``after_each`` is called whenever a point is done.

        Raises:
            ConfigError: a value is out of range, and nothing is run then; or the first point has no value of the metric.
        """
        made = {point: (self._editor(point), self._regularizers(point)) for point in self.points}
        for editor, regularizers in made.values():
            editor.describe_call(regularizers)
        self.suite.prepare([editor for editor, _ in made.values()])
        clock = TimeLeft([(self.editor, len(self.cases))] * len(made))
        for number, (point, (editor, regularizers)) in enumerate(made.items()):
            options: dict[str, Any] = {"exact": False, "chunk": self.chunk}
            if not self.suite.finished(editor, regularizers, self.cases, **options):
                logger.info("%s (%d of %d): %s.", self.label(point), number + 1, len(made), clock.text())
            report = self.suite.run(editor, regularizers, self.cases, **options)
            clock.finish(
                self.editor, len(self.cases), sum(report.seconds.values()) - report.seconds.get("prepare", 0.0)
            )
            if self.by != BALANCE and self.by not in report.estimates:
                raise ConfigError(
                    f"{self.label(point)} has no value for {self.by}, so it cannot tell which point is the best. Use another "
                    "metric (--by)."
                )
            self.reports[point] = report
            after_each()

    def label(self, point: Point) -> str:
        """``layers=5 gamma=0.1``."""
        return " ".join(f"{key}={text(value)}" for key, value in zip(self.keys, point, strict=True))

    def score(self, report: EvalReport) -> float:
        """What a point is judged by; more is better."""
        if self.by == BALANCE:
            return balance(report)
        found = value(report, self.by)
        return found if METRICS[self.by].direction == "higher" else -found

    def best(self) -> Point | None:
        """The best point of those that say their targets: ES at least 99, or the highest that there is; of equal ones the first."""
        if not self.reports:
            return None
        least = min(LEAST_ES, max(value(report, "es") for report in self.reports.values()))
        good = [point for point, report in self.reports.items() if value(report, "es") >= least]
        return max(good, key=self._rank)

    def _rank(self, point: Point) -> tuple[float, float, int]:
        report = self.reports[point]
        return self.score(report), mean_of_parts(report), -self.points.index(point)

    def against_best(self, point: Point) -> Estimate | None:
        """The paired difference of a point's score to the best one's, with its interval."""
        best = self.best()
        if best is None:
            return None
        one, other = self.reports[point], self.reports[best]
        if self.by != BALANCE:
            return one.compare(other, [self.by])[self.by]
        mine, theirs = _balances(one), _balances(other)
        return Estimate.of(balance(one) - balance(other), mine - theirs, len(one.records), len(one.records))

    def _editor(self, point: Point) -> Editor:
        own = {key: value for key, value in zip(self.keys, point, strict=True) if key != "gamma" and "." not in key}
        return self.suite.editor(self.editor, **own)

    def _regularizers(self, point: Point) -> list[Regularizer]:
        values = dict(zip(self.keys, point, strict=True))
        made = []
        for name in self.regularizers:
            fields = {key.partition(".")[2]: value for key, value in values.items() if _is_of(key, name)}
            if "gamma" in values and takes_gamma(name):
                fields.setdefault("gamma", values["gamma"])
            made.append(make(name, **fields))
        return made


def text(value: Any) -> str:
    """A value as it is typed."""
    return str(list(value)).replace(" ", "") if isinstance(value, tuple | list) else str(value)


def _parts(by: str) -> list[Metric]:
    """The metrics that a point is judged by; the balance takes those that there are."""
    return [] if by == BALANCE else [METRICS[name] for name in METRICS[by].parts or (by,)]


def _is_of(key: str, regularizer: str) -> bool:
    """Whether ``"sadr.select"`` is a field of a regularizer of that name."""
    prefix, dot, _ = key.partition(".")
    return bool(dot) and prefix.lower() in (regularizer.lower(), regularizer.rpartition(":")[2].lower())


def _balances(report: EvalReport) -> Floats:
    """The balance in every resample of the cases."""
    weights = case_weights(len(report.records))
    names = [name for name in FIVE if name in report.estimates]
    means = np.stack([METRICS[name].tallies(report.records, "after")[0].means(weights) for name in names])
    return harmonic_means(means) if len(names) == len(FIVE) else means.mean(0)
