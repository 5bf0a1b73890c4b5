"""Getting a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name: str | Path | None = None, *, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to be edited.

    Args:
        name: a name on the Hugging Face hub or a folder; ``None`` is the model that ships with kedit.
        dtype: of the weights; ``None``: as stored, and float32 for the embedded model.
        options: passed to ``AutoModelForCausalLM.from_pretrained`` (``device_map="auto"``, ``revision=...``).

    Raises:
        ArchitectureError: nothing can be loaded from there as a causal language model.
    """
    if name is None:
        from kedit import testbed

        return testbed.load(dtype=dtype)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype or "auto", **options)
        tokenizer = AutoTokenizer.from_pretrained(str(name), use_fast=True)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ArchitectureError(
            f"Cannot load a causal language model and tokenizer from {str(name)!r}: {error} "
            "Give a folder written by save_pretrained, or a name on the hub."
        ) from error
    model.eval()
    return model, tokenizer
