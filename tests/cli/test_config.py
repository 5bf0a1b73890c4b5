"""``--config``: options from a file, what goes before it, what it may not hold, and the settings that are written back."""

import json

import pytest
import torch
import yaml

import kedit
from kedit.cli import _parser, main
from kedit.cli.config import MARK, with_config
from kedit.errors import ConfigError

FACT = {"prompt": "{} works as a", "subject": "Hulqui Gossam", "target-new": "pilot"}


def parsed(*words):
    parser = _parser()
    return parser.parse_args(with_config(parser, list(words))[0])


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_command_line_before_file(tmp_path):
    content = {
        "model": "a",
        "regularizer": ["sadr"],
        "set": {"steps": 4, "layers": [3, 4], "sadr": {"gamma": 0.5}},
        "guard": {"kl": 0.1, "perplexity": None},
        "memory": True,
        "force": False,
        "target_new": 1984,
        "gamma": -1,
        "samples": 3,  # of another command
    }
    file = write(tmp_path / "run.yaml", content)
    args = parsed("-q", "edit", "--config", file)
    assert (args.model, args.regularizer, args.target_new, args.gamma, args.quiet) == (
        "a",
        ["sadr"],
        "1984",
        -1.0,
        True,
    )
    assert sorted(args.set) == ["layers=[3, 4]", "sadr.gamma=0.5", "steps=4"]
    assert args.guard == ["kl=0.1", "perplexity=None"]
    assert (args.memory, args.force) == (True, False)
    args = parsed("edit", "--mod", "b", "--regul=key_norm", "--set", "steps=9", f"--config={file}")
    assert (args.model, args.regularizer) == ("b", ["key_norm"])
    assert args.set[-1] == "steps=9"
    (tmp_path / "run.json").write_text(json.dumps({"layers": 3, "tokens": 5}))
    args = parsed("stats", "--config", str(tmp_path / "run.json"))
    assert (args.layers, args.tokens) == ("3", 5)
    args = parsed("patch", "attach", "p", "--config", write(tmp_path / "chat.yaml", "prompt: [x, y]\nchat: true"))
    assert (args.prompt, args.chat, args.patches) == (["x", "y"], True, ["p"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("modle: a", "modle is no option of kedit. Did you mean model?"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
        ("subject: yes", "Put quotes around"),
        ("memory: 3", "memory is on or off"),
        ("model: [a, b]", "model takes one value, found 2"),
        ("model: {a: b}", "takes no names with values"),
    ],
)
def test_files_that_hold_no_options(tmp_path, content, words, capsys):
    file = write(tmp_path / "run.yaml", content)
    with pytest.raises(ConfigError) as error:
        parsed("edit", "--config", file)
    assert words in str(error.value)
    assert main(["edit", "--config", file]) == 1
    assert words in capsys.readouterr().err


def test_the_settings_that_are_written_back_make_the_same_patch(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run.yaml", {**FACT, "regularizer": "sadr", "set": {"steps": 3}, "out": "first.safetensors"})
    assert main(["edit", "--config", "run.yaml"]) in (0, 3), capsys.readouterr().err
    assert "settings: first.config.yaml" in capsys.readouterr().out
    text = (tmp_path / "first.config.yaml").read_text()
    assert text.startswith(f"{MARK} {kedit.__version__}: the settings of `kedit edit`.")
    kept = yaml.safe_load(text)
    patches = [kedit.EditPatch.load("first.safetensors")]
    used = patches[0].provenance["config"]
    assert {key: kept["set"][key] for key in used} == used  # those of the preset too
    assert kept["set"]["sadr.gamma"] == patches[0].provenance["regularizers"][0]["gamma"]
    monkeypatch.setattr("kedit.editors.presets.find", lambda *_: None)  # as if another version had other presets
    assert main(["edit", "--config", "first.config.yaml", "--out", "again.safetensors"]) in (0, 3)
    patches.append(kedit.EditPatch.load("again.safetensors"))
    (one, other) = ([delta.dense for delta in patch.deltas.values()] for patch in patches)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_file_that_kedit_did_not_write_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    own = write(tmp_path / "edit.config.yaml", FACT)
    for command in (
        ["edit", "--config", own, "--out", "edit.safetensors"],
        ["drift", "--out", "edit.json"],
        ["report", "--out", "edit.html"],
    ):
        assert main([*command, "--force"]) == 1
        assert "is not a file that kedit wrote" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "edit.config.yaml").read_text()) == FACT


def test_settings_of_an_evaluation_and_a_tracing(tmp_path, capsys):
    run, traced = tmp_path / "run", tmp_path / "traced.json"
    for _ in range(2):  # the second time it goes on
        words = ["eval", "--cases", "1", "--editor", "ft", "--set", "steps=1", "--out", str(run)]
        assert main(words) == 0, capsys.readouterr().err
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["editor"], kept["cases"], kept["mode"], kept["set"]["steps"]) == ("ft", 1, "single", 1)
    assert main(["trace", "--cases", "1", "--samples", "1", "--out", str(traced)]) == 0
    assert yaml.safe_load((tmp_path / "traced.config.yaml").read_text())["samples"] == 1
