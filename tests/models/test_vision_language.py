"""Vision-language checkpoints: loaded whole, edited in their language model, and patched on disk under the names in their files."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kedit
from kedit.models import ModelArch
from kedit.patch import EditPatch
from kedit.patch.checkpoint.apply import apply_to_checkpoint, revert_checkpoint
from patch_common import bytes_of
from tiny_models import moments, tokenizer

VOCAB = 402
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WIDE = {**_TEXT, "head_dim": 8}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
_OUT = {**_QWEN, "out_hidden_size": 32, "intermediate_size": 48}
_IMAGE = {"image_token_index": VOCAB - 1}
TYPES = {
    "gemma3": {"text_config": _WIDE, "vision_config": _TOWER, "mm_tokens_per_image": 4, **_IMAGE},
    "llava": {
        "text_config": {"model_type": "llama", **_WIDE},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
        **_IMAGE,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_WIDE},
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **_TOWER},
        **_IMAGE,
    },
    "qwen2_vl": {"text_config": {**_TEXT, **_ROPE}, "vision_config": {**_QWEN, "embed_dim": 32, "mlp_ratio": 2}},
    "qwen2_5_vl": {"text_config": {**_TEXT, **_ROPE}, "vision_config": {**_OUT, "fullatt_block_indexes": [0]}},
    "qwen3_vl": {
        "text_config": {**_WIDE, **_ROPE},
        "vision_config": {**_OUT, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
}
EDIT = kedit.Edit("{} works in the old city of", "Ada Lovelace", "Berlin")


@pytest.mark.parametrize("kind", TYPES)
def test_a_folder_is_loaded_edited_and_patched_on_disk(kind, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    made = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(kind, **TYPES[kind]))
    made.save_pretrained(base)
    tokenizer().save_pretrained(base)

    model, tok = kedit.load(base)
    assert model.config.model_type == kind
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in model.state_dict().items())
    arch = ModelArch(model)
    assert arch.num_layers == 3
    assert arch.weight(1).name == "model.language_model.layers.1.mlp.down_proj.weight"
    before = bytes_of(model)
    patch = kedit.ROME(model, tok, layers=[1], steps=3, moments={1: moments(48)}).apply(EDIT).patch

    apply_to_checkpoint(base, [patch], out)
    assert bytes_of(kedit.load(out)[0]) == bytes_of(model) != before
    found = EditPatch.diff(base, out)
    assert list(found.deltas) == list(patch.deltas)
    assert found.fingerprints == patch.fingerprints
    revert_checkpoint(out, base, [patch], tmp_path / "back")
    weights = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    patch.revert(model)
    assert bytes_of(model) == before
