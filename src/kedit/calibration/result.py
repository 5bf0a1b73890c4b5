"""The result of a calibration: the choice, what was tried, and the preset file that holds both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.calibration.candidates import Candidate
from kedit.calibration.choice import METRIC_NAMES, RULE, difference, kept, measured
from kedit.calibration.stage import Stage
from kedit.editors import presets
from kedit.evaluation import EvalReport
from kedit.models.defaults import Preset
from kedit.utils.registry import import_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MACHINE = ("dtype", "compute_dtype")  # hyper-parameters that a preset leaves to the user


@dataclass(frozen=True, eq=False)
class Calibration:
    """A finished calibration.

    Attributes:
        editor: the editor's name.
        regularizer: the regularizer's name, if its γ was chosen.
        start: built-in preset or rule.
        chosen: the best hyper-parameters.
        stages: what was tried.
        development: the runs of start and choice on all development cases.
        held_out: the same on the further cases; ``None`` without any.
        meta: model, machine, corpus, numbers of cases.
        folder: where the runs are kept.
        regularized: what the start changes where a regularizer is used, by its name (:class:`Preset`).
    """

    editor: str
    regularizer: str | None
    start: Candidate
    chosen: Candidate
    stages: tuple[Stage, ...]
    development: tuple[EvalReport, EvalReport]
    held_out: tuple[EvalReport, EvalReport] | None
    meta: dict[str, Any]
    folder: Path
    regularized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def preset(self) -> Preset:
        """The choice, as editors take it; for regularizers that were not searched, what the start has."""
        plain = [self.start, *(stage.chosen for stage in self.stages if stage.name != "gamma")][-1]
        values = {key: value for key, value in plain.config.to_dict().items() if key not in MACHINE}
        return Preset(values, {**self.regularized, **self._own})

    @property
    def _own(self) -> dict[str, dict[str, Any]]:
        """What was chosen of the regularizer."""
        if self.regularizer is None or self.chosen.gamma is None:
            return {}
        before = self.regularized.get(self.regularizer, {}).get("self", {})
        return {self.regularizer: {**self.chosen.changed, "self": {**before, "gamma": self.chosen.gamma}}}

    def evidence(self) -> dict[str, Any]:
        """What the choice rests on, as JSON values."""
        checks = {"development": self.development, "held_out": self.held_out}
        return {
            **self.meta,
            "rule": RULE,
            "stages": {
                stage.name: {"chosen": stage.rows[stage.best].value, "tried": [row.to_dict() for row in stage.rows]}
                for stage in self.stages
            },
            "compared": {name: _compared(*pair) for name, pair in checks.items() if pair is not None},
        }

    def save(self, path: str | Path) -> Path:
        """Write the preset with its evidence into a file that editors read.

        Entries of other editors stay, and what the file says of regularizers that were not searched.

        Raises:
            ConfigError: the file holds something else, or cannot be written.
        """
        known = presets.read(path).get(self.editor) if Path(path).is_file() else None
        earlier = {} if known is None else known.regularized
        merged = Preset(self.preset.values, {**self.regularized, **earlier, **self._own})
        return presets.save(path, self.editor, merged, self.evidence())

    def to_markdown(self) -> str:
        """Tables of all that was tried, and the comparison of the choice with the start."""
        about, machine = self.meta["model"], self.meta["environment"]
        name = about["name"] or about["type"]
        added = f" with {self.regularizer}" if self.regularizer else ""
        lines = [
            f"# {self.editor}{added} calibrated on {name}",
            "",
            f"{self.meta['cases']} development cases that the model knows, {self.meta['contexts']} contexts, second moments from "
            f"{self.meta['corpus']}; kedit {machine['kedit']}, torch {machine['torch']}, transformers {machine['transformers']}.",
            "",
            f"Chosen is {RULE}. Candidates with fewer cases did not go on to the second round.",
            "",
        ]
        for stage in self.stages:
            traced = any(row.effect is not None for row in stage.rows)
            heads = [stage.name, "cases", *(n.upper() for n in METRIC_NAMES), "kept", *(["traced"] if traced else [])]
            lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
            for number, row in enumerate(stage.rows):
                label = f"**{row.label}**" if number == stage.best else row.label
                figures = [_shown(row.metrics.get(n)) for n in METRIC_NAMES]
                cells = [label, str(row.cases), *figures, _shown(kept(row.metrics))]
                cells += [_shown(row.effect)] if traced else []
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
        lines += ["“kept” is the mean of NS, DNS and RS; bold: chosen.", ""]
        for words, pair in (("development", self.development), ("other", self.held_out)):
            if pair is not None:
                lines += _comparison(words, pair)
        return "\n".join(lines)

    def figure(self) -> Figure:
        """The trade-off: PS across, the mean of NS, DNS and RS up, a panel per stage.

        Raises:
            DependencyError: matplotlib is not installed.
        """
        drawn: Figure = import_target("kedit.calibration.figure:tradeoff")(self.stages)
        return drawn


def _compared(start: EvalReport, chosen: EvalReport) -> dict[str, Any]:
    gained = difference(chosen, start)
    return {
        "cases": len(chosen.records),
        "start": {name: round(value, 1) for name, value in measured(start).items()},
        "chosen": {name: round(value, 1) for name, value in measured(chosen).items()},
        "kept_gained": None if gained is None else {key: getattr(gained, key) for key in ("value", "low", "high")},
    }


def _comparison(words: str, pair: Sequence[EvalReport]) -> list[str]:
    start, chosen = pair
    rows = [
        ("unedited", measured(start, "before")),
        ("start", measured(start)),
        ("chosen", measured(chosen)),
    ]
    gained = difference(chosen, start)
    return [
        f"| {len(start.records)} {words} cases | {' | '.join(n.upper() for n in METRIC_NAMES)} | kept |",
        "|---|" + "---|" * (len(METRIC_NAMES) + 1),
        *(
            f"| {label} | {' | '.join(_shown(each.get(n)) for n in METRIC_NAMES)} | {_shown(kept(each))} |"
            for label, each in rows
        ),
        "",
        *([f"Kept, chosen − start: {gained.text(1)} points (95% interval by case).", ""] if gained else []),
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"
