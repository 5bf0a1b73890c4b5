"""Patches as GGUF adapters: what the package ``gguf`` reads back is the update, under the names that a GGUF model has."""

import numpy as np
import pytest
import torch

import kedit
from gguf_files import write_gguf
from kedit.cli import main
from kedit.errors import DependencyError, PatchError, UnsupportedError
from kedit.models import ModelArch
from kedit.patch.gguf import ARCHITECTURES
from patch_common import patch_for
from tiny_models import tiny_model as model

gguf = pytest.importorskip("gguf")


def read(path):
    """The fields of an adapter, and its tensors in numpy's order."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: np.array(tensor.data) for tensor in reader.tensors
    }


@pytest.mark.parametrize("ranks", [{2: 1}, {0: 1, 1: 3, 4: 2}, {1: None, 3: 2}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_what_is_read_back_is_the_update(tmp_path, kind, ranks):
    subject = model(kind)
    patch = patch_for(subject, ranks)
    path = patch.to_gguf(tmp_path / "new" / "adapter.gguf", subject)
    assert [file.name for file in path.parent.iterdir()] == ["adapter.gguf"]
    fields, tensors = read(path)
    assert fields["general.architecture"] == ARCHITECTURES[kind]
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    arch = ModelArch(subject)
    assert len(tensors) == 2 * len(ranks)
    for layer in ranks:
        right, left = (tensors[f"blk.{layer}.ffn_down.weight.lora_{side}"] for side in "ab")
        assert right.dtype == left.dtype == np.float32
        assert fields["adapter.lora.alpha"] == right.shape[0] == left.shape[1]  # so that the scale is 1
        delta = patch.deltas[arch.weight(layer).name].dense
        torch.testing.assert_close(torch.from_numpy(left @ right), delta.float(), rtol=1e-5, atol=1e-6)


def test_names_and_shapes_are_those_of_a_gguf_model(tmp_path):
    base, _ = kedit.load(write_gguf(tmp_path / "base.gguf"))
    path = patch_for(base, {1: 2}).to_gguf(tmp_path / "adapter.gguf", base)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    adapter = {tensor.name: [int(size) for size in tensor.shape] for tensor in gguf.GGUFReader(path).tensors}
    wide, high = (int(size) for size in stored["blk.1.ffn_down.weight"].shape)  # in llama.cpp's order: inputs first
    assert adapter == {"blk.1.ffn_down.weight.lora_a": [wide, 2], "blk.1.ffn_down.weight.lora_b": [2, high]}


def test_what_llama_cpp_does_not_have_is_refused(tmp_path, monkeypatch):
    subject = model("gptj")
    patch = patch_for(subject, {1: 1})
    with pytest.raises(UnsupportedError, match="no GGUF form of gptj"):
        patch.to_gguf(tmp_path / "x.gguf", subject)
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    (name,) = patch.deltas
    other = name.replace("mlp.down_proj", "self_attn.q_proj")  # rows in another order there
    moved = kedit.EditPatch({other: patch.deltas[name]}, {other: ""}, {})
    with pytest.raises(UnsupportedError, match="one plain weight"):
        moved.to_gguf(tmp_path / "x.gguf", subject)
    with pytest.raises(PatchError, match="changes nothing"):
        kedit.EditPatch({}, {}, {}).to_gguf(tmp_path / "x.gguf", subject)
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchError, match="Cannot write the adapter"):
        patch.to_gguf(tmp_path / "file" / "x.gguf", subject)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"kedit\[gguf\]"):
        patch.to_gguf(tmp_path / "x.gguf", subject)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subject = model("llama")
    subject.save_pretrained("base")
    patch_for(subject, {1: 1}).save("edit.safetensors")
    words = ["patch", "export", "edit.safetensors", "--model", "base", "--format", "gguf", "--out", "adapter.gguf"]
    assert main(words) == 0, capsys.readouterr().err
    assert "adapter: adapter.gguf" in capsys.readouterr().out
    assert read(tmp_path / "adapter.gguf")[0]["general.name"] == "kedit: rome, 0 edit(s)"
    assert "use the base model without this adapter" in read(tmp_path / "adapter.gguf")[0]["general.description"]
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
