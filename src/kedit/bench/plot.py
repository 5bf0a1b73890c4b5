"""The trade-off of an experiment as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kedit.bench.experiment import Experiment
from kedit.bench.rows import NONE
from kedit.evaluation.metrics import METRICS
from kedit.evaluation.report import EvalReport
from kedit.report.figures import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
MARKERS = "osD^vP*X"
ACROSS, UP = "ps", "dns"


def points_of(experiment: Experiment, across: str = ACROSS, up: str = UP) -> dict[tuple[str, str], EvalReport]:
    """The rows that have both metrics."""
    return {key: report for key, report in experiment.reports.items() if {across, up} <= report.estimates.keys()}


@styled
def tradeoff(experiment: Experiment, across: str = ACROSS, up: str = UP) -> Figure:
    """Every row of the table as a point with its intervals, one metric against another; a colour per editor, a marker per row."""
    from matplotlib.figure import Figure

    labels = [row.label for row in experiment.rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    points = points_of(experiment, across, up)
    for (name, label), report in points.items():
        spread: dict[str, Any] = {}
        for side, metric in (("xerr", across), ("yerr", up)):
            point = report[metric]
            if point.low is not None and point.high is not None:
                spread[side] = [[point.value - point.low], [point.high - point.value]]
        colour = COLOURS[list(experiment.editors).index(name) % len(COLOURS)]
        axis.errorbar(
            report[across].value,
            report[up].value,
            fmt=MARKERS[labels.index(label) % len(MARKERS)],
            color=colour,
            elinewidth=0.8,
            label=name if label == NONE else f"{name} + {label}",
            **spread,
        )
    before = next((report.estimates[up]["before"] for report in points.values()), None)
    if before is not None:
        axis.axhline(before.value, color="#888888", linestyle="--", linewidth=1, label="unedited")
    axis.set_xlabel(f"{METRICS[across].label} (%)")
    axis.set_ylabel(f"{METRICS[up].label} (%)")
    axis.grid(color="#dddddd")
    figure.legend(loc="outside right upper")
    return figure
