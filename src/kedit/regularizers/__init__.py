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

REGULARIZERS: Registry[Any] = Registry("regularizer", {"sadr": "kedit.regularizers.sadr:SADR"})

Choice = str | Regularizer | Iterable[str | Regularizer] | None


def resolve(choice: Choice) -> list[Regularizer]:
    """Names and objects as a list of objects, with unique names."""
    if choice is None:
        return []
    items = [choice] if isinstance(choice, str | Regularizer) else list(choice)
    found: list[Regularizer] = []
    for item in items:
        made = REGULARIZERS[item]() if isinstance(item, str) else item
        if not isinstance(made, Regularizer):
            raise ConfigError(
                f"{item!r} is no regularizer: it needs a name and the methods needs(site) and penalty(now, before)."
            )
        if any(made.name == other.name for other in found):
            raise ConfigError(f"Two regularizers are called {made.name!r}. Give each one a name of its own.")
        found.append(made)
    return found
