"""Tiny models of many types, from configurations alone: the one place for them."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kedit.models import ARCHITECTURES

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
# Types that attention capture treats as some type above; editing has an entry for each.
MORE: dict[str, tuple[str, dict[str, object]]] = {
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gemma": ("gemma", _WIDE),
    "phi": ("phi", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
    "stablelm-parallel": ("stablelm", {**_LLAMA, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", _LLAMA),
    "cohere": ("cohere", _LLAMA),
    "granite": ("granite", {**_LLAMA, "residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "glm4": ("glm4", _WIDE),
    "smollm3": ("smollm3", _LLAMA),
    "olmoe": ("olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "falcon-new": (
        "falcon",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "hidden_size": 32,
            "new_decoder_architecture": True,
        },
    ),
    "opt-normalised": ("opt", {**INSIDE["opt"][1], "do_layer_norm_before": False}),
}
# Mixtures with shared experts beside the routed ones, and hybrids: an entry each, and tests of their own
# (models/test_newer_families.py), as they are combinations of what the types above have.
_SHARED = {**_LLAMA, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_FIRST_DENSE = {
    **_SHARED,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_HYBRID = {
    **_WIDE,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_HYBRID_MOE = {
    **_HYBRID,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24,
}
NEWER: dict[str, tuple[str, dict[str, object]]] = {
    "deepseek_v2": ("deepseek_v2", {**_FIRST_DENSE, **_LATENT}),
    "deepseek_v3": ("deepseek_v3", {**_FIRST_DENSE, **_LATENT}),
    "dots1": ("dots1", {**_FIRST_DENSE, "head_dim": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_SHARED, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "glm4_moe": ("glm4_moe", {**_FIRST_DENSE, "head_dim": 16}),
    "glm4_moe_lite": ("glm4_moe_lite", {**_FIRST_DENSE, **_LATENT}),
    "qwen2_moe": ("qwen2_moe", {**_SHARED, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_5_text": ("qwen3_5_text", _HYBRID),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _HYBRID_MOE),
    "qwen3_next": ("qwen3_next", _HYBRID_MOE),
}
ZOO = {**INSIDE, **OUTSIDE, **MORE}
EDITABLE = tuple(name for name, (kind, _) in ZOO.items() if kind in ARCHITECTURES)
"""Every type that has an entry, with its variants."""


# transformers' SDPA and eager differ with alibi and, in versions that run it, with a softcap; before 5.4 with GPT-2's
# inverse scaling: compare eager with eager.
EAGER = {"falcon-alibi", "gemma2-softcap"} | (
    {"gpt2-inverse"} if Version(transformers.__version__) < Version("5.4") else set()
)


def config_of(name: str, **changes: object) -> object:
    kind, sizes = {**ZOO, **NEWER}[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{"vocab_size": VOCAB, **special, **sizes, **changes})


def make(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model with attention far from uniform; the same weights every time."""
    torch.manual_seed(1)
    if name == "mpt" and dtype is torch.float64:  # its mask is filled with float64's minimum in the default dtype
        try:
            torch.full((), torch.finfo(dtype).min)
        except RuntimeError as error:
            pytest.skip(f"This version of torch makes no mask for a float64 MPT: {error}")
    if name in EAGER:
        changes = {"attn_implementation": "eager", **changes}
    if dtype is torch.float64:  # grouped multiplication of experts knows no float64
        changes = {"experts_implementation": "eager", **changes}
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
