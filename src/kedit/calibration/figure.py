"""The figure of a calibration: what its candidates say of the target, and what they keep of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedit.calibration.choice import kept
from kedit.calibration.stage import Stage
from kedit.report.figures import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"tried on the first cases": "#bbbbbb", "tried on all": "#4477aa", "chosen": "#ee6677"}
WIDTH, HEIGHT = 5.2, 4.9  # inches per stage


@styled
def tradeoff(stages: Sequence[Stage]) -> Figure:
    """A panel per stage: PS across, the mean of NS, DNS and RS up; candidates at one place share a label."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(WIDTH * len(stages), HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    grey, blue, red = KINDS.values()
    for axis, stage in zip(panels, stages, strict=True):
        most = max(row.cases for row in stage.rows)
        labels: dict[tuple[float, float], list[str]] = {}
        for number, row in enumerate(stage.rows):
            place = row.metrics.get("ps", row.metrics["es"]), kept(row.metrics)
            chosen = number == stage.best
            colour = red if chosen else blue if row.cases == most else grey
            axis.plot(*place, marker="D" if chosen else "o", color=colour, linestyle="none", zorder=2 + chosen)
            short = row.label.split(" ", 1)[-1] if row.value is not None else row.label
            labels.setdefault((round(place[0], 1), round(place[1], 1)), []).append(short)
        for number, (place, names) in enumerate(labels.items()):
            side = (6, 6) if number % 2 else (6, -14)
            axis.annotate(", ".join(names), place, side, textcoords="offset points", fontsize=10, color="#444444")
        axis.set_title(stage.name)
        axis.set_xlabel("PS (%)")
        axis.margins(0.2)
        axis.grid(color="#dddddd")
    panels[0].set_ylabel("mean of NS, DNS, RS (%)")
    handles = [Line2D([], [], marker="o", color=colour, linestyle="none", label=name) for name, colour in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
