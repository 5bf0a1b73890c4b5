"""Means and correlations with bootstrap intervals, for whole arrays of numbers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kedit.evaluation.statistics import RESAMPLES, SEED, Estimate, Floats, case_weights


def mean_map(values: Floats, resamples: int = RESAMPLES) -> Floats:
    """Mean over the first axis and its 95% bootstrap interval: [F, ...] to [3, ...] (mean, low, high).

    NaN stands for no value; a place without any value is NaN, and one without two has no interval (NaN).
    """
    flat = values.reshape(len(values), -1)
    there = ~np.isnan(flat)
    filled = np.where(there, flat, 0.0)
    counts = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / counts
        weights = case_weights(len(values), resamples)
        drawn = (weights @ filled) / (weights @ there)
    result = np.full((3, flat.shape[1]), np.nan)
    result[0] = mean
    some = counts >= 2
    if some.any():
        result[1:, some] = np.nanpercentile(drawn[:, some], [2.5, 97.5], axis=0)
    return result.reshape(3, *values.shape[1:])


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's r; NaN where one of them does not vary."""
    a, b = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else float("nan")


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation, ties by their mean rank."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[place], dtype=np.float64)


def correlation(
    measure: Callable[[Floats, Floats], float],
    x: Floats,
    y: Floats,
    groups: Sequence[Any],
    resamples: int = RESAMPLES,
) -> Estimate:
    """A correlation with the 95% bootstrap interval that comes from drawing whole groups (the probes of one edit).

    Args:
        measure: :func:`pearson` or :func:`spearman`.
        x: [N].
        y: [N].
        groups: what each of the N values belongs to.
        resamples: of the bootstrap.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    members: list[list[int]] = [[] for _ in names]
    for place, name in enumerate(groups):
        members[names[name]].append(place)
    value = measure(x, y)
    if len(members) < 2:
        return Estimate(value, None, None, len(x), len(members))
    rng = np.random.default_rng(SEED)
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        drawn.append(measure(x[chosen], y[chosen]))
    return Estimate.of(value, np.asarray(drawn), len(x), len(members))
