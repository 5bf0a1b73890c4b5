"""Kinds of probes by name."""

from __future__ import annotations

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
    kinds = tuple(as_kind(value) for value in values)
    if not kinds:
        raise ConfigError(f"kinds is empty, so no probe would be asked. Give some of {', '.join(map(str, Kind))}.")
    return kinds
