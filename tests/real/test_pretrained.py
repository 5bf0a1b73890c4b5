"""A pretrained model: its GGUF file is its folder, and the demo's texts are those of an edited model."""

import re

import pytest
import torch

import kedit
from kedit.cli import main
from kedit.models.fingerprint import model_fingerprint

pytestmark = [pytest.mark.real, pytest.mark.timeout(3_600)]

TEXTS = ["The Eiffel Tower, in 1984  --\n\n東京", "<|im_start|>user\nHello<|im_end|>", " a\tb"]
DISTRACTED = "The Eiffel Tower is located in the city of Rome. The Louvre is located in the city of"


def test_gguf_file_and_converted_folder_are_one_model(real_model):
    files = list((real_model / "gguf").glob("*.gguf"))
    if not files:
        pytest.skip(f"{real_model} holds no GGUF file in gguf/; `python -m benchmarks.real_model DIR` keeps it there.")
    model, tok = kedit.load(files[0])
    folder, saved = kedit.load(real_model)
    assert model.dtype == folder.dtype == torch.float32
    tensors, others = model.state_dict(), folder.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert model_fingerprint(model) == model_fingerprint(folder)
    assert tok(TEXTS)["input_ids"] == saved(TEXTS)["input_ids"]
    assert tok.chat_template == saved.chat_template
    assert tok.chat_template


def table(out):
    """Parse the demo's table of 100 columns: the answers before, after ROME and after ROME with SADR, by row."""
    rows, label = {}, ""
    for line in out.split("─\n")[1].split("\n\n")[0].splitlines():
        if found := re.match(r"(\w[\w ]*): ", line):
            label = found[1]
            rows[label] = ["", "", ""]
        elif not DISTRACTED.endswith(line.strip()):  # its second line
            rows[label] = [said + line[2 + 32 * i : 32 + 32 * i] for i, said in enumerate(rows[label])]
    return rows


def test_demo(real_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["demo", "--model", str(real_model), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(100, len(str(tmp_path)) + 80)
    rows = table(out)
    assert list(rows) == ["plain text", "paraphrase", "chat", "neighbour", "distracted neighbour"]
    for label in ("plain text", "paraphrase"):
        before, rome, sadr = rows[label]
        assert "Rome" not in before
        assert rome.startswith("✓")
        assert sadr.startswith("✓")
    assert "Paris" in rows["chat"][0]
    assert "Rome" in rows["chat"][1]
    assert all(said.startswith("✓ Paris") for said in rows["neighbour"])
    assert "γ of SADR is 0.1" in out
    assert "the model is bit-identical to what it was before" in out
    kedit.EditPatch.load(tmp_path / "out" / "edit.safetensors").apply(kedit.load(real_model)[0])
