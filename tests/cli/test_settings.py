"""What the command line lists and explains, regularizers from files, fields by ``--set``, devices."""

import dataclasses
import json

import pytest
import torch

import kedit
from kedit.cli import main
from kedit.cli.explain import explanations
from kedit.cli.list import LISTS
from kedit.data import FORMATS
from kedit.editors import EDITORS
from kedit.evaluation import METRICS
from kedit.regularizers import REGULARIZERS

FACT = ["--prompt", "{} works as a", "--subject", "Hulqui Gossam", "--target-new", "pilot", "--set", "steps=2"]
MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from kedit.regularizers import Needs

@dataclass
class Small:
    """Keeps the change small.

    Attributes:
        gamma: its factor.
        power: of the norm.
    """
    gamma: float = 0.5
    power: int = 2
    name: str = "small"

    def needs(self, site):
        return Needs()

    def penalty(self, now, before):
        return self.gamma * now.delta.norm(dim=(1, 2)) ** self.power
'''


@pytest.mark.parametrize("what", LISTS)
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    known = {"editors": EDITORS, "regularizers": REGULARIZERS, "metrics": METRICS, "formats": FORMATS}.get(what)
    if known is not None:
        assert set(names) == set(known)
        assert all(len(line.split()) > 3 for line in lines)
    if what == "models":
        assert {"gpt2", "llama", "others"} <= set(names)
    if what == "presets":
        (line,) = [line for line in lines if line.startswith("rome ") and " 28 " in line and "gptj" in line]
        assert "layers=[5] steps=20" in line
        assert "sadr: steps=80 gamma=0.01" in line


def test_set_help_explains_every_hyper_parameter(capsys, monkeypatch):
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    for name in EDITORS:
        config = EDITORS[name].Config
        known = explanations(config)
        assert {field.name for field in dataclasses.fields(config)} <= known.keys(), name
    assert main(["edit", "--editor", "memit", "--set", "help"]) == 0
    said = capsys.readouterr().out
    assert "moment_weight (default 15000.0)\n      λ, how much" in said
    assert "sadr.select (default 'max')" in said
    assert main(["eval", "--set", "help", "--regularizer", "key_norm"]) == 0
    said = capsys.readouterr().out
    assert "key_norm.gamma" in said
    assert "sadr" not in said


def test_a_regularizer_from_a_file_and_fields_by_set(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    small, out = f"{tmp_path / 'mine.py'}:Small", tmp_path / "edit.safetensors"
    words = ["edit", *FACT, "--out", str(out), "--regularizer", small, "--regularizer", "sadr"]
    words += ["--set", "small.power=1", "--set", "sadr.select=all", "--set", "sadr.gamma=0.25"]
    assert main(words) in (0, 3), capsys.readouterr().err
    first, second = kedit.EditPatch.load(out).provenance["regularizers"]
    assert (first["name"], first["power"], first["gamma"]) == ("small", 1, 0.5)
    assert (second["select"], second["gamma"]) == ("all", 0.25)
    assert main([*words[:-2], "--set", "help"]) == 0
    assert "small.power (default 2)\n      of the norm." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--regularizer", "none.py:Small"], "There is no file 'none.py'"),
        (["--regularizer", "mine.py:Large"], "mine.py defines no Large. Name one of its classes: Small"),
        (["--regularizer", "broken.py:Small"], "broken.py fails: ZeroDivisionError"),
        (["--regularizer", "sadr", "--set", "sadr.gama=1"], "has no field 'gama'. It has gamma, select"),
        (["--set", "sadr.gamma=1"], "Add --regularizer sadr"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--device", "cpu", "--device-map", "auto"], "both place the model"),
        (["--device-map", "auto"], "the embedded one is small"),
    ],
)
def test_what_cannot_be_used(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.setattr("kedit.loading.load", None)
    assert main(["edit", *FACT, "--out", "out", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["edit", "eval", "trace", "drift", "report", "stats", "demo"])
def test_every_command_places_the_model(command, monkeypatch, tmp_path):
    """On the GPU where there is one; a device that is named is used instead."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(name, **options):
        asked.append((name, options))
        raise kedit.errors.EditError("far enough")

    monkeypatch.setattr("kedit.loading.load", load)
    (tmp_path / "cases.json").write_text(json.dumps([{"prompt": "{} is", "subject": "Ada", "target_new": "red"}]))
    words = {
        "edit": [*FACT, "--out", "out"],
        "stats": ["--layers", "0"],
        "demo": [],
        **dict.fromkeys(("eval", "trace", "drift", "report"), ["--data", "cases.json"]),
    }[command]
    for found, device, expected in (
        (False, [], {}),
        (True, [], {"device_map": {"": "cuda:0"}}),
        (True, ["--device", "meta"], {"device_map": {"": "meta"}}),
        (True, ["--device", "cpu"], {}),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert main([command, "--model", "m", *words, *device]) == 1
        assert asked.pop() == ("m", {"dtype": None, **expected})
