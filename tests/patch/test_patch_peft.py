"""Patches as PEFT adapters: what `peft` loads gives the edited model's logits."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from kedit.errors import PatchError, PatchMismatchError
from kedit.patch import EditPatch
from patch_common import TYPES, logits, patch_for, random_delta
from tiny_models import tiny_model as model

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("ranks", [{2: 1}, {0: 1, 1: 3, 4: 2}, {1: None, 3: 2}], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_peft_gives_the_edited_models_logits(tmp_path, kind, ranks):
    edited, plain = model(kind), model(kind)
    patch = patch_for(edited, ranks)
    folder = patch.to_peft(tmp_path / "adapter", edited)
    patch.apply(edited)
    base = logits(plain)
    loaded = peft.PeftModel.from_pretrained(plain, folder)
    assert torch.allclose(logits(loaded), logits(edited), rtol=0, atol=1e-5)
    assert not torch.allclose(base, logits(edited), rtol=0, atol=1e-2)
    scalings = [m.scaling["default"] for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert scalings == [1.0] * len(ranks)
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged), logits(edited), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_loads_the_adapter_without_peftmodel(tmp_path, kind):
    """``model.load_adapter`` on the base model, which the docs' page on serving shows."""
    edited, plain = model(kind), model(kind)
    patch = patch_for(edited, {0: 1, 1: None, 4: 2})
    folder = patch.to_peft(tmp_path / "adapter", edited)
    patch.apply(edited)
    before = logits(plain)
    plain.load_adapter(str(folder))
    assert type(plain) is type(edited)
    assert torch.allclose(logits(plain), logits(edited), rtol=0, atol=1e-5)
    assert not torch.allclose(before, logits(edited), rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", TYPES)
def test_in_bfloat16_the_adapter_is_as_near_as_the_dtype_allows(tmp_path, kind):
    """The edited weight is rounded once, the adapter's branch apart from it: equal up to the dtype's precision."""
    edited, plain = model(kind, dtype=torch.bfloat16), model(kind, dtype=torch.bfloat16)
    patch = patch_for(edited, {0: 1, 2: 3})
    folder = patch.to_peft(tmp_path / "adapter", edited)
    base = logits(plain).float()
    patch.apply(edited)
    expected = logits(edited).float()
    loaded = peft.PeftModel.from_pretrained(plain, folder)
    distance = (logits(loaded).float() - expected).norm() / (base - expected).norm()
    assert distance < 0.05
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_layers_with_similar_numbers_keep_their_own_ranks(tmp_path):
    edited, plain = model("llama", layers=13), model("llama", layers=13)
    patch = patch_for(edited, {1: 4, 11: 2, 12: 1})
    folder = patch.to_peft(tmp_path / "adapter", edited)
    loaded = peft.PeftModel.from_pretrained(plain, folder)
    adapted = {name: m.r["default"] for name, m in loaded.named_modules() if getattr(m, "r", None)}
    assert {int(name.split(".")[-3]): rank for name, rank in adapted.items()} == {1: 4, 11: 2, 12: 1}
    patch.apply(edited)
    assert torch.allclose(logits(loaded), logits(edited), rtol=0, atol=1e-5)


def test_the_adapter_is_what_serving_engines_read(tmp_path):
    """One prefix, lora_A [r, I] and lora_B [O, r], alpha / r = 1 also for readers that ignore the patterns."""
    subject = model("llama")
    folder = patch_for(subject, {1: 1, 2: 3}).to_peft(tmp_path / "adapter", subject)
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.1.mlp.down_proj": 1}
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert not config["fan_in_fan_out"]
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    prefix = "base_model.model.model.layers"
    assert shapes == {
        f"{prefix}.1.mlp.down_proj.lora_A.weight": (1, 80),
        f"{prefix}.1.mlp.down_proj.lora_B.weight": (48, 1),
        f"{prefix}.2.mlp.down_proj.lora_A.weight": (3, 80),
        f"{prefix}.2.mlp.down_proj.lora_B.weight": (48, 3),
    }


def test_conv1d_says_so(tmp_path):
    subject = model("gpt2")
    folder = patch_for(subject, {1: 1}).to_peft(tmp_path / "adapter", subject)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_a_taken_folder_and_another_model_are_refused(tmp_path):
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    with pytest.raises(PatchError, match="exists already"):
        patch.to_peft(tmp_path / "taken", subject)
    odd = EditPatch({name: random_delta((5, 6), 1) for name in patch.deltas}, patch.fingerprints)
    with pytest.raises(PatchMismatchError, match="shape"):
        odd.to_peft(tmp_path / "new", subject)
    with pytest.raises(PatchError, match="Cannot write"):
        patch.to_peft(tmp_path / "taken" / "x" / "y", subject)
    assert sorted(os.listdir(tmp_path)) == ["taken"]
    assert os.listdir(tmp_path / "taken") == ["x"]


def test_a_full_disk_leaves_no_adapter(tiny_disk):
    subject = model("llama")
    (name,) = patch_for(subject, {1: 1}).deltas
    huge = EditPatch({name: random_delta((48, 80), 4000)}, {})
    with pytest.raises(PatchError, match="No space left"):
        huge.to_peft(tiny_disk / "adapter", subject)
    assert os.listdir(tiny_disk) == []
