"""Terms that can be added to every value optimisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kedit.errors import ConfigError
from kedit.registry import Registry
from kedit.regularizers.base import Captured as Captured
from kedit.regularizers.base import Needs as Needs
from kedit.regularizers.base import Regularizer as Regularizer
from kedit.regularizers.base import Rows as Rows
from kedit.regularizers.base import blocks_from as blocks_from
from kedit.regularizers.keynorm import KeyNorm as KeyNorm

REGULARIZERS: Registry[Any] = Registry(
    "regularizer", {"sadr": "kedit.regularizers.sadr:SADR", "key_norm": "kedit.regularizers.keynorm:KeyNorm"}
)

RESERVED = frozenset({"step", "total", "nll", "kl", "weight_decay"})  # the log's own columns

Choice = str | Regularizer | Iterable[str | Regularizer] | None


def resolve(choice: Choice) -> list[Regularizer]:
    """Names and objects as a list of objects, with unique names.

    Raises:
        UnknownNameError: no regularizer has this name.
        ConfigError: an object is no regularizer, or its name is taken.
    """
    if choice is None:
        return []
    if isinstance(choice, str | type | Regularizer) or not isinstance(choice, Iterable):
        choice = [choice]
    found: list[Regularizer] = []
    for item in choice:
        made = REGULARIZERS[item]() if isinstance(item, str) else item
        if isinstance(made, type):
            raise ConfigError(f"{made.__name__} is a class. Pass an object of it: {made.__name__}(...).")
        if not isinstance(made, Regularizer):
            raise ConfigError(
                f"{item!r} is no regularizer: it needs a name and the methods needs(site) and penalty(now, before)."
            )
        if not isinstance(made.name, str) or not made.name or made.name in RESERVED:
            raise ConfigError(
                f"A regularizer cannot be called {made.name!r}: its name is its column in the log, beside "
                f"{', '.join(sorted(RESERVED))}."
            )
        if any(made.name == other.name for other in found):
            raise ConfigError(f"Two regularizers are called {made.name!r}. Give each one a name of its own.")
        found.append(made)
    return found
