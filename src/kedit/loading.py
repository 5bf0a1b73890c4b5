"""Getting a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_WHERE = frozenset(
    {"revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "trust_remote_code"}
)
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load(
    name: str | Path | None = None, *, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to be edited.

    Args:
        name: a name on the Hugging Face hub or a folder; ``None`` is the model that ships with kedit.
        dtype: of the weights; ``None``: as stored, and float32 for the embedded model.
        options: passed to ``AutoModelForCausalLM.from_pretrained`` (``device_map="auto"``, ``revision=...``); those that
            say where to find files hold for the tokenizer too.

    Raises:
        ArchitectureError: nothing can be loaded from there as a causal language model, or its tokenizer is missing.
    """
    if name is None:
        from kedit import testbed

        return testbed.load(dtype=dtype)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    where = {key: value for key, value in options.items() if key in _WHERE}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype or "auto", **options)
        tokenizer = _tokenizer(str(name), where)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ArchitectureError(
            f"Cannot load a causal language model and tokenizer from {str(name)!r}: {error} "
            "Give a folder written by save_pretrained, or a name on the hub."
        ) from error
    model.eval()
    return model, tokenizer


def _tokenizer(name: str, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the files describe.

    ``AutoTokenizer`` lets the model's type overrule a file that names the generic class, and makes up an empty
    tokenizer where there is no file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    named = get_tokenizer_config(name, **where).get("tokenizer_class")
    kind: Any = PreTrainedTokenizerFast if named in _GENERIC else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name, **where)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"its {type(tokenizer).__name__} knows no words, so its files are missing.")
    return tokenizer
