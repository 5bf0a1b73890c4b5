"""Getting a model and its tokenizer."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kedit.errors import ArchitectureError, ConfigError, DependencyError
from kedit.models.compat import auto_class
from kedit.utils.network import UNREACHABLE, hub_is_reachable
from kedit.utils.progress import logger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_WHERE = frozenset(
    {
        "revision",
        "token",
        "cache_dir",
        "local_files_only",
        "force_download",
        "subfolder",
        "trust_remote_code",
        "gguf_file",
    }
)
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
_FOLDER_OR_NAME = "Give a folder written by save_pretrained, or a name on the hub."
_WHOLE_GGUF = "Give a complete GGUF file of a model type that transformers reads from GGUF, or a folder written by save_pretrained."
_MAGIC = b"GGUF"
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")  # no hub name ends so
_DESCRIBED = ("config.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def load(
    name: str | Path | None = None, *, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be edited.

    A vision-language model is loaded whole, and its language model is what kedit edits and asks.

    A GGUF file is de-quantized: the model is the one that ``save_pretrained`` and a folder would give, and is edited,
    saved and fingerprinted as any other. Needs the package ``gguf`` (``pip install "kedit[gguf]"``).

    Args:
        name: a folder written by ``save_pretrained``, a GGUF file, a folder that holds one GGUF file, or a name on the
            Hugging Face hub; ``None`` is the model that ships with kedit. A string is a path if something is there, or
            if it is absolute, begins with ``.`` or ``~``, has more than one slash, or ends like a file of weights.
        dtype: of the weights; ``None``: as stored, and float32 for the embedded model and for GGUF.
        options: passed to transformers' ``from_pretrained`` (``device_map="auto"``, ``revision=...``); those that
            say where to find files hold for the tokenizer too (``gguf_file=...``: one file of several).

    Raises:
        ArchitectureError: nothing can be loaded from there as a causal language model, its weights do not fill it, or its
            tokenizer is missing.
        ConfigError: options are given for the embedded model.
        DependencyError: a GGUF file, and the package ``gguf`` is not installed.
    """
    if name is None:
        if options:
            raise ConfigError(
                f"{', '.join(sorted(options))} cannot be given for the embedded model, which ships with kedit. Name a model, or "
                "drop it."
            )
        from kedit import embedded

        return embedded.load(dtype=dtype)
    import torch
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    source, gguf = _find(name, options)
    offline = not os.path.exists(source) and "local_files_only" not in options and not hub_is_reachable()
    if offline:
        cached = None
        with suppress(ValueError):  # no name that the hub could know
            cached = try_to_load_from_cache(source, "config.json", options.get("cache_dir"), options.get("revision"))
        if not isinstance(cached, str):
            raise _refusal(name, f"it is no folder here, and {UNREACHABLE}")
        options = {**options, "local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
    where = {key: value for key, value in options.items() if key in _WHERE}
    if gguf is not None:
        options, where = {**options, "gguf_file": gguf}, {**where, "gguf_file": gguf}
    refused = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    try:
        model = _model(source, {"dtype": dtype or ("auto" if gguf is None else torch.float32), **options})
        tokenizer = _tokenizer(source, where)
    except torch.OutOfMemoryError:
        raise  # says nothing about the files
    except (*refused, SafetensorError, StrictDataclassError, struct.error) as error:
        if _is_encoder_decoder(source, where):
            raise ArchitectureError(
                f"The model in {str(name)!r} is an encoder-decoder, where no decoder-only prompt holds a fact. kedit edits causal "
                "language models."
            ) from error
        said = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise _refusal(name, said, _FOLDER_OR_NAME if gguf is None else _WHOLE_GGUF) from error
    model.eval()
    return model, tokenizer


def _refusal(name: str | Path, said: str, advice: str = _FOLDER_OR_NAME) -> ArchitectureError:
    """The error for a model that cannot be loaded: where from, why, and what to give instead."""
    return ArchitectureError(f"Cannot load a causal language model and tokenizer from {str(name)!r}: {said}. {advice}")


def _find(name: str | Path, options: dict[str, Any]) -> tuple[str, str | None]:
    """Find the files: a folder or a name on the hub, and the GGUF file in it, if it is one."""
    path, gguf = os.path.expanduser(name), options.get("gguf_file")
    if gguf is None and os.path.isfile(path):
        gguf, path = _gguf_file(name, path), os.path.dirname(path) or "."
    elif os.path.isdir(path):
        if gguf is None:
            gguf = _gguf_in(name, Path(path, options.get("subfolder") or ""))
    elif isinstance(name, Path) or _is_path(name):
        raise _refusal(name, "there is no such file or folder")
    else:
        path = name
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise DependencyError(
                f"{str(name)!r} is a GGUF model, and reading it needs the package gguf, which is not installed. "
                'Install it with pip install "kedit[gguf]".'
            )
        _say_version()
        logger.info("Reading %s and de-quantizing its weights; this can take a minute.", gguf)
    return path, gguf


def _say_version() -> None:
    """Give the package ``gguf`` the ``__version__`` for which transformers 5.0 asks it on Python 3.10."""
    package: Any = importlib.import_module("gguf")
    if not hasattr(package, "__version__"):
        package.__version__ = importlib.metadata.version("gguf")


def _is_path(name: str) -> bool:
    """Return whether a string that names nothing on this machine was meant as a path, and not as a name on the hub."""
    return (
        not name.strip()
        or os.path.isabs(name)
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(("/", *_FILES))
    )


def _gguf_file(name: str | Path, path: str) -> str:
    """The name of a GGUF file, for one file that is to hold a whole model."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise _refusal(name, f"the file cannot be read ({error.strerror or error})") from error
    if magic != _MAGIC and path.lower().endswith(".gguf"):
        raise _refusal(
            name, "it does not begin with the letters GGUF, so it is another file or a damaged one", _WHOLE_GGUF
        )
    if magic != _MAGIC:
        raise _refusal(
            name,
            "it is a single file, and only a GGUF file holds a whole model",
            "Give the folder in which it lies with config.json; a kedit patch is loaded with kedit.EditPatch.load.",
        )
    if _PART.search(path):
        raise _refusal(
            name,
            "it is one part of a GGUF model in several files, which transformers does not read",
            "Join them with llama.cpp's llama-gguf-split --merge.",
        )
    return os.path.basename(path)


def _gguf_in(name: str | Path, folder: Path) -> str | None:
    """The one GGUF file of a folder that holds no weights in another form; ``None``: a folder as transformers writes it."""
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise _refusal(name, f"the folder cannot be read ({error.strerror or error})") from error
    described = any(entry in entries for entry in _DESCRIBED)
    files = [entry for entry in entries if entry.lower().endswith(".gguf")]
    if described and (not files or any(any(folder.glob(pattern)) for pattern in _WEIGHTS)):
        return None
    if len(files) > 1:
        raise _refusal(
            name, f"the folder holds {len(files)} GGUF files: {_some(files, 8)}", "Give the path of one of them."
        )
    if files:
        return _gguf_file(name, str(folder / files[0]))
    if not entries:
        raise _refusal(name, "the folder is empty")
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"; its subfolders {_some(inner)} hold one" if inner else f" (found: {_some(entries)})"
    raise _refusal(name, f"the folder holds no config.json{hint}")


def _is_encoder_decoder(name: str, where: dict[str, Any]) -> bool:
    """Return whether a configuration says so; not where it cannot be read."""
    from transformers import AutoConfig

    with suppress(Exception):
        return bool(AutoConfig.from_pretrained(name, **where).is_encoder_decoder)
    return False


def _model(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model, every weight of it from the files: what they do not fill, transformers would leave random."""
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are refused here, by name
    if "gguf_file" in options:
        told |= _dequantized()
    loaded: Any = _class(name, options).from_pretrained(name, **{**options, **told})
    model: PreTrainedModel
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"its files hold no weights for {_some(info['missing_keys'])}.")
    if info["mismatched_keys"]:
        shapes = [f"{key} ({tuple(had)} instead of {tuple(wanted)})" for key, had, wanted in info["mismatched_keys"]]
        raise ValueError(f"its files hold weights of other shapes than config.json says: {_some(shapes)}.")
    if "gguf_file" in options:
        model.config._name_or_path = os.path.join(name, options["gguf_file"])
    return model


def _class(name: str, options: dict[str, Any]) -> Any:
    """The class of transformers that loads a model; that of causal language models where the configuration cannot be read."""
    from transformers import AutoConfig

    config = None
    with suppress(Exception):  # a folder with an adapter alone has none
        config = AutoConfig.from_pretrained(name, **{key: value for key, value in options.items() if key in _WHERE})
    return auto_class(config)


def _dequantized() -> dict[str, Any]:
    """The option by which transformers unpacks every weight of a GGUF file, and forgets that it was packed.

    Without it, transformers keeps packed weights where a kernel can multiply with them, and cannot save the model.
    Versions before 5.24 always unpack, and have no such option.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


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

    if "gguf_file" in where:
        # Not AutoTokenizer, which lets some versions build the model type's own class, of other words.
        try:
            return cast("PreTrainedTokenizerBase", PreTrainedTokenizerFast.from_pretrained(name, **where))
        except Exception as error:  # transformers raises many kinds, also the bare one
            raise ValueError(f"its tokenizer is missing or cannot be read ({error})") from error
    named = get_tokenizer_config(name, **where).get("tokenizer_class")
    kind: Any = PreTrainedTokenizerFast if named in _GENERIC else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name, **where)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"its {type(tokenizer).__name__} knows no words, so its files are missing.")
    return tokenizer
