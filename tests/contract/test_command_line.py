"""`kedit edit` through main([...]) on a tiny model on disk: exit status, words, files."""

import json
import logging
import re
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch

import kedit
from kedit.cli import main
from kedit.regularizers import REGULARIZERS, Needs
from tiny_models import tiny_model, tokenizer

from .common import ADA, FRENCH, state

DONE = (0, 3)  # exit statuses of an edit that is written, whether or not the model then says it
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
    assert status == 3, err  # two steps are too few
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


@dataclass
class Needy:
    """A regularizer that cannot be made without its γ."""

    gamma: float
    name: str = "needy"

    def needs(self, site):
        return Needs()

    def penalty(self, now, before):
        return self.gamma * now.delta.square().sum((1, 2))


def test_gamma_goes_to_a_regularizer_that_needs_it(place, capsys, monkeypatch):
    monkeypatch.setitem(REGULARIZERS._objects, "needy", Needy)
    assert main(edit(place, "--regularizer", "needy")) == 1
    assert "does not say what Needy(gamma=...) shall be" in capsys.readouterr().err
    assert main(edit(place, "--regularizer", "needy", "--regularizer", "sadr", "--gamma", "0.5")) in DONE
    made = kedit.EditPatch.load(place / "out/edit.safetensors").provenance["regularizers"]
    assert [(one["name"], one["gamma"]) for one in made] == [("needy", 0.5), ("sadr", 0.5)]


def test_memory_is_told_and_nothing_is_edited(place, capsys, monkeypatch):
    monkeypatch.setattr("kedit.editors.base.Editor.apply", None)
    arguments = [word for word in edit(place) if word not in ("--out", str(place / "out/edit.safetensors"))]
    assert main([*arguments, "--memory"]) == 0
    out = capsys.readouterr().out
    model, tok = kedit.load(place / "model")
    moments = kedit.second_moments(model, tok, [1], place / "text.txt")
    assert out == f"memory: {kedit.ROME(model, tok, moments=moments, steps=2, layers=1).estimate_memory(FRENCH)}\n"
    assert re.fullmatch(r"memory: \d+ MiB \(model \d+, .*\)\n", out)
    assert main([*arguments, "--memory", "--journal", str(place / "j")]) == 1
    assert "Drop --journal" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_many_edits_and_the_whole_model(place, capsys):
    path = place / "edits.jsonl"
    path.write_text("\n".join(json.dumps(e.to_dict()) for e in (FRENCH, ADA)))
    target = place / "edited"
    more = ["--edits", str(path), "--save-model", str(target), "--editor", "rrome", "--dtype", "bfloat16"]
    assert main(edit(place, *more, single=False)) in DONE, capsys.readouterr().err
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
    for more in ([], ["--force"]):
        assert main(edit(place, *more)) in DONE
        [(_, delta)] = kedit.EditPatch.load(place / "out/edit.safetensors").deltas.items()
        contents.append(delta.dense)
    assert torch.equal(*contents)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--editor", "roem"], "no editor called 'roem'. Did you mean 'rome'"),
        (["--regularizer", "sard"], "no regularizer called 'sard'. Did you mean 'sadr'"),
        (["--regularizer", "sadr", "--gamma", "-1"], "SADR.gamma"),
        (["--gamma", "1"], "--gamma belongs to a regularizer"),
        (["--set", "layers=7"], "Layer 7 is out of range"),
        (["--set", "step=7"], "no hyper-parameter 'step'"),
        (["--set", "lr=fast"], "lr must be a finite number"),
        (["--set", "steps"], "--set needs KEY=VALUE, found 'steps'"),
        (["--set", "=3"], "--set needs KEY=VALUE"),
        (["--set", "name=3"], "no hyper-parameter 'name'"),
        (["--set", "model=3"], "no hyper-parameter 'model'"),
        (["--set", "moments=3"], "no hyper-parameter 'moments'"),
        (["--set", "contexts=3"], "no hyper-parameter 'contexts'"),
        (["--set", "config=3"], "no hyper-parameter 'config'"),
        (["--set", "layers={1:2}"], "--set layers is a number, a text or a list"),
        (["--set", "layers=[{1:2}]"], "A layer must be a whole number"),
        (["--journal", "j", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--subject", "Ada", "--prompt", "Danielle is"], "neither '{}' nor the subject"),
        (["--target-new", " "], "target_new is empty"),
        (["--prompt", "river " * 128 + "{} is"], "context window holds 128"),
        (["--edits", "edits.jsonl"], "Give either --edits FILE, or"),
        (["--model", "/no/such/folder"], "Cannot load a causal language model"),
        (["--moments-corpus", "no/such.txt"], "There is no file 'no/such.txt'"),
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


@pytest.mark.parametrize("command", ["eval", "drift", "trace", "report"])
def test_more_cases_than_the_world_has(command, capsys, monkeypatch):
    """Said before any model is loaded."""
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    assert main([command, "--cases", "301"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kedit {command}: 301 edits were asked for, but the test half has 300")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["drift", "--patch", "p.safetensors", "--editor", "memit"], "--patch is written already"),
        (["drift", "--patch", "p.safetensors", "--moments-corpus", "x"], "--patch is written already"),
        (["drift", "--editor", "roem"], "Did you mean 'rome'"),
        (["drift", "--set", "moments=3"], "no hyper-parameter 'moments'"),
        (["drift", "--figures", "taken"], "--figures taken is not a folder"),
        (["drift", "--out", "taken/x.json"], "Cannot write taken/x.json"),
        (["trace", "--prompt", "{} is", "--subject", "Ada", "--answer", " "], "--answer is empty"),
        (["trace", "--figures", "taken/x"], "--figures taken/x is not a folder"),
        (["report", "--editor", "roem"], "Did you mean 'rome'"),
        (["report", "--gamma", "3"], "--gamma belongs to a regularizer"),
    ],
)
def test_errors_before_the_work(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith(f"kedit {arguments[0]}: ")
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_report_without_draws_of_noise_edits_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kedit.editors.base.Editor.propose", None)
    assert main(["report", "--cases", "1", "--samples", "0", "--out", str(tmp_path / "r.html")]) == 1
    assert "samples must be a whole number of at least 1, not 0" in capsys.readouterr().err


def test_results_are_written_into_new_folders(tmp_path, capsys):
    quick = ["--cases", "1", "--editor", "ft", "--set", "steps=1"]
    drifted, traced = tmp_path / "new/folder/drift.json", tmp_path / "other/trace.json"
    assert main(["drift", *quick, "--out", str(drifted)]) == 0, capsys.readouterr().err
    fact = ["--prompt", "{} works as a", "--subject", "Hulqui Gossam", "--samples", "1"]
    assert main(["trace", *fact, "--out", str(traced)]) == 0, capsys.readouterr().err
    assert json.loads(drifted.read_text())["probes"]
    assert json.loads(traced.read_text())["facts"]


def test_texts_that_hold_no_text(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["eval", "--cases", "1", "--unedited", "--texts", str(tmp_path / "empty.txt")]) == 1
    assert "empty.txt holds no text" in capsys.readouterr().err


def test_half_a_request(place, capsys):
    arguments = ["--model", str(place / "model"), "--out", str(place / "x")]
    assert main(["edit", *arguments, "--prompt", "{} is"]) == 1
    assert "--prompt, --subject and --target-new" in capsys.readouterr().err
    assert main(["edit", "--prompt", "{} is", "--subject", "Ada", "--target-new", "x"]) == 1
    assert "Give --out FILE" in capsys.readouterr().err
    assert main(["edit", *arguments]) == 1
    assert "Give either --edits FILE" in capsys.readouterr().err


def test_bad_line_of_a_file_is_named(place, capsys):
    path = place / "edits.jsonl"
    path.write_text(json.dumps(FRENCH.to_dict()) + "\n{bad\n")
    assert main(edit(place, "--edits", str(path), single=False)) == 1
    said = capsys.readouterr().err
    assert f"{path}: Record 1 is no edits record" in said
    assert "line 2" in said


@pytest.mark.parametrize(
    "arguments", [[], ["edits"], ["stats"], ["edit", "--out"], ["edit", "--out", "x", "--dtype", "int8"]]
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
        assert main(edit(place)) in DONE
    err = capsys.readouterr().err
    assert any(line.startswith("warning: The second moment of layer") for line in err.splitlines())
    assert warnings.showwarning is shown


def test_quiet_says_only_what_went_wrong(place, capsys):
    assert main(["-q", *edit(place)]) in DONE
    assert "Second moments of layers" not in capsys.readouterr().err


def test_quiet_draws_no_bars(place, capsys):
    """Transformers would draw one for the weights that it reads and one for those that it writes."""
    from transformers.utils.logging import is_progress_bar_enabled

    assert is_progress_bar_enabled()
    more = ["--save-model", str(place / "edited")]
    assert main(edit(place, *more)) in DONE
    assert "it/s" in capsys.readouterr().err
    assert main(["-q", *edit(place, *more, "--force")]) in DONE
    assert capsys.readouterr().err == ""
    assert is_progress_bar_enabled()


@pytest.mark.parametrize("target", ["taken", "taken/inside"])
def test_model_that_cannot_be_written(place, capsys, monkeypatch, target):
    (place / "taken").write_text("a file in the way")
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    assert main(edit(place, "--save-model", str(place / target))) == 1
    assert f"--save-model {place / target} is not a folder" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_patch_that_cannot_be_written(place, capsys):
    (place / "out").write_text("a file in the way")
    assert main(edit(place)) == 1
    assert "kedit edit: " in capsys.readouterr().err
    assert (place / "out").read_text() == "a file in the way"
