"""Published hyper-parameters, found by what a model is: its type, depth and width.

A model without an entry gets the stated rule of :func:`layer_rule` and the defaults of the editor's ``Config``.
Sources: the hyper-parameter files of ROME, MEMIT and the SADR authors' fork (GPT-J, Llama-2-13B, TinyLlama), and
EasyEdit's for Llama-2, Llama-3, Mistral and Qwen2. γ of SADR is published for GPT-J only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kedit.arch import ModelArch


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of one editor for one model.

    Attributes:
        values: fields of the editor's ``Config``.
        regularized: by regularizer name: changed ``Config`` fields, and fields of the regularizer under ``"self"``.
    """

    values: Mapping[str, Any]
    regularized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Model = tuple[str, int, int]  # model type, blocks, width

TESTBED: Model = ("gpt2", 6, 128)
GPT2_XL: Model = ("gpt2", 48, 1600)
GPT_J_6B: Model = ("gptj", 28, 4096)
NEOX_20B: Model = ("gpt_neox", 44, 6144)
LLAMA_7B: Model = ("llama", 32, 4096)  # Llama-2-7B and Llama-3-8B share depth and width
LLAMA_13B: Model = ("llama", 40, 5120)
TINYLLAMA: Model = ("llama", 22, 2048)
MISTRAL_7B: Model = ("mistral", 32, 4096)
QWEN2_7B: Model = ("qwen2", 28, 3584)


def _rome(layer: int, steps: int, weight_decay: float, clamp: float = 4.0) -> dict[str, Any]:
    return {"layers": (layer,), "steps": steps, "lr": 0.5, "weight_decay": weight_decay, "clamp": clamp}


_ROME: dict[Model, Preset] = {
    GPT2_XL: Preset(_rome(17, 20, 0.5)),
    GPT_J_6B: Preset(_rome(5, 20, 0.5), {"sadr": {"steps": 80, "self": {"gamma": 1e-2}}}),
    NEOX_20B: Preset(_rome(15, 20, 0.5)),
    LLAMA_7B: Preset(_rome(5, 25, 1e-3)),
    LLAMA_13B: Preset(_rome(6, 20, 1e-3)),
    TINYLLAMA: Preset(_rome(4, 20, 0.5, 2.0)),
    MISTRAL_7B: Preset(_rome(5, 25, 1e-3)),
    QWEN2_7B: Preset(_rome(5, 25, 1e-3)),
}

PRESETS: dict[str, dict[Model, Preset]] = {"rome": _ROME, "rrome": _ROME}

# The kind of model the testbed trains is recognised by its mark, not by its shape.
TESTBED_PRESETS: dict[str, Preset] = {}


def find(editor: str, arch: ModelArch) -> Preset | None:
    """The preset of an editor for a model, or ``None``."""
    if getattr(arch.model.config, "kedit_testbed", False) and editor in TESTBED_PRESETS:
        return TESTBED_PRESETS[editor]
    return PRESETS.get(editor, {}).get((arch.model_type, arch.num_layers, arch.hidden))


def layer_span_rule(arch: ModelArch) -> tuple[int, ...]:
    """The blocks for the multi-layer editors where nothing is published: up to five, the last above ROME's choice."""
    last = min(layer_rule(arch) + max(1, round(0.1 * arch.num_layers)), arch.num_layers - 2)
    count = min(5, max(1, arch.num_layers // 5))
    return tuple(range(max(0, last - count + 1), last + 1))


def layer_rule(arch: ModelArch) -> int:
    """The block to edit where nothing is published: about a sixth of the way up (a third for GPT-2 and GPT-NeoX).

    That is where the published choices lie: 17 of 48 and 15 of 44, but 5 of 28 and 5 of 32.
    """
    share = 0.35 if arch.model_type in ("gpt2", "gpt_neox") else 0.17
    return round(share * (arch.num_layers - 1))
