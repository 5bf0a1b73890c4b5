"""Options of the analysis functions, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from kedit.errors import ConfigError
from kedit.evaluation.cases import Kind


def as_kind(value: Any) -> Kind:
    """A kind of probe by itself or by its name.

    Raises:
        ConfigError: there is no such kind.
    """
    try:
        return Kind(value)
    except ValueError as error:
        raise ConfigError(f"There is no kind of probe {value!r}. The kinds are {', '.join(map(str, Kind))}.") from error


def as_kinds(values: Any) -> tuple[Kind, ...]:
    """Kinds of probes; raises :class:`ConfigError` where they are no list of them."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"kinds is a list of kinds of probes, like ({str(Kind.RELATION)!r},), not {values!r}.")
    found = tuple(as_kind(value) for value in values)
    if not found:
        raise ConfigError(f"kinds is empty, so no probe would be asked. Give some of {', '.join(map(str, Kind))}.")
    return found


def check_whole(name: str, value: Any, low: int) -> None:
    """Raise :class:`ConfigError` where an option is no whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is a whole number of at least {low}, not {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` where an option is no finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigError(f"{name} is a finite number above 0, not {value!r}.")
