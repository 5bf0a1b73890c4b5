"""Patches as LoRA adapters in GGUF files, which llama.cpp and what is built on it load beside a (quantised) base."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kedit.errors import DependencyError, PatchError, UnsupportedError
from kedit.models import unwrap, weight_of
from kedit.patch.content import PatchContent
from kedit.patch.peft import low_rank
from kedit.utils.files import open_to_others
from kedit.utils.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = {
    "bloom": "bloom",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mpt": "mpt",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""By model type in transformers: the architecture's name in GGUF."""

_PLAIN = re.compile(
    r"blk\.\d+\.(ffn_down|ffn_up|attn_output)"
)  # kept row by row and column by column; others are reordered


def to_gguf(patch: PatchContent, path: str | Path, model: PreTrainedModel) -> Path:
    """Write a LoRA adapter as a GGUF file: for ``llama-cli --lora FILE``, and Ollama's ``ADAPTER``.

    Every update is a pair of float32 factors, W x + B (A x) at a scale of 1, under the weight's name in GGUF. Factors of lower
    rank than others are filled up with zeros, as the file has one alpha. A dense update is factored to a relative error of 1e-7.

    Args:
        patch: what to export.
        path: the new file; an existing one is replaced.
        model: the model that the patch was made for, edited or not: it says how each weight is stored.

    Raises:
        UnsupportedError: llama.cpp does not have the model's type, or keeps an edited weight in another form.
        DependencyError: the package ``gguf`` is not installed.
        PatchMismatchError: a layer's shape is another one.
        PatchError: the file cannot be written.
    """
    target, model = Path(path), unwrap(model)
    try:
        import gguf
    except ImportError as error:
        raise DependencyError(
            'A GGUF adapter needs the package gguf. Install it with pip install "kedit[gguf]".'
        ) from error
    config = model.config.get_text_config()
    architecture = ARCHITECTURES.get(str(config.model_type))
    if architecture is None:
        raise UnsupportedError(
            f"kedit knows no GGUF form of {config.model_type} models. It knows {', '.join(ARCHITECTURES)}. Export to PEFT, or "
            "apply the patch to the checkpoint and convert the result."
        )
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, int(config.num_hidden_layers))
    factors = {}
    for name, delta in patch.deltas.items():
        weight = weight_of(model, name)
        stored = None if weight.index is not None else names.get_name(name.removesuffix(".weight"))
        if stored is None or not _PLAIN.fullmatch(stored):
            raise UnsupportedError(
                f"{name} is not stored as one plain weight in GGUF files, so an adapter does not reach it. Apply the patch to the "
                "checkpoint and convert the result."
            )
        patch.check_shape(name, tuple(weight.matrix.shape))
        factors[stored] = low_rank(name, delta)
    rank = max((low.rank for low in factors.values()), default=0)
    if not rank:
        raise PatchError("The patch changes nothing, so there is nothing to export.")
    known = patch.provenance.get("edits") or []
    texts = [
        f"{str(edit.get('prompt')).replace('{}', str(edit.get('subject')))} → {edit.get('target_new')}"
        for edit in known
    ]
    about = "; ".join(map(printable, texts)) or "No edits named"

    def write(file: str) -> None:
        writer: Any = gguf.GGUFWriter(file, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_name(f"kedit: {patch.provenance.get('editor') or 'patch'}, {len(known)} edit(s)")
        writer.add_description(f"{about[:1000]}. To undo the edit, use the base model without this adapter.")
        for name, low in factors.items():
            missing = rank - low.rank
            right = torch.nn.functional.pad(low.right.T, (0, 0, 0, missing))  # [r, I]
            left = torch.nn.functional.pad(low.left, (0, missing))  # [O, r]
            writer.add_tensor(f"{name}.weight.lora_a", right.contiguous().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", left.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    partial: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        os.close(handle)
        write(partial)
        open_to_others(Path(partial))
        os.replace(partial, target)
        partial = None
    except OSError as error:
        raise PatchError(f"Cannot write the adapter to {target}: {error}. Check the folder and the space.") from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
    return target
