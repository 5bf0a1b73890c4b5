"""List where the parts of each model type are: data, one frozen entry per type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """Module paths of one model type; those of a block's parts are relative to the block.

    Attributes:
        blocks: the list of decoder blocks.
        mlp: the module whose output is the MLP's before the block does anything with it: before a normalisation, a factor,
            or the residual. A value at the site ``"mlp"`` is written there.
        down: the MLP's down-projection: its input is the key k, its weight is what editing changes.
        attention: the block's attention.
        attention_out: the attention's output projection.
        final_norm: the normalisation before the head.
        head: the language-model head.
        experts: in a mixture of experts, the module that holds the experts' fused tensors; blocks without it have ``down``. A
            shared expert beside them is a part of the MLP's output that editing leaves as it is, like a bias.
        mixer: in a hybrid, what stands in the attention's place in the other blocks (such as a linear attention).
        mixer_out: its output projection.
        fused_down: the name of that module's fused down-projections, [E, O, I] or [E, I, O].
        scale: the factor by which the block multiplies the MLP's output before adding it, or the configuration's field
            that holds it.
        normalised: whether the block normalises the MLP's output before or after adding it, so that a change of the block's
            output is no fixed multiple of a change at ``mlp``; or the configuration's field and its value where this is so.
    """

    blocks: str
    mlp: str
    down: str
    attention: str
    attention_out: str
    final_norm: str
    head: str = "lm_head"
    experts: str = ""
    mixer: str = ""
    mixer_out: str = ""
    fused_down: str = "down_proj"
    scale: float | str = 1.0
    normalised: bool | tuple[str, Any] = False


_GPT2 = ArchSpec(
    blocks="transformer.h",
    mlp="mlp",
    down="mlp.c_proj",
    attention="attn",
    attention_out="attn.c_proj",
    final_norm="transformer.ln_f",
)
_GPTJ = replace(_GPT2, down="mlp.fc_out", attention_out="attn.out_proj")
_LLAMA = ArchSpec(
    blocks="model.layers",
    mlp="mlp",
    down="mlp.down_proj",
    attention="self_attn",
    attention_out="self_attn.o_proj",
    final_norm="model.norm",
)
_NORMALISED = replace(_LLAMA, normalised=True)
_MIXTURE = replace(_LLAMA, experts="mlp.experts")
_HYBRID = replace(_LLAMA, mixer="linear_attn", mixer_out="linear_attn.out_proj")
# The text model inside of a vision-language one.
_INSIDE = replace(_HYBRID, blocks="model.language_model.layers", final_norm="model.language_model.norm")
# Bloom and MPT add the residual inside the MLP, so what is the MLP's own is the down-projection's output.
_BLOOM = ArchSpec(
    blocks="transformer.h",
    mlp="mlp.dense_4h_to_h",
    down="mlp.dense_4h_to_h",
    attention="self_attention",
    attention_out="self_attention.dense",
    final_norm="transformer.ln_f",
)

ARCHITECTURES: dict[str, ArchSpec] = {
    "bloom": _BLOOM,
    "codegen": _GPTJ,
    "cohere": _LLAMA,
    "deepseek_v2": _MIXTURE,
    "deepseek_v3": _MIXTURE,
    "dots1": _MIXTURE,
    "ernie4_5_moe": _MIXTURE,
    "falcon": replace(_BLOOM, mlp="mlp"),
    "gemma": _LLAMA,
    "gemma2": _NORMALISED,
    "gemma3_text": _NORMALISED,
    "glm4": _NORMALISED,
    "glm4_moe": _MIXTURE,
    "glm4_moe_lite": _MIXTURE,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, attention="attn.attention", attention_out="attn.attention.out_proj"),
    "gpt_neox": ArchSpec(
        blocks="gpt_neox.layers",
        mlp="mlp",
        down="mlp.dense_4h_to_h",
        attention="attention",
        attention_out="attention.dense",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "gpt_oss": _MIXTURE,
    "gptj": _GPTJ,
    "granite": replace(_LLAMA, scale="residual_multiplier"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTURE,
    "mpt": ArchSpec(
        blocks="transformer.blocks",
        mlp="ffn.down_proj",
        down="ffn.down_proj",
        attention="attn",
        attention_out="attn.out_proj",
        final_norm="transformer.norm_f",
    ),
    "olmo2": _NORMALISED,
    "olmoe": _MIXTURE,
    # A block of OPT is flat: its two projections are its own, and it has no module that is the MLP.
    "opt": ArchSpec(
        blocks="model.decoder.layers",
        mlp="fc2",
        down="fc2",
        attention="self_attn",
        attention_out="self_attn.out_proj",
        final_norm="model.decoder.final_layer_norm",
        normalised=("do_layer_norm_before", False),
    ),
    "phi": replace(_LLAMA, down="mlp.fc2", attention_out="self_attn.dense", final_norm="model.final_layernorm"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _MIXTURE,
    "qwen3": _LLAMA,
    "qwen3_5": _INSIDE,
    "qwen3_5_moe": replace(_INSIDE, experts="mlp.experts"),
    "qwen3_5_moe_text": replace(_HYBRID, experts="mlp.experts"),
    "qwen3_5_text": _HYBRID,
    "qwen3_moe": _MIXTURE,
    "qwen3_next": replace(_HYBRID, experts="mlp.experts"),
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, down="mlp.c_proj"),
}
