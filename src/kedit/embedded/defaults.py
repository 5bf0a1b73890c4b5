"""Defaults of the embedded model: its corpus, presets, ridge and the texts of the guard."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kedit.embedded import load_world
from kedit.keys.corpus import Corpus
from kedit.models.defaults import ModelDefaults, Preset

NUM_DOCUMENTS = 12_000
NUM_EMBEDDED_TEXTS = 40

# All chosen on the development half of its world: a step
# size at which the edits are as firm as in large models, where plain ROME loses what SADR is there to keep (at half of it
# ROME loses a third as much DNS), and the smallest γ that recovers nearly all of it.
_VALUE = {"steps": 40, "lr": 1.0, "weight_decay": 0.1, "clamp": 4.0}
_NULL_SPACE = {"l2": 0.1, "threshold": 0.1, "threshold_rule": "mean", "l2_relative": False}
_SADR: dict[str, Mapping[str, Any]] = {"sadr": {"self": {"gamma": 1.0}}}
PRESETS: dict[str, Preset] = {
    "rome": Preset({"layers": (0,), **_VALUE}, _SADR),
    "rrome": Preset({"layers": (0,), **_VALUE}, _SADR),
    "emmet": Preset({"layers": (0,), **_VALUE}, _SADR),
    "memit": Preset({"layers": (0, 1), "moment_weight": 1.0, **_VALUE}, _SADR),
    "pmet": Preset({"layers": (0, 1), "moment_weight": 1.0, **_VALUE, "steps": 60, "clamp": 16.0}, _SADR),
    "alphaedit": Preset({"layers": (0, 1), **_NULL_SPACE, **_VALUE}, _SADR),
    "ft": Preset({"layers": (0,), "steps": 40, "lr": 3e-3, "clamp": 7e-3}),
}


# Its keys are few and lie in few directions; a firmer ridge keeps C⁻¹ from blowing up the rest.
RIDGE = 1e-2


def corpus() -> Corpus:
    """Texts like those the embedded model was trained on: its default corpus for second moments."""
    world = load_world()
    return Corpus("the invented world", f"world:{world.seed}:1", lambda: world.documents(1, NUM_DOCUMENTS))


@functools.cache
def defaults() -> ModelDefaults:
    """Defaults for the embedded model where nothing else is given."""
    texts = corpus()
    return ModelDefaults(texts.name, texts.key, texts.texts, NUM_EMBEDDED_TEXTS, RIDGE, PRESETS)
