"""Regularizers: terms that can be added to every value optimisation."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from kedit.errors import ConfigError
from kedit.regularizers.base import Activations as Activations
from kedit.regularizers.base import ForwardRecord as ForwardRecord
from kedit.regularizers.base import Needs as Needs
from kedit.regularizers.base import Regularizer as Regularizer
from kedit.regularizers.base import blocks_from as blocks_from
from kedit.regularizers.key_norm import KeyNorm as KeyNorm
from kedit.regularizers.neighbours import Neighbours as Neighbours
from kedit.regularizers.relation_keys import RelationKeys as RelationKeys
from kedit.regularizers.relations import Relations as Relations
from kedit.utils.registry import Registry, import_file

REGULARIZERS: Registry[Any] = Registry(
    "regularizer",
    {
        "sadr": "kedit.regularizers.sadr:SADR",
        "key_norm": "kedit.regularizers.key_norm:KeyNorm",
        "neighbours": "kedit.regularizers.neighbours:Neighbours",
        "relation_keys": "kedit.regularizers.relation_keys:RelationKeys",
        "relations": "kedit.regularizers.relations:Relations",
    },
)

RESERVED = frozenset({"step", "total", "nll", "kl", "weight_decay", "weight", "written"})  # the log's own columns

Choice = str | Regularizer | Iterable[str | Regularizer] | None


def takes_gamma(name: str) -> bool:
    """Return whether the regularizer called ``name`` can be made with a γ; raises ``UnknownNameError`` where there is none."""
    return "gamma" in _parameters(regularizer_class(name))


def regularizer_class(name: str) -> Any:
    """What makes the regularizer called ``name``: registered under it, or, of ``"file.py:Class"``, defined in that file.

    Raises:
        UnknownNameError: no regularizer has this name.
        ConfigError: the file fails, or does not define the class.
    """
    path, _, attribute = name.rpartition(":")
    return import_file(path, attribute, "regularizer") if path.endswith(".py") else REGULARIZERS[name]


def make(name: str, gamma: float | None = None, **fields: Any) -> Any:
    """The regularizer called ``name``, all its fields at their defaults but γ and others that are given.

    Raises:
        UnknownNameError: no regularizer has this name.
        ConfigError: it cannot be made so.
    """
    kind = regularizer_class(name)
    if not callable(kind):
        raise ConfigError(
            f"The regularizer {name!r} is registered as an object of {type(kind).__name__}. Register the class, or a "
            "function that makes such an object."
        )
    given = fields if gamma is None else {"gamma": gamma, **fields}
    if unknown := sorted(given.keys() - _parameters(kind).keys()):
        raise ConfigError(
            f"The regularizer {name!r} has no field {', '.join(map(repr, unknown))}. "
            f"It has {', '.join(_parameters(kind)) or 'none'}."
        )
    needed = [key for key, one in _parameters(kind).items() if one.default is one.empty and key not in given]
    if needed:
        called = f"{getattr(kind, '__name__', name)}({', '.join(f'{key}=...' for key in needed)})"
        option = ", or --gamma on the command line" if needed == ["gamma"] else ""
        raise ConfigError(f"The name {name!r} does not say what {called} shall be. Pass such an object{option}.")
    return kind(**given)


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a class or function that can be given by name, where Python can tell."""
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return {}
    return {key: one for key, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


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
    regularizers: list[Regularizer] = []
    for item in choice:
        made = make(item) if isinstance(item, str) else item
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
        if any(made.name == other.name for other in regularizers):
            raise ConfigError(f"Two regularizers are called {made.name!r}. Give each one a name of its own.")
        regularizers.append(made)
    return regularizers


def describe(regularizer: Regularizer) -> dict[str, Any]:
    """A regularizer as JSON: its name, class and fields."""
    fields: dict[str, Any] = vars(regularizer) if dataclasses.is_dataclass(regularizer) else {}
    plain = {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in fields.items()}
    kind = type(regularizer)
    return {"name": regularizer.name, "class": f"{kind.__module__}.{kind.__qualname__}", **plain}


def from_description(description: Mapping[str, Any]) -> Regularizer:
    """Make a registered regularizer again from what :func:`describe` gave, as it stands in a patch's provenance.

    Raises:
        UnknownNameError: no regularizer has this name.
        ConfigError: the one of this name is another class, or does not take these fields.
    """
    kind = REGULARIZERS[str(description.get("name"))]
    place = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
    if place != description.get("class"):
        raise ConfigError(
            f"The regularizer {description.get('name')!r} is {place} here; the description is of {description.get('class')}."
        )
    fields = {key: value for key, value in description.items() if key in _parameters(kind)}
    for key, value in fields.items():
        if isinstance(value, str) and value.startswith("("):  # a tuple
            fields[key] = ast.literal_eval(value)
    made: Regularizer = kind(**fields)
    return made
