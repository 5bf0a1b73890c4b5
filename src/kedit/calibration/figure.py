"""The figure of a calibration: what its candidates say of the target, and what they keep of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedit.calibration.choice import kept
from kedit.calibration.stage import Stage
from kedit.report.figures import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"tried on the first cases": "#bbbbbb", "tried on all": "#4477aa", "chosen": "#ee6677"}
WIDTH, HEIGHT = 5.2, 4.9  # inches per stage
NEAR = 0.06  # of an axis: candidates that are closer share a label


@styled
def tradeoff(stages: Sequence[Stage]) -> Figure:
    """A panel per stage: PS across, the mean of NS, DNS and RS up; candidates that lie close together share a label."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(WIDTH * len(stages), HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    grey, blue, red = KINDS.values()
    labels: list[list[tuple[float, float, str]]] = [[] for _ in stages]
    for axis, stage, texts in zip(panels, stages, labels, strict=True):
        most = max(row.cases for row in stage.rows)
        for number, row in enumerate(stage.rows):
            place = row.metrics.get("ps", row.metrics["es"]), kept(row.metrics)
            chosen = number == stage.best
            colour = red if chosen else blue if row.cases == most else grey
            axis.plot(*place, marker="D" if chosen else "o", color=colour, linestyle="none", zorder=2 + chosen)
            texts.append((*place, row.label.split(" ", 1)[-1] if row.value is not None else row.label))
        axis.set_title(stage.name)
        axis.set_xlabel("PS (%)")
        axis.margins(0.2)
        axis.grid(color="#dddddd")
    for axis, texts in zip(panels, labels, strict=True):  # once the axes, which share a height, have their limits
        for x, y, text in _joined(texts, axis):
            side, align = ((-8, -4), "right") if x > sum(axis.get_xlim()) / 2 else ((8, -4), "left")
            axis.annotate(text, (x, y), side, textcoords="offset points", ha=align, fontsize=10, color="#444444")
    panels[0].set_ylabel("mean of NS, DNS, RS (%)")
    handles = [Line2D([], [], marker="o", color=colour, linestyle="none", label=name) for name, colour in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _joined(labels: Sequence[tuple[float, float, str]], axis: Axes) -> list[tuple[float, float, str]]:
    """The labels with their places; those that would overlap as one, in the middle."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    groups: list[list[tuple[float, float, str]]] = []
    for x, y, text in sorted(labels):
        near = NEAR * (right - left), NEAR * (top - bottom)
        together = (g for g in groups if abs(g[-1][0] - x) <= near[0] and abs(g[-1][1] - y) <= near[1])
        group = next(together, None)
        if group is None:
            groups.append(group := [])
        group.append((x, y, text))
    return [(g[-1][0], (g[0][1] + g[-1][1]) / 2, ", ".join(text for _, _, text in g)) for g in groups]
