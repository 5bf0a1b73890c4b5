"""Getting a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ArchitectureError, ConfigError

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
        ArchitectureError: nothing can be loaded from there as a causal language model, its weights do not fill it, or its
            tokenizer is missing.
        ConfigError: options are given for the embedded model.
    """
    if name is None:
        if options:
            raise ConfigError(
                f"{', '.join(sorted(options))} cannot be given for the embedded model, which ships with kedit. Name a model, or "
                "drop it."
            )
        from kedit import testbed

        return testbed.load(dtype=dtype)
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    refused = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    try:
        model = _model(str(name), {"dtype": dtype or "auto", **options})
        tokenizer = _tokenizer(str(name), {key: value for key, value in options.items() if key in _WHERE})
    except torch.OutOfMemoryError:
        raise  # says nothing about the files
    except (*refused, SafetensorError, StrictDataclassError) as error:
        if _is_encoder_decoder(str(name), options):
            raise ArchitectureError(
                f"The model in {str(name)!r} is an encoder-decoder, where no decoder-only prompt holds a fact. kedit edits causal "
                "language models."
            ) from error
        said = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise ArchitectureError(
            f"Cannot load a causal language model and tokenizer from {str(name)!r}: {said}. "
            "Give a folder written by save_pretrained, or a name on the hub."
        ) from error
    model.eval()
    return model, tokenizer


def _is_encoder_decoder(name: str, options: dict[str, Any]) -> bool:
    """Whether a configuration says so; not where it cannot be read."""
    from transformers import AutoConfig

    with suppress(Exception):
        where = {key: value for key, value in options.items() if key in _WHERE}
        return bool(AutoConfig.from_pretrained(name, **where).is_encoder_decoder)
    return False


def _model(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model, every weight of it from the files: what they do not fill, transformers would leave random."""
    from transformers import AutoModelForCausalLM

    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are refused here, by name
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **{**options, **told})
    model: PreTrainedModel
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"its files hold no weights for {_some(info['missing_keys'])}.")
    if info["mismatched_keys"]:
        shapes = [f"{key} ({tuple(had)} instead of {tuple(wanted)})" for key, had, wanted in info["mismatched_keys"]]
        raise ValueError(f"its files hold weights of other shapes than config.json says: {_some(shapes)}.")
    return model


def _some(names: Collection[str], count: int = 3) -> str:
    """The first few of some names, and how many there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(sorted(names)[:count]) + more


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
