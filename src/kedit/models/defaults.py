"""Defaults of single models, in place of kedit's general ones: corpus, presets, ridge, texts of the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kedit.utils.registry import Registry


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of one editor for one model.

    Attributes:
        values: fields of the editor's ``Config``.
        regularized: by regularizer name: changed ``Config`` fields, and fields of the regularizer under ``"self"``.
        source: the file that it was read from, or else where it comes from.
    """

    values: Mapping[str, Any]
    regularized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = field(default="kedit's presets for this type of model", compare=False)


@dataclass(frozen=True)
class ModelDefaults:
    """Defaults of one model, in place of the general ones.

    Attributes:
        corpus_name: name of the corpus for second moments.
        corpus_key: what the corpus holds, for caches.
        texts: makes an iterator over the corpus, from the beginning.
        guard_texts: how many texts of the corpus a guard reads for KL and perplexity where no texts are given.
        ridge: relative ridge of second moments that are estimated.
        presets: hyper-parameters by editor.
    """

    corpus_name: str
    corpus_key: str
    texts: Callable[[], Iterator[str]]
    guard_texts: int
    ridge: float
    presets: Mapping[str, Preset]


MODEL_DEFAULTS: Registry[Callable[[], ModelDefaults]] = Registry(
    "model_default", {"kedit_testbed": "kedit.embedded.defaults:defaults"}
)
"""By the field of a model's configuration that marks it (``config.kedit_testbed = True``)."""


def model_defaults(model: nn.Module) -> ModelDefaults | None:
    """The defaults that are registered for a model, or ``None``."""
    config: Any = model.config
    for mark in MODEL_DEFAULTS:
        if getattr(config, mark, False):
            return MODEL_DEFAULTS[mark]()
    return None
