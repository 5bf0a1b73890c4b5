"""The choice among candidates: which edits hold, and which of those harm least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np

from kedit.bench.choice import LEAST_ES, LOST_PS
from kedit.evaluation import METRICS, EvalReport
from kedit.evaluation.statistics import Estimate, Floats, case_weights

METRIC_NAMES = ("es", "ps", "ns", "dns", "rs")
KEPT = ("ns", "dns", "rs")  # what must stay
TIE = 1.0

RULE = (
    "the best mean of NS, DNS and RS (of those that the cases have) among the candidates with ES of at least "
    f"{LEAST_ES:g}, or the highest that is reached, and PS within {LOST_PS:g} points of the best; of those "
    "within one point of it, the first in order: the present value, then the nearest"
)

Key = TypeVar("Key")


def measured(report: EvalReport, state: Literal["before", "after"] = "after") -> dict[str, float]:
    """The metrics of a run that have values, in per cent."""
    tallies = {name: METRICS[name].tallies(report.records, state)[0] for name in METRIC_NAMES}
    return {name: float(tally.sums.sum() / tally.counts.sum()) for name, tally in tallies.items() if tally.n}


def margin(report: EvalReport) -> float:
    """Mean of those of NM, DNM, RM (p(right) − p(wrong)) that there are; tells apart what few prompts do not. NaN without any."""
    tallies = [METRICS[f"{name[:-1]}m"].tallies(report.records, "after")[0] for name in KEPT]
    parts = [float(tally.sums.sum() / tally.counts.sum()) for tally in tallies if tally.n]
    return sum(parts) / len(parts) if parts else math.nan


def kept(figures: Mapping[str, float]) -> float:
    """The mean of NS, DNS and RS, of those that are there; NaN without any."""
    parts = [figures[name] for name in KEPT if name in figures]
    return sum(parts) / len(parts) if parts else math.nan


def ranked(reports: Mapping[Key, EvalReport], reference: EvalReport | None = None, *, slack: bool = False) -> list[Key]:
    """The candidates, the best first (:data:`RULE`); those that do not qualify last, by ES, then PS.

    Args:
        reports: by candidate, in the order in which ties are decided; all on the same cases.
        reference: a run whose ES and PS count among the best, and which cannot be chosen.
        slack: for a first look at few cases: allow one prompt of ES and of PS more, and order equals by :func:`margin`.
    """
    figures = {key: measured(report) for key, report in reports.items()}
    every = [*figures.values(), *([] if reference is None else [measured(reference)])]
    allowed = {"es": 0.0, "ps": LOST_PS}
    if slack:
        some = next(iter(reports.values()))
        for name in allowed:
            number = sum(tally.n for tally in METRICS[name].tallies(some.records, "after"))
            allowed[name] += 100.0 / number if number else 0.0
    least_es = min(LEAST_ES, max(each["es"] for each in every)) - allowed["es"]
    said = [each for each in every if each["es"] >= least_es]
    best_ps = max((each["ps"] for each in said if "ps" in each), default=0.0)

    def qualifies(each: Mapping[str, float]) -> bool:
        return each["es"] >= least_es and each.get("ps", best_ps) >= best_ps - allowed["ps"]

    fit = [key for key in figures if qualifies(figures[key])]
    best = max((kept(figures[key]) for key in fit), default=0.0)
    first = next((key for key in fit if kept(figures[key]) >= best - TIE), None)
    finer = {key: margin(reports[key]) if slack else 0.0 for key in fit}
    order = sorted(fit, key=lambda key: (key is not first, -kept(figures[key]), -finer[key]))
    rest = [key for key in figures if key not in fit]
    return order + sorted(rest, key=lambda key: (-figures[key]["es"], -figures[key].get("ps", 0.0)))


def difference(now: EvalReport, then: EvalReport) -> Estimate | None:
    """The mean of NS, DNS and RS of one run minus that of another on the same cases, with its 95% bootstrap interval by case."""
    records = [report.records for report in (now, then)]
    weights = np.concatenate([np.ones((1, len(records[0]))), case_weights(len(records[0]))])
    parts: list[Floats] = []
    number, cases = 0, 0
    for name in KEPT:
        [one], [other] = (METRICS[name].tallies(each, "after") for each in records)
        if one.n:
            parts.append(one.means(weights) - other.means(weights))
            number, cases = number + one.n, max(cases, one.cases)
    if not parts:
        return None
    drawn = np.nanmean(np.stack(parts), axis=0)
    return Estimate.of(float(drawn[0]), drawn[1:], number, cases)
