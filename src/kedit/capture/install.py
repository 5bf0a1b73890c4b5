"""Switching a model to kedit's attention and back: which modules, which configurations, which route."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from kedit.capture import interface, legacy_attention
from kedit.capture.modules import attention_modules, decoder_of
from kedit.capture.open_contexts import LOCK
from kedit.models.compat import uses_interface


@dataclass
class Installation:
    """Counts how often a model is switched, and holds what puts it back."""

    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)


_INSTALLED: WeakKeyDictionary[nn.Module, Installation] = WeakKeyDictionary()


@cache
def follows_interface(file: str) -> bool:
    """Return whether attention modules of a Python module can be switched by name, and nothing else there depends on the name."""
    home = sys.modules.get(file)
    try:
        source = inspect.getsource(home) if home else ""
    except (OSError, TypeError):
        source = ""
    branches = re.search(r"_attn_implementation\s*(==|!=|in|not in)\b.*sdpa", source)
    return uses_interface(source) and not branches


@contextmanager
def use_capture_attention(model: nn.Module) -> Iterator[None]:
    """Switch a model to the attention that can be captured; put everything back afterwards.

    Inside, the model computes what it computed before, by the same functions. Contexts may be nested and opened from
    several threads; the last to leave restores.

    Raises:
        CaptureError: the model's attention cannot be captured.
    """
    with LOCK:
        installation = _INSTALLED.setdefault(model, Installation())
        if not installation.users:
            try:
                _install(model, installation)
            except BaseException:
                _undo(installation)
                raise
        installation.users += 1
    try:
        yield
    finally:
        with LOCK:
            installation.users -= 1
            if not installation.users:
                _undo(installation)


def _install(model: nn.Module, installation: Installation) -> None:
    modules = attention_modules(model)
    if follows_interface(type(next(iter(modules.values()))).__module__):
        interface.switch(_configs(model, modules), installation.undo)
    else:
        for module in modules.values():
            legacy_attention.wrap(module, installation.undo)


def _undo(installation: Installation) -> None:
    while installation.undo:
        installation.undo.pop()()


def _configs(model: nn.Module, modules: dict[int, nn.Module]) -> list[Any]:
    """Every configuration object that names the decoder's attention."""
    owners: list[Any] = [decoder_of(model), *modules.values()]
    configs = [owner.config for owner in owners if hasattr(owner, "config")]
    configs += [config.get_text_config(decoder=True) for config in configs]
    return list({id(config): config for config in configs}.values())
