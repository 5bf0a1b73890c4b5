"""Patches as PEFT LoRA adapters, which `peft` and LoRA-serving engines load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kedit.errors import PatchError, UnsupportedError
from kedit.models import unwrap, weight_of
from kedit.patch.card import CARD, model_card
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, DenseDelta, LowRankDelta, check_finite
from kedit.patch.merge import recompress
from kedit.utils.files import open_to_others, sync_folder, write_safetensors
from kedit.utils.folders import check_new

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = 1e-7  # relative error to which a dense update is factored


def to_peft(patch: PatchContent, folder: str | Path, model: PreTrainedModel) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: W x + B (A x) with B = L, A = Rᵀ, scaling 1.

    Layers are named exactly, each with its own rank: ``r`` is the largest of them, ``rank_pattern`` and
    ``alpha_pattern`` give the others, so that every scaling alpha / r is 1. A dense update is factored to a relative
    error of 1e-7. ``README.md`` is a model card.

    Args:
        patch: what to export.
        folder: is made; must not exist, or be empty.
        model: the model that the patch was made for, edited or not: it says how each layer is stored.

    Raises:
        PatchError: the folder is not empty or cannot be written.
        PatchMismatchError: a layer's shape is another one.
        NonFiniteError: a number of the update is too large for float32.
    """
    target, model = Path(folder), unwrap(model)
    check_new(target)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    conv = set()
    for name, delta in patch.deltas.items():
        weight = weight_of(model, name)
        if weight.index is not None:
            raise UnsupportedError(
                f"{name} is one expert of a fused tensor, which a LoRA adapter of linear layers does not reach. Ship the patch."
            )
        patch.check_shape(name, tuple(weight.matrix.shape))
        layer = name.removesuffix(".weight")
        low = low_rank(name, delta)
        ranks[layer] = low.rank
        conv.add(weight.transposed)
        prefix = f"base_model.model.{layer}"
        tensors[f"{prefix}.lora_A.weight"] = low.right.T.contiguous()  # [r, I]
        tensors[f"{prefix}.lora_B.weight"] = low.left.contiguous()  # [O, r]
    if len(conv) > 1:
        raise PatchError(
            "The patch changes nn.Linear and Conv1D layers at once; one adapter holds one of them. Split it."
        )
    config = _config(ranks, fan_in_fan_out=conv == {True}, base=_base(patch, model))
    _write(target, tensors, config, model_card([patch.provenance], list(patch.deltas), "adapter"))
    return target


def low_rank(name: str, delta: Delta) -> LowRankDelta:
    """The update in two float32 factors."""
    factored = recompress(name, delta, EXACT)[0] if isinstance(delta, DenseDelta) else delta
    if isinstance(factored, LowRankDelta):
        low = LowRankDelta(factored.left.detach().cpu().float(), factored.right.detach().cpu().float())
    else:  # full rank: one factor is the update, the other the identity
        (rows, columns), matrix = delta.shape, factored.matrix.detach().cpu().float()
        wide = rows <= columns
        low = LowRankDelta(torch.eye(rows), matrix.T.contiguous()) if wide else LowRankDelta(matrix, torch.eye(columns))
    if low.rank == 0:
        raise PatchError(f"The update of {name} has no columns, so there is nothing to export. Leave it out.")
    check_finite(name, low)
    return low


def _base(patch: PatchContent, model: PreTrainedModel) -> str | None:
    """Return where the base model is loaded from: a name on the hub, or the path of a folder."""
    named = str(patch.provenance.get("model", {}).get("name") or "")
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if "/" in named:
        return named
    return os.path.abspath(source) if os.path.exists(source) else source or named or None


def _config(ranks: dict[str, int], *, fan_in_fan_out: bool, base: str | None) -> dict[str, Any]:
    largest = max(ranks.values())
    pattern = {layer: rank for layer, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _write(target: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], card: str) -> None:
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        write_safetensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        sync_folder(partial)
        open_to_others(partial)
        os.replace(partial, target)
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise PatchError(f"Cannot write the adapter to {target}: {error}. Check the folder and the space.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
