"""kedit.load with GGUF files: de-quantized to a model as any other, and a sentence where that cannot be."""

import importlib.util
import random
import shutil

import pytest
import torch

import kedit
from gguf_files import CHAT_TEMPLATE, write_gguf
from kedit.cli import main
from kedit.errors import ArchitectureError, ConfigError, DependencyError, KEditError, PatchError
from kedit.models.fingerprint import model_fingerprint
from tiny_models import tokenizer

TEXTS = ["Ada Lovelace works in 東京  now.", " a\tb", "x's -- 1984!<|endoftext|>"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def as_saved(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return kedit.load(folder)


def test_a_file_and_its_converted_folder_are_one_model(file, tmp_path):
    model, tok = kedit.load(str(file))
    assert model.dtype == torch.float32
    assert not model.training
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None
    other, saved = as_saved(model, tok, tmp_path / "folder")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert model_fingerprint(other) == model_fingerprint(model)
    assert tok(TEXTS)["input_ids"] == saved(TEXTS)["input_ids"] == tokenizer()(TEXTS)["input_ids"]
    assert tok.chat_template == saved.chat_template == CHAT_TEMPLATE
    assert (tok.eos_token, tok.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_blocks_of_integers_are_unpacked(file, tmp_path):
    model, _ = kedit.load(file)
    plain, _ = kedit.load(write_gguf(tmp_path / "plain.gguf", quantized=False))
    for name, weight in plain.state_dict().items():
        found = model.state_dict()[name]
        if ".mlp." in name:  # 8 bits and a scale for 32 numbers
            assert not torch.equal(found, weight)
            assert (found - weight).abs().max() <= weight.abs().max() / 127
        else:
            assert torch.equal(found, weight)


def test_dtype_as_asked(file):
    model, _ = kedit.load(file, dtype=torch.bfloat16)
    whole, _ = kedit.load(file)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(w, whole.state_dict()[n].bfloat16()) for n, w in model.state_dict().items())


def test_an_edit_of_a_gguf_model_fits_the_converted_folder(file, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    model, tok = kedit.load(file)
    other, _ = as_saved(model, tok, tmp_path / "folder")
    before = model_fingerprint(model)
    edit = kedit.Edit("{} works in the old city of", "Ada Lovelace", "Berlin")
    result = kedit.ROME(model, tok, steps=2, moments={1: torch.eye(96)}, layers=(1,)).apply(edit)
    result.patch.apply(other)
    assert model_fingerprint(other) == model_fingerprint(model) != before
    assert result.patch.provenance["model"]["name"] == "tiny.gguf"
    result.revert()
    assert model_fingerprint(model) == before


def test_folders(file, tmp_path):
    shutil.copy(file, tmp_path / "one.gguf")
    assert kedit.load(tmp_path)[0].config.num_hidden_layers == 5
    (tmp_path / "config.json").write_text("{}")  # as a repository on the hub may have beside GGUF files
    assert kedit.load(tmp_path)[0].config.num_hidden_layers == 5
    shutil.copy(file, tmp_path / "two.gguf")
    with pytest.raises(
        ArchitectureError, match=r"holds 2 GGUF files: one\.gguf, two\.gguf\. Give the path of one of them\."
    ):
        kedit.load(tmp_path)
    assert kedit.load(tmp_path, gguf_file="two.gguf")[1].chat_template == CHAT_TEMPLATE


def test_paths_in_the_working_folder_and_at_home(file, tmp_path, monkeypatch):
    shutil.copy(file, tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tiny.gguf", "./tiny.gguf", "~/tiny.gguf"):
        assert kedit.load(name)[0].config.num_hidden_layers == 5


def test_without_the_package(file, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a))
    with pytest.raises(DependencyError, match=r"needs the package gguf.*pip install \"kedit\[gguf\]\""):
        kedit.load(file)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"architecture": "wonder"}, "wonder"),
        ({"with_tokenizer": False}, "its tokenizer is missing or cannot be read"),
        ({"tensors": False}, "hold no weights for"),
    ],
)
def test_files_that_make_no_model(tmp_path, made, words):
    with pytest.raises(ArchitectureError, match=words) as error:
        kedit.load(write_gguf(tmp_path / "tiny.gguf", **made))
    assert str(error.value).endswith("or a folder written by save_pretrained.")


def test_damaged_files(file, tmp_path):
    content, path = file.read_bytes(), tmp_path / "damaged.gguf"
    chosen = random.Random(0)
    for length in (0, 3, 4, 20, 100, *(chosen.randrange(len(content)) for _ in range(6)), len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(ArchitectureError, match=r"Cannot load .*damaged\.gguf"):
            kedit.load(path)
    for place in (0, 4, 8, 16, 24, 40, 60, 100):
        path.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
        with pytest.raises(KEditError):
            kedit.load(path)


def test_one_part_of_several(file, tmp_path):
    shutil.copy(file, tmp_path / "tiny-00001-of-00002.gguf")
    with pytest.raises(ArchitectureError, match="one part of a GGUF model"):
        kedit.load(tmp_path)


def test_command_line(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("The capital of France is Paris. The river is long.\n\n" * 40)
    words = ["--prompt", "{} works in the old city of", "--subject", "Ada Lovelace", "--target-new", "Berlin"]
    where = ["--model", str(file), "--moments-corpus", str(tmp_path / "text.txt"), "--set", "steps=2"]
    patch, folder = str(tmp_path / "edit.safetensors"), str(tmp_path / "edited")
    assert main(["edit", *where, *words, "--out", patch, "--save-model", folder]) in (
        0,
        3,
    )  # 3: two steps do not say it
    assert kedit.load(folder)[1].chat_template == CHAT_TEMPLATE
    capsys.readouterr()
    assert main(["patch", "apply", str(file), "--patch", patch, "--out", str(tmp_path / "out")]) == 1
    assert "is a GGUF file" in capsys.readouterr().err


def test_checkpoints_on_disk_are_no_gguf(file):
    from kedit.patch.checkpoint.read import Checkpoint

    for place in (file, file.parent):
        with pytest.raises(PatchError, match=r"GGUF.*kedit\.load.*save_pretrained"):
            Checkpoint.open(place)


def test_embedded_model_takes_no_file():
    with pytest.raises(ConfigError, match="gguf_file cannot be given"):
        kedit.load(gguf_file="tiny.gguf")
