"""Figures of experiments and sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kedit.bench.choice import FIVE
from kedit.bench.experiment import Experiment
from kedit.bench.rows import NONE
from kedit.bench.sweep import Sweep, text
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


@styled
def sweep_lines(sweep: Sweep) -> Figure:
    """A panel per metric over the values of the first key that varies, a line per combination of the others.

    A star marks the best point.
    """
    from matplotlib.figure import Figure

    varied = [number for number, values in enumerate(sweep.grid.values()) if len(values) > 1] or [0]
    across, others = varied[0], varied[1:]
    metrics = [name for name in FIVE if any(name in report.estimates for report in sweep.reports.values())]
    values = list(sweep.grid[sweep.keys[across]])
    figure = Figure(figsize=(1.5 + 2.6 * len(metrics), 4.2), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    lines = list(dict.fromkeys(tuple(point[i] for i in others) for point in sweep.reports))
    names = [sweep.keys[i] for i in others]
    best = sweep.best()
    for axis, metric in zip(axes, metrics, strict=True):
        for number, rest in enumerate(lines):
            points = [
                point
                for point, report in sweep.reports.items()
                if tuple(point[i] for i in others) == rest and metric in report.estimates
            ]
            found = [sweep.reports[point][metric] for point in points]
            places = [values.index(point[across]) + 0.06 * number for point in points]
            centre = [one.value for one in found]
            low = [one.value - (one.value if one.low is None else one.low) for one in found]
            high = [(one.value if one.high is None else one.high) - one.value for one in found]
            label = ", ".join(f"{key}={text(value)}" for key, value in zip(names, rest, strict=True))
            colour = COLOURS[number % len(COLOURS)]
            axis.errorbar(places, centre, yerr=[low, high], marker="o", color=colour, elinewidth=0.8, label=label)
            if best in points:
                place = points.index(best)
                axis.plot(places[place], centre[place], marker="*", markersize=16, color=colour)
        axis.set_title(METRICS[metric].label)
        axis.set_xticks(range(len(values)), list(map(text, values)))
        axis.set_xlabel(sweep.keys[across])
        axis.grid(color="#dddddd")
    axes[0].set_ylabel("%")
    if others:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure
