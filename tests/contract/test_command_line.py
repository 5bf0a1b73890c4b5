"""`kedit edit` through main([...]) on a tiny model on disk: exit status, words, files."""

import json
import logging
import sys
import warnings

import pytest
import torch

import kedit
from kedit.cli import main
from models import tiny_model, tokenizer

from .common import ADA, FRENCH, state

TEXT = "The capital of France is Paris. It was a cold morning, and the river is long.\n\n" * 60


@pytest.fixture(autouse=True)
def quiet_process(tmp_path, monkeypatch):
    """A cache of its own, no data sets package, and logging as it was."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    level, handlers = logging.getLogger("kedit").level, logging.getLogger().handlers[:]
    yield
    logging.getLogger("kedit").setLevel(level)
    logging.getLogger().handlers[:] = handlers


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny model and a text for the second moments."""
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def edit(place, *more, single=True):
    """The arguments of a quick edit."""
    request = ["--prompt", FRENCH.prompt, "--subject", FRENCH.subject, "--target-new", FRENCH.target_new]
    common = ["--model", str(place / "model"), "--moments-corpus", str(place / "text.txt"), "--set", "steps=2"]
    return ["edit", *common, *(request if single else []), "--out", str(place / "out/edit.safetensors"), *more]


def test_one_edit_end_to_end(place, capsys):
    status = main(edit(place, "--set", "layers=2", "--regularizer", "sadr", "--gamma", "0.25"))
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "rome with sadr: 1 edit(s)" in out
    assert "The mother tongue of Danielle Darrieux is → English" in out
    assert f"patch: {place / 'out/edit.safetensors'}" in out
    patch = kedit.EditPatch.load(place / "out/edit.safetensors")
    assert list(patch.deltas) == ["transformer.h.2.mlp.c_proj.weight"]
    assert patch.provenance["edits"] == [FRENCH.to_dict()]
    assert patch.provenance["config"]["steps"] == 2
    assert patch.provenance["regularizers"][0]["gamma"] == 0.25
    model, _ = kedit.load(place / "model")
    before = state(model)
    patch.apply(model)
    assert state(model) != before
    patch.revert(model)
    assert state(model) == before


def test_many_edits_and_the_whole_model(place, capsys):
    path = place / "edits.jsonl"
    path.write_text("\n".join(json.dumps(e.to_dict()) for e in (FRENCH, ADA)))
    target = place / "edited"
    more = ["--edits", str(path), "--save-model", str(target), "--editor", "rrome", "--dtype", "bfloat16"]
    assert main(edit(place, *more, single=False)) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "rrome: 2 edit(s)" in out
    assert f"model: {target}" in out
    edited, tok = kedit.load(target)
    assert edited.dtype == torch.bfloat16
    base, _ = kedit.load(place / "model", dtype=torch.bfloat16)
    kedit.EditPatch.load(place / "out/edit.safetensors").apply(base)
    assert state(base)["weights"] == state(edited)["weights"]
    assert tok("Ada works")["input_ids"] == tokenizer()("Ada works")["input_ids"]


def test_the_same_command_gives_the_same_patch(place):
    contents = []
    for _ in range(2):
        assert main(edit(place)) == 0
        [(_, delta)] = kedit.EditPatch.load(place / "out/edit.safetensors").deltas.items()
        contents.append(delta.dense)
    assert torch.equal(*contents)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--editor", "roem"], "no editor called 'roem'. Did you mean 'rome'"),
        (["--regularizer", "sard"], "no regularizer called 'sard'. Did you mean 'sadr'"),
        (["--regularizer", "sadr"], "γ"),
        (["--regularizer", "sadr", "--gamma", "-1"], "SADR.gamma"),
        (["--gamma", "1"], "--gamma belongs to a regularizer"),
        (["--set", "layers=7"], "Layer 7 is out of range"),
        (["--set", "step=7"], "no hyper-parameter 'step'"),
        (["--set", "lr=fast"], "lr must be a finite number"),
        (["--set", "steps"], "--set needs KEY=VALUE, found 'steps'"),
        (["--set", "=3"], "--set needs KEY=VALUE"),
        (["--subject", "Ada", "--prompt", "Danielle is"], "neither '{}' nor the subject"),
        (["--target-new", " "], "target_new is empty"),
        (["--prompt", "river " * 128 + "{} is"], "context window holds 128"),
        (["--edits", "edits.jsonl"], "Give either --edits FILE, or"),
        (["--model", "/no/such/folder"], "Cannot load a causal language model"),
        (["--moments-corpus", "no/such.txt"], "'no/such.txt' is no file"),
    ],
)
def test_errors_are_one_sentence_and_status_one(place, capsys, change, words):
    assert main(edit(place, *change)) == 1
    out, err = capsys.readouterr()
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("kedit edit: ")
    assert "Traceback" not in err
    assert "patch:" not in out
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def test_half_a_request(place, capsys):
    arguments = ["--model", str(place / "model"), "--out", str(place / "x")]
    assert main(["edit", *arguments, "--prompt", "{} is"]) == 1
    assert "--prompt, --subject and --target-new" in capsys.readouterr().err
    assert main(["edit", *arguments]) == 1
    assert "Give either --edits FILE" in capsys.readouterr().err


def test_bad_line_of_a_file_is_named(place, capsys):
    path = place / "edits.jsonl"
    path.write_text(json.dumps(FRENCH.to_dict()) + "\n{bad\n")
    assert main(edit(place, "--edits", str(path), single=False)) == 1
    assert f"{path}, line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["edits"], ["edit"], ["edit", "--out"], ["edit", "--out", "x", "--dtype", "int8"]]
)
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: kedit" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kedit {kedit.__version__}\n"


def test_interruption_is_status_130_and_writes_nothing(place, capsys, monkeypatch):
    from kedit.editors.rome import ROME

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ROME, "solve", interrupted)
    assert main(edit(place)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def test_warnings_are_lines_and_the_process_keeps_its_own(place, capsys):
    (place / "text.txt").write_text("Too little text.")
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(edit(place)) == 0
    err = capsys.readouterr().err
    assert any(line.startswith("warning: The second moment of layer") for line in err.splitlines())
    assert warnings.showwarning is shown


def test_quiet_says_only_what_went_wrong(place, capsys):
    assert main(["-q", *edit(place)]) == 0
    assert "Second moments of layers" not in capsys.readouterr().err


def test_patch_that_cannot_be_written(place, capsys):
    (place / "out").write_text("a file in the way")
    assert main(edit(place)) == 1
    assert "kedit edit: " in capsys.readouterr().err
    assert (place / "out").read_text() == "a file in the way"
