"""Tiny GGUF files, written with the package ``gguf``."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_models import tiny_model, tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}. {% endfor %}"


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantized: bool = True,
    with_tokenizer: bool = True,
    tensors: bool = True,
) -> Path:
    """Write the tiny Llama model and its tokenizer; the matrices of its MLPs as blocks of 8-bit integers if ``quantized``."""
    config = tiny_model("llama").config
    config.intermediate_size = 96  # a multiple of 32, the length of a block
    config.hidden_size, config.head_dim = 64, 16
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if with_tokenizer:
        _write_tokenizer(writer, tokenizer())
    if tensors:
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, weight in model.state_dict().items():
            array = weight.float().numpy()
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:  # llama.cpp keeps the two halves that a rotation turns beside each other
                    array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            stored = names.get_name(name, try_suffixes=(".weight",))
            if quantized and ".mlp." in name:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
            else:
                writer.add_tensor(stored, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, tok: PreTrainedTokenizerFast) -> None:
    import json

    raw = json.loads(tok.backend_tokenizer.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].__getitem__)
    special = set(tok.all_special_tokens) | {"<s>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.eos_token_id)
    writer.add_pad_token_id(tok.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
