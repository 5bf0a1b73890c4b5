"""Switching a model to kedit's attention and back: which modules, which configurations, which route."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from kedit.capture import open_contexts
from kedit.errors import ArchitectureError, CaptureError
from kedit.models.compat import uses_interface
from kedit.utils.validation import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Installation:
    """How often a model is switched, and what puts it back."""

    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)


_INSTALLED: WeakKeyDictionary[nn.Module, Installation] = WeakKeyDictionary()


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a model: without vision towers and the like."""
    inner: Any = model
    for step in ("get_base_model", "get_decoder"):  # the first is PEFT's
        if hasattr(inner, step):
            inner = getattr(inner, step)()
    return inner if isinstance(inner, nn.Module) else model


def layer_index(module: nn.Module) -> int | None:
    """Number of the block an attention module belongs to, as transformers stores it."""
    for name in ("layer_idx", "layer_id"):
        value = getattr(module, name, None)
        if is_whole(value):
            return value
    return None


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of every block that has one, by block.

    Models of transformers number theirs; of others, the modules are those that :class:`kedit.models.ModelArch` knows or finds.

    Raises:
        CaptureError: none was found.
    """
    found: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():  # parents come before children: the innermost stays
        layer = layer_index(module)
        if layer is None or "Attention" not in type(module).__name__ or getattr(module, "is_cross_attention", False):
            continue
        if layer in found and module not in set(found[layer].modules()):
            raise CaptureError(
                f"Block {layer} of {type(model).__name__} has two attention modules "
                f"({type(found[layer]).__name__}, {type(module).__name__}); kedit cannot tell which to capture."
            )
        found[layer] = module
    found = found or _by_structure(model)
    if not found:
        raise CaptureError(f"{type(model).__name__} has no attention module that kedit can find.")
    return dict(sorted(found.items()))


def _by_structure(model: nn.Module) -> dict[int, nn.Module]:
    """The attention of every block, where the model's structure is understood and its attention is a module of its own."""
    from kedit.models import ModelArch

    try:
        arch = ModelArch(model)  # type: ignore[arg-type]
    except ArchitectureError:
        return {}
    if arch.spec.attention == arch.spec.attention_out:
        return {}
    return {layer: arch.attention(layer) for layer in range(arch.num_layers)}


@cache
def follows_interface(file: str) -> bool:
    """Whether attention modules of a Python module can be switched by name, and nothing else there depends on the name."""
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
    with open_contexts.LOCK:
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
        with open_contexts.LOCK:
            installation.users -= 1
            if not installation.users:
                _undo(installation)


def _install(model: nn.Module, installation: Installation) -> None:
    modules = attention_modules(model)
    if follows_interface(type(next(iter(modules.values()))).__module__):
        from kedit.capture.interface import switch

        switch(_configs(model, modules), installation.undo)
    else:
        from kedit.capture.legacy_attention import wrap

        for module in modules.values():
            wrap(module, installation.undo)


def _undo(installation: Installation) -> None:
    while installation.undo:
        installation.undo.pop()()


def _configs(model: nn.Module, modules: dict[int, nn.Module]) -> list[Any]:
    """Every configuration object that names the decoder's attention."""
    owners: list[Any] = [decoder_of(model), *modules.values()]
    configs = [owner.config for owner in owners if hasattr(owner, "config")]
    configs += [config.get_text_config(decoder=True) for config in configs]
    return list({id(config): config for config in configs}.values())
