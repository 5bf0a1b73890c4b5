"""How long the rest of many evaluations takes."""

from __future__ import annotations

from collections.abc import Iterable

from kedit.utils.progress import duration


class TimeLeft:
    """An estimate from the seconds per case of the runs that are finished, in this start or an earlier one.

    Args:
        planned: per run, its kind (runs of one kind take equally long per case) and its number of cases.
    """

    def __init__(self, planned: Iterable[tuple[str, int]]) -> None:
        self.left: dict[str, int] = {}
        for kind, cases in planned:
            self.left[kind] = self.left.get(kind, 0) + cases
        self._seconds: dict[str, float] = {}
        self._cases: dict[str, int] = {}

    def finish(self, kind: str, cases: int, seconds: float, *, planned: bool = True) -> None:
        """A run is finished that took so many seconds; one that was not planned only tells how long others take."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
        self._cases[kind] = self._cases.get(kind, 0) + cases
        if planned:
            self.left[kind] = max(0, self.left.get(kind, 0) - cases)

    def seconds(self) -> float | None:
        """Seconds that are left; kinds of which no run is finished count as the mean of the others. ``None`` before the first."""
        if not self._cases:
            return None
        mean = sum(self._seconds.values()) / max(1, sum(self._cases.values()))
        rates = {kind: self._seconds[kind] / cases for kind, cases in self._cases.items() if cases}
        return sum(cases * rates.get(kind, mean) for kind, cases in self.left.items())

    def text(self) -> str:
        """``about 1 h 20 min left``."""
        seconds = self.seconds()
        if seconds is None:
            return f"{sum(self.left.values())} edits to do, the time is known after the first run"
        return f"about {duration(seconds)} left"
