"""The paper's table on any model: editors × regularizers, γ chosen on development cases, measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kedit.bench.choice import GammaChoice, choose_gamma
from kedit.bench.progress import TimeLeft
from kedit.bench.rows import NONE, Row
from kedit.bench.suite import Suite
from kedit.editors.base import Editor
from kedit.errors import ConfigError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.report import EvalReport
from kedit.utils.progress import logger

GAMMAS = (0.02, 0.1, 0.5, 2.0, 10.0)
STEP = 5.0  # between γ beyond those that are given
BEYOND = 2  # of these on either side at most
CHUNK = 8  # an interrupt loses so many cases at most


@dataclass
class Experiment:
    """A table of editors × rows.

    Attributes:
        suite: the model and where runs are kept.
        editors: by name.
        rows: what is added to each editor.
        development: cases on which γ is chosen.
        held_out: cases that the table is about; no subject is in both.
        gammas: tried on the development cases; up to two more on either side where the best lies at an end.
        fluency: tokens to generate on the held-out cases' generation probes; 0: none.
        chunk: cases whose values are optimised together.
        reports: what is finished, by editor and row.
        choices: the γ that were chosen, by editor and row.
        skipped: rows that an editor has no use for, with the reason.
    """

    suite: Suite
    editors: Sequence[str]
    rows: Sequence[Row]
    development: Sequence[EditCase]
    held_out: Sequence[EditCase]
    gammas: Sequence[float] = GAMMAS
    fluency: int = 0
    chunk: int = CHUNK
    reports: dict[tuple[str, str], EvalReport] = field(default_factory=dict)
    choices: dict[tuple[str, str], GammaChoice] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that γ can be chosen where one is to be."""
        if any(row.chooses_gamma for row in self.rows):
            if not self.development:
                named = ", ".join(row.label for row in self.rows if row.chooses_gamma)
                raise ConfigError(
                    f"γ of {named} is chosen on development cases, and there are none. Give "
                    "some (--dev-cases 20), or a γ: sadr:auto, sadr:0.1."
                )
            if not self.gammas:
                raise ConfigError("There is no γ to choose from. Give at least one (--gammas 0.1,1).")
        both = {case.edit.subject for case in self.development} & {case.edit.subject for case in self.held_out}
        if both:
            raise ConfigError(f"{len(both)} subjects are in development and held-out cases, {min(both)!r} among them.")

    def go(self, after_each: Callable[[], object] = lambda: None) -> None:
        """Run what is not finished; ``after_each`` is called whenever a row of the table is done."""
        made = {name: self.suite.editor(name) for name in self.editors}
        self.suite.prepare(list(made.values()))
        planned = list(self._planned(made))
        clock = TimeLeft([(self._kind(name, row), len(cases)) for name, row, cases in planned])
        for name, editor in made.items():
            for row in self.rows:
                if (name, row.label) in self.skipped:
                    continue
                gamma = None
                if row.chooses_gamma:
                    choice = self._choose(editor, row, clock)
                    self.choices[name, row.label] = choice
                    gamma = choice.gamma
                options = {"generate": self.fluency} if self.fluency else {}
                report = self._run(editor, row, gamma, self.held_out, clock, "held-out", **options)
                self.reports[name, row.label] = report
                after_each()

    def _planned(self, made: dict[str, Editor]) -> Iterator[tuple[str, Row, Sequence[EditCase]]]:
        """The runs as far as they are known beforehand; rows that an editor has no use for are skipped."""
        for name, editor in made.items():
            needs_plain = False
            editor.describe_call()  # what is wrong without any regularizer is no reason to skip a row
            for row in self.rows:
                regularizers = row.regularizers(self.gammas[0] if row.chooses_gamma else None)
                try:
                    editor.describe_call(regularizers)
                except ConfigError as error:
                    self.skipped[name, row.label] = str(error)
                    continue
                needs_plain |= row.chooses_gamma
                yield from ((name, row, self.development) for _ in (self.gammas if row.chooses_gamma else ()))
                yield name, row, self.held_out
            if needs_plain:
                yield name, Row(NONE), self.development

    def _choose(self, editor: Editor, row: Row, clock: TimeLeft) -> GammaChoice:
        def run(gamma: float) -> EvalReport:
            return self._run(editor, row, gamma, self.development, clock, "development")

        plain = self._run(editor, Row(NONE), None, self.development, clock, "development")
        larger = [max(self.gammas) * STEP**power for power in range(1, BEYOND + 1)]
        smaller = [min(self.gammas) / STEP**power for power in range(1, BEYOND + 1)]
        return choose_gamma(run, plain, self.gammas, larger, smaller)

    def _run(
        self,
        editor: Editor,
        row: Row,
        gamma: float | None,
        cases: Sequence[EditCase],
        clock: TimeLeft,
        half: str,
        **options: Any,
    ) -> EvalReport:
        regularizers = row.regularizers(gamma)
        options |= {"exact": False, "chunk": self.chunk}
        kind = self._kind(editor.name, row)
        label = editor.name if row.label == NONE else f"{editor.name} + {row.label}"
        label += "" if gamma is None else f" (γ {gamma:g})"
        done = self.suite.finished(editor, regularizers, cases, **options)
        if not done:
            logger.info("%s: %d %s cases; %s.", label, len(cases), half, clock.text())
        report = self.suite.run(editor, regularizers, cases, **options)
        seconds = sum(report.seconds.values()) - report.seconds.get("prepare", 0.0)
        planned = cases is self.held_out or gamma is None or gamma in self.gammas
        clock.finish(kind, len(cases), seconds, planned=planned)
        return report

    @staticmethod
    def _kind(name: str, row: Row) -> str:
        return f"{name} {'+'.join(part.name for part in row.parts)}"
