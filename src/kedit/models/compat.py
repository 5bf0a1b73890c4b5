"""What differs between the supported versions of transformers, in one place.

transformers 5.24 renamed ``past_key_values`` to ``cache``, as an argument of every model's ``forward`` and as a field of its
output. The name is read from the model's own signature, not from the version: a model that brings its own code
(``trust_remote_code``) may keep the old one.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_CACHE_NAMES = ("cache", "past_key_values")


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a model's ``forward``."""
    return frozenset(inspect.signature(model.forward).parameters)


def cache_name(model: nn.Module) -> str | None:
    """The argument of ``forward`` that takes stored keys and values; ``None`` where there is none."""
    known = forward_parameters(model)
    return next((name for name in _CACHE_NAMES if name in known), None)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of ``forward``."""
    return {cache_name(model) or _CACHE_NAMES[-1]: cache}


def cache_of(output: Any) -> Any:
    """The keys and values that a forward pass returned."""
    # In this order: where an output has the new field, reading the old one logs a warning.
    return output.cache if hasattr(output, "cache") else output.past_key_values
