"""Progress of long work, on standard error."""

from __future__ import annotations

import logging
from typing import ClassVar

from tqdm.auto import tqdm

logger = logging.getLogger("kedit")


class Progress:
    """A bar that shows itself only for work worth watching.

    Nothing is drawn where standard error is not a terminal; the bar appears after ``delay`` seconds.

    Attributes:
        shown: whether this process draws bars at all; of several that share a job, one does.
    """

    shown: ClassVar[bool] = True

    def __init__(self, total: int | None, what: str, unit: str = "edit", *, delay: float = 1.0) -> None:
        disable = None if self.shown else True
        self._bar = tqdm(
            total=total, desc=what, unit=unit, disable=disable, delay=delay, leave=False, dynamic_ncols=True
        )

    def advance(self, steps: int = 1) -> None:
        """``steps`` more units are done."""
        self._bar.update(steps)

    def note(self, **values: object) -> None:
        """Show running values behind the bar."""
        self._bar.set_postfix({name: str(value) for name, value in values.items()})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
