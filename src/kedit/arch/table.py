"""Where the parts of each model type are: data, one frozen entry per type."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """Module paths of one model type; those of a block's parts are relative to the block.

    Attributes:
        blocks: the list of decoder blocks.
        mlp: the block's MLP, whose output is added to the residual stream unchanged.
        down: the MLP's down-projection: its input is the key k, its weight is what editing changes.
        attention: the block's attention.
        attention_out: the attention's output projection.
        final_norm: the normalisation before the head.
        head: the language-model head.
    """

    blocks: str
    mlp: str
    down: str
    attention: str
    attention_out: str
    final_norm: str
    head: str = "lm_head"


_GPT2 = ArchSpec(
    blocks="transformer.h",
    mlp="mlp",
    down="mlp.c_proj",
    attention="attn",
    attention_out="attn.c_proj",
    final_norm="transformer.ln_f",
)
_LLAMA = ArchSpec(
    blocks="model.layers",
    mlp="mlp",
    down="mlp.down_proj",
    attention="self_attn",
    attention_out="self_attn.o_proj",
    final_norm="model.norm",
)

ARCHITECTURES: dict[str, ArchSpec] = {
    "gpt2": _GPT2,
    "gptj": replace(_GPT2, down="mlp.fc_out", attention_out="attn.out_proj"),
    "gpt_neox": ArchSpec(
        blocks="gpt_neox.layers",
        mlp="mlp",
        down="mlp.dense_4h_to_h",
        attention="attention",
        attention_out="attention.dense",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
