"""Checks of the numbers and choices that users pass."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypeGuard

from kedit.errors import ConfigError


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an ``int``; ``True`` and ``1.0`` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite ``int`` or ``float``; ``True`` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Return ``value``, or raise :class:`ConfigError` unless it is a whole number from ``least`` to ``most``."""
    if is_whole(value) and (least is None or value >= least) and (most is None or value <= most):
        return value
    bound = "" if least is None else f" of at least {least}"
    bound += "" if most is None else f" and at most {most}"
    raise ConfigError(f"{name} must be a whole number{bound}, not {value!r}.")


def check_number(
    name: str, value: object, least: float = 0.0, *, above: float | None = None, below: float | None = None
) -> float:
    """Return ``value``, or raise :class:`ConfigError` unless it is finite and within its bounds; ``above`` replaces ``least``."""
    if is_number(value) and (value >= least if above is None else value > above) and (below is None or value < below):
        return value
    bound = f"of at least {least:g}" if above is None else f"above {above:g}"
    bound += "" if below is None else f" and below {below:g}"
    raise ConfigError(f"{name} must be a finite number {bound}, not {value!r}.")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ConfigError(f"{name} is {', '.join(others)} or {last}, not {value!r}.")
