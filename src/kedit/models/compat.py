"""Differences between the supported versions of transformers, in one place.

Differences are read from the model at hand, not from the version: a model that brings its own code
(``trust_remote_code``) may keep what transformers has changed.

- 5.24 renames ``past_key_values`` to ``cache``, as an argument of every ``forward`` and as a field of its output.
- 5.4 gives GPT-2's scaling to the attention function; before, eager attention reads its factors off the module.
- 5.1 looks attention functions up with ``get_interface``; before, by index where the name is not "eager".
- 5.3 knows experts without a gate; before, all have one.
- Older versions run SDPA without a model's softcap; newer ones refuse to.
- Older versions call GPT-NeoX's head ``embed_out``.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import nn

_CACHE_NAMES = ("cache", "past_key_values")
_LOOKUPS = ("ALL_ATTENTION_FUNCTIONS.get_interface(", "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]")


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


def head_of(model: nn.Module, path: str) -> nn.Module | None:
    """The language-model head at ``path``, or under the name that this version gives it; ``None`` where there is none."""
    with suppress(AttributeError):
        return model.get_submodule(path)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None


def has_gate(experts: nn.Module) -> bool:
    """Return whether experts multiply their up-projection with a gate."""
    return bool(getattr(experts, "has_gate", True))


def uses_interface(source: str) -> bool:
    """Return whether a model's code looks its attention function up by the name in its configuration."""
    return any(call in source for call in _LOOKUPS)


def attention_scaling(module: nn.Module, width: int, *, eager: bool) -> float:
    """The factor of the scores where a model gives its attention function none.

    Args:
        module: the attention module.
        width: of a head.
        eager: whether the function is the model's own eager one.
    """
    scaling = width**-0.5
    if eager and not getattr(module, "scale_attn_weights", True):
        scaling = 1.0
    if eager and getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scaling /= int(module.layer_idx) + 1  # type: ignore[arg-type]
    return float(scaling)


def attention_softcap(given: float | None, *, eager: bool) -> float | None:
    """The softcap that an attention function applies of the one it is given."""
    return given if eager else None


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a model with a language-model head of a configuration.

    A vision-language model is built whole where transformers has no causal language model of its type: given no image, it is one.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mappings = [kind._model_mapping for kind in (AutoModelForCausalLM, AutoModelForImageTextToText)]
    return (
        AutoModelForImageTextToText
        if [type(config) in known for known in mappings] == [False, True]
        else AutoModelForCausalLM
    )
