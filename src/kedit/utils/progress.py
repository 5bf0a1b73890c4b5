"""Progress of long work, on standard error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

from tqdm.auto import tqdm

logger = logging.getLogger("kedit")

Watcher = Callable[[str, int, "int | None"], None]

_watcher: ContextVar[Watcher | None] = ContextVar("kedit_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, this thread tells ``watcher`` how far its work is: what is done, how many units of it, and of how many.

    An exception that the watcher raises ends the work there, as Ctrl-C would: an edit leaves every weight as it was.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(what: str, done: int, total: int | None) -> None:
    """Tell the watcher, if there is one, how far the work is."""
    if (watcher := _watcher.get()) is not None:
        watcher(what, done, total)


class Progress:
    """A bar that shows itself only for work worth watching.

    The bar appears after ``delay`` seconds. Where standard error is not a terminal, a line is logged every minute instead.

    Attributes:
        shown: whether this process draws bars at all; of several that share a job, one does.
        seconds_per_line: time between two logged lines.
    """

    shown: ClassVar[bool] = True
    seconds_per_line: ClassVar[float] = 60.0

    def __init__(self, total: int | None, what: str, unit: str = "edit", *, delay: float = 1.0) -> None:
        disable = None if self.shown else True
        self._bar = tqdm(
            total=total, desc=what, unit=unit, disable=disable, delay=delay, leave=False, dynamic_ncols=True
        )
        self._total, self._what, self._unit = total, what, unit
        self._done, self._start = 0, time.monotonic()
        self._line = self._start

    def advance(self, steps: int = 1) -> None:
        """``steps`` more units are done."""
        self._bar.update(steps)
        self._done += steps
        tell(self._what, self._done, self._total)
        if self._bar.disable and self.shown and time.monotonic() - self._line >= self.seconds_per_line:
            self._line = time.monotonic()
            self._log(self._line - self._start)

    def _log(self, seconds: float) -> None:
        numbers = f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"
        left = ""
        if self._total is not None and self._done:
            left = f", about {duration(seconds * max(0, self._total - self._done) / self._done)} left"
        logger.info("%s: %s %ss done%s.", self._what, numbers, self._unit, left)

    @classmethod
    @contextmanager
    def hidden(cls) -> Iterator[None]:
        """No bar is drawn and no line logged inside."""
        shown, cls.shown = cls.shown, False
        try:
            yield
        finally:
            cls.shown = shown

    def note(self, **values: object) -> None:
        """Show running values behind the bar."""
        self._bar.set_postfix({name: str(value) for name, value in values.items()})

    def __enter__(self) -> Progress:
        tell(self._what, self._done, self._total)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``12 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
