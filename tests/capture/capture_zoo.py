"""Tiny models of many types, the eager oracle for them, and inputs with padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
_GPT2 = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64}
_LLAMA = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
}
_WIDE = {**_LLAMA, "head_dim": 16}
_MOE = {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}

INSIDE: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2-inverse": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _WIDE),
    "mistral-window": ("mistral", {**_WIDE, "sliding_window": 5}),
    "gemma2-softcap": ("gemma2", {**_WIDE, "sliding_window": 5, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**_WIDE, "sliding_window": 5}),
    "gpt_oss-sinks": ("gpt_oss", {**_MOE, "sliding_window": 5}),
    "phi3": ("phi3", {**_LLAMA, "pad_token_id": 0}),
    "olmo2": ("olmo2", _LLAMA),
    "opt": (
        "opt",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "mixtral": ("mixtral", _MOE),
    "qwen3_moe": ("qwen3_moe", {**_WIDE, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}
OUTSIDE: dict[str, tuple[str, dict[str, object]]] = {
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_layers": 4,
            "num_heads": 4,
            "hidden_size": 32,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
        },
    ),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4, "hidden_size": 32}),
    "mpt": ("mpt", {"n_layers": 3, "n_heads": 4, "d_model": 32, "max_seq_len": 64}),
    "falcon": ("falcon", {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "alibi": False}),
    "falcon-alibi": ("falcon", {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "alibi": True}),
    "xglm": (
        "xglm",
        {"num_layers": 3, "attention_heads": 4, "d_model": 32, "ffn_dim": 64, "max_position_embeddings": 64},
    ),
}
ZOO = {**INSIDE, **OUTSIDE}
NO_POSITION_IDS = ("opt", "bloom", "mpt", "xglm")


def config_of(name: str, **changes: object) -> object:
    kind, sizes = ZOO[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{"vocab_size": VOCAB, **special, **sizes, **changes})


def make(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model with attention far from uniform; the same weights every time."""
    torch.manual_seed(1)
    if name == "falcon-alibi":  # transformers' SDPA and eager differ with alibi: compare eager with eager
        changes = {"attn_implementation": "eager", **changes}
    attention = {key: changes.pop(key) for key in ("attn_implementation",) if key in changes}
    model = AutoModelForCausalLM.from_config(config_of(name, **changes), **attention).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
        parameter.requires_grad_(False)
    return model.to(dtype)


def eager_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The oracle: the same weights with attention written out."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="eager").eval().to(model.dtype)
    twin.load_state_dict(model.state_dict())
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def inputs(pad: str = "none", batch: int = 3, length: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids with their mask, and rows to read [B, 4]: the last token, an earlier one, it again, a dead row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad == "right":
        mask[0, -4:], mask[1, -2:] = 0, 0
    if pad == "left":
        mask[0, :4], mask[1, :2] = 0, 0
    last = (mask * torch.arange(length)).amax(1)
    positions = torch.stack([last, last - 3, last - 3, torch.full_like(last, -1)], 1)
    return {"input_ids": ids, "attention_mask": mask}, positions


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) >= 3]
    return next(m for m in lists if any("Attention" in type(x).__name__ for x in m[0].modules()))


@contextmanager
def injected(model: nn.Module, layer: int, delta: Tensor, token: int) -> Iterator[None]:
    """Add δ [H] at one token of a block's output."""

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        at = torch.zeros(hidden.shape[1], 1, dtype=hidden.dtype)
        at[token] = 1
        hidden = hidden + at * delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def eager_rows(twin: PreTrainedModel, given: dict[str, Tensor], positions: Tensor) -> dict[int, Tensor]:
    """Rows sliced from the full attention of the oracle; dead rows 0."""
    full = twin(**given, output_attentions=True).attentions
    batch = torch.arange(len(positions))[:, None]
    live = (positions >= 0)[:, :, None, None]
    return {
        layer: (attention[batch, :, positions.clamp(min=0)] * live).transpose(1, 2)
        for layer, attention in enumerate(full)
    }


Run = Callable[[], dict[int, Tensor]]
