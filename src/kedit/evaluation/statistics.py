"""Estimates with their uncertainty: pooled means, harmonic means, paired differences, bootstrap intervals by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """An estimate.

    Attributes:
        value: the estimate on all cases.
        low: lower end of its 95% bootstrap interval by case; ``None`` with fewer than two cases.
        high: upper end.
        n: how many values it pools (prompts, for a per-prompt metric).
        cases: how many cases they come from.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    cases: int

    @classmethod
    def of(cls, value: float, drawn: Floats, n: int, cases: int) -> Estimate:
        """An estimate with the interval of its values in the resamples; NaN among these stands for none."""
        if cases < 2 or np.isnan(drawn).all():
            return cls(value, None, None, n, cases)
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        return cls(value, float(low), float(high), n, cases)

    def text(self, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
        """``98.50 [97.00, 100.00]``, times ``scale``."""
        value = f"{scale * self.value:.{digits}f}{unit}"
        if self.low is None or self.high is None:
            return value
        return f"{value} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Tally:
    """A metric's values, case by case: their sums [C] and how many they are [C]; zero where a case has none."""

    sums: Floats
    counts: Floats

    @classmethod
    def of(cls, values: Sequence[Sequence[float]], *, by_case: bool = False) -> Tally:
        """Values per case; ``by_case`` takes each case's mean as its one value."""
        sums = np.array([sum(per_case) for per_case in values], dtype=np.float64)
        counts = np.array([len(per_case) for per_case in values], dtype=np.float64)
        if by_case:
            sums = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
            counts = (counts > 0).astype(np.float64)
        return cls(sums, counts)

    @property
    def n(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def cases(self) -> int:
        """Number of cases that have any."""
        return int((self.counts > 0).sum())

    def means(self, weights: Floats) -> Floats:
        """The pooled mean under each row of case weights [B, C]: [B]; NaN where a row holds no value."""
        counts = weights @ self.counts
        empty = np.full_like(counts, np.nan)
        return np.divide(weights @ self.sums, counts, out=empty, where=counts > 0)


def case_weights(cases: int, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Draw how often each case counts in each resample, [B, C]; the same for every metric of a run, so pairs stay pairs."""
    drawn = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    return drawn.astype(np.float64)


def harmonic_means(values: Floats) -> Floats:
    """Harmonic means over the first axis, [K, B] to [B]."""
    positive = (values > 0).all(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = len(values) / (1.0 / values).sum(0)
    return np.where(np.isnan(values).any(0), np.nan, np.where(positive, means, 0.0))


def estimate(parts: Sequence[Tally], weights: Floats) -> Estimate | None:
    """One tally's mean, or the harmonic mean of several, with its interval; ``None`` where a part has no value."""
    return _estimate([parts], weights)


def difference(now: Sequence[Tally], then: Sequence[Tally], weights: Floats) -> Estimate | None:
    """``now - then`` on the same cases, with the interval of the paired difference."""
    return _estimate([now, then], weights)


def _estimate(sides: Sequence[Sequence[Tally]], weights: Floats) -> Estimate | None:
    if any(part.n == 0 for parts in sides for part in parts):
        return None
    everyone = np.ones((1, weights.shape[1]))
    value = float(_combine(sides, everyone)[0])
    first = sides[0]
    n, cases = min(part.n for part in first), min(part.cases for part in first)
    return Estimate.of(value, _combine(sides, weights), n, cases)


def _combine(sides: Sequence[Sequence[Tally]], weights: Floats) -> Floats:
    combined = []
    for parts in sides:
        means = np.stack([part.means(weights) for part in parts])
        combined.append(means[0] if len(parts) == 1 else harmonic_means(means))
    return combined[0] if len(combined) == 1 else combined[0] - combined[1]
