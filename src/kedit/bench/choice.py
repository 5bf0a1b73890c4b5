"""Choosing γ on development cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kedit.evaluation.report import EvalReport

FIVE = ("es", "ps", "ns", "rs", "dns")
LEAST_ES, LOST_PS = 99.0, 3.0  # points: what a γ must keep of efficacy, and may cost of paraphrases
MARKS = {
    "†": "no γ that was tried keeps ES and PS; the smallest is shown",
    "‡": "the best γ is the largest that was tried",
}


@dataclass(frozen=True)
class GammaChoice:
    """A γ and how it was found.

    Attributes:
        gamma: γ.
        mark: ``"†"`` where none qualified, ``"‡"`` where the largest of all was the best, else ``""``; see :data:`MARKS`.
        tried: every γ that was tried, with its balance, and whether it qualified.
    """

    gamma: float
    mark: str
    tried: dict[float, tuple[float, bool]]


def value(report: EvalReport, name: str) -> float:
    """A metric after the edits; NaN where no case has one."""
    states = report.estimates.get(name)
    estimate = None if states is None else states["after"]
    return float("nan") if estimate is None else estimate.value


def balance(report: EvalReport) -> float:
    """The Score (harmonic mean of the five successes), or the mean of those of its parts that there are."""
    return value(report, "score") if "score" in report.estimates else mean_of_parts(report)


def mean_of_parts(report: EvalReport) -> float:
    """The mean of those of the five successes that there are; it decides between runs of equal Score, which is 0 if one part is."""
    parts = [value(report, name) for name in FIVE if name in report.estimates]
    return sum(parts) / len(parts)


def qualifies(report: EvalReport, plain: EvalReport) -> bool:
    """Whether a run says its targets as the plain editor does.

    ES must be at least 99, or the plain editor's if that is less; PS, if it is measured, at most 3 points lower.
    """
    if value(report, "es") < min(LEAST_ES, value(plain, "es")):
        return False
    return "ps" not in report.estimates or value(report, "ps") >= value(plain, "ps") - LOST_PS


def choose_gamma(
    run: Callable[[float], EvalReport],
    plain: EvalReport,
    gammas: Sequence[float],
    larger: Sequence[float] = (),
    smaller: Sequence[float] = (),
) -> GammaChoice:
    """The γ with the best balance among those that qualify; of equal ones the smallest, and the smallest of all where none does.

    Balances are equal where the mean of the five successes is too: the Score is 0 wherever one of them is.

    Args:
        run: evaluates a γ on the development cases.
        plain: the editor without the regularizer on the same cases.
        gammas: tried first.
        larger: tried one by one while the largest so far is the best.
        smaller: tried one by one while the smallest so far is the best and better than no regularizer, or none qualifies.
    """
    tried: dict[float, tuple[float, bool]] = {}
    means: dict[float, float] = {}

    def attempt(gamma: float) -> None:
        report = run(gamma)
        tried[gamma] = (balance(report), qualifies(report, plain))
        means[gamma] = mean_of_parts(report)

    def best() -> float | None:
        good = [gamma for gamma, (_, enough) in tried.items() if enough]
        return max(good, key=lambda gamma: (tried[gamma][0], means[gamma], -gamma), default=None)

    for gamma in gammas:
        attempt(gamma)
    for gamma in larger:
        if best() != max(tried):
            break
        attempt(gamma)
    for gamma in smaller:
        chosen = best()
        if chosen is not None and (
            chosen != min(tried) or (tried[chosen][0], means[chosen]) <= (balance(plain), mean_of_parts(plain))
        ):
            break
        attempt(gamma)
    chosen = best()
    if chosen is None:
        return GammaChoice(min(tried), "†", tried)
    return GammaChoice(chosen, "‡" if chosen == max([*gammas, *larger]) else "", tried)
