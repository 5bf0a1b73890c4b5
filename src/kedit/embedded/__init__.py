"""The embedded model: a small GPT-2 that knows an invented world, and the world.

It recalls facts through the subject's last token as large models do, so it can be edited, and it ships with the package,
so that everything runs on a machine without a model hub. ``benchmarks/embedded_model/train.py`` made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.embedded.world import World

ASSETS = Path(__file__).parent / "assets"
NAME = "kedit-embedded"


def load(*, dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model (float32 unless asked otherwise; the weights are stored in bfloat16) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=dtype or torch.float32)
    model.config.kedit_testbed = True  # marks the defaults of kedit.embedded.defaults; a part of saved fingerprints
    model.config._name_or_path = NAME
    return model.eval(), AutoTokenizer.from_pretrained(ASSETS)


def load_world() -> World:
    """The invented world that the embedded model knows."""
    from kedit.embedded.world import World

    return World.load(ASSETS / "world.json")
