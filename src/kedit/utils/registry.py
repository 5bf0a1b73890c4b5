"""Names for things that plug in: editors, regularizers, metrics."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from kedit.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def import_target(target: str) -> Any:
    """Import what ``"module:attribute"`` names; for what is needed only when it is asked for."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def import_file(path: str, attribute: str, kind: str) -> Any:
    """Run a Python file and give what it calls ``attribute``: a class of the user's own.

    Raises:
        ConfigError: there is no such file, it fails, or it defines nothing of this name; ``kind`` is its noun.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"There is no file {path!r} that could define a {kind}. Check the path before the colon.")
    name = f"kedit_file_{file.stem}"  # no installed module is called so
    spec = importlib.util.spec_from_file_location(name, file)
    if (held := sys.modules.get(name)) is not None and held.__file__ == str(file):
        return _attribute(held, path, attribute)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is a program, which may fail as it likes
        del sys.modules[name]
        raise ConfigError(f"{path} fails: {type(error).__name__}: {error}. Repair it.") from error
    return _attribute(module, path, attribute)


def _attribute(module: ModuleType, path: str, attribute: str) -> Any:
    if not attribute or not hasattr(module, attribute):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{path} defines no {attribute or 'class whose name stands after the colon'}. Name one of its classes: "
            f"{', '.join(classes)}."
        )
    return getattr(module, attribute)


class Registry(Generic[T]):
    """A mapping from a name to an object that is imported only when asked for.

    Outsiders add theirs with :meth:`register` or with an entry point in the group ``kedit.<kind>s``
    (``[project.entry-points."kedit.regularizers"]``), so ``regularizer="mine"`` works without importing it first.
    A name of kedit's own is never taken over by an entry point; one that two packages offer is refused when asked for.
    """

    def __init__(self, kind: str, targets: dict[str, str] | None = None) -> None:
        """Make a registry of ``kind`` (a noun, for messages) from ``name -> "module:attribute"``."""
        self.kind = kind
        self._targets: dict[str, str] = dict(targets or {})
        self._objects: dict[str, T] = {}

    def register(self, name: str, target: T) -> T:
        """Add ``target`` under ``name`` (case is ignored); a name that is taken raises ``ValueError``."""
        key = name.lower()
        if key in self.names():
            raise ValueError(f"The {self.kind} name {name!r} is taken. Choose another name.")
        self._objects[key] = target
        return target

    def names(self) -> list[str]:
        """All known names, sorted, those of entry points included."""
        return sorted({*self._targets, *self._objects, *self._entry_points()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self.names()

    def __getitem__(self, name: str) -> T:
        """The object called ``name``; raises :class:`UnknownNameError` with the nearest names."""
        key = str(name).lower()
        if key not in self._objects:
            self._objects[key] = self._resolve(name, key)
        return self._objects[key]

    def _resolve(self, name: str, key: str) -> T:
        if key in self._targets:
            return cast(T, import_target(self._targets[key]))
        outside = self._entry_points().get(key, [])
        if len(outside) > 1:
            raise UnknownNameError(
                f"The {self.kind} name {name!r} is offered by {len(outside)} installed packages "
                f"({', '.join(point.value for point in outside)}). Import the one that is meant and pass its object."
            )
        if outside:
            return cast(T, outside[0].load())
        near = difflib.get_close_matches(key, self.names(), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(self.names())}."
        raise UnknownNameError(f"There is no {self.kind} called {name!r}. {hint}")

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        by_name: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=f"kedit.{self.kind}s"):
            points = by_name.setdefault(point.name.lower(), [])
            if all(point.value != other.value for other in points):
                points.append(point)
        return by_name
