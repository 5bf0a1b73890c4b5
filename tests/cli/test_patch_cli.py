"""kedit patch on the command line: the same as the API, errors in one sentence."""

import json
import os
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from kedit.cli import main
from kedit.patch import EditPatch
from patch_common import bytes_of, logits, patch_for, save_checkpoint
from tiny_models import tiny_model as model
from tiny_models import tokenizer


@pytest.fixture
def here(tmp_path):
    """A folder with a base checkpoint and two patches, the second made for the model with the first."""
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32)
    first = patch_for(subject, {1: 1}, provenance={"editor": "rome", "edits": [{"prompt": "{} is", "subject": "Ünï"}]})
    first.save(tmp_path / "1.safetensors")
    first.apply(subject)
    second = patch_for(subject, {1: 2, 2: 1}, seed=3)
    second.save(tmp_path / "2.safetensors")
    second.apply(subject)
    return tmp_path, subject


def run(capsys, *words):
    """Run ``kedit patch`` and return its status, output and errors."""
    capsys.readouterr()
    status = main(["patch", *map(str, words)])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("kedit patch:")]
    return status, said.out, errors


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_show(here, capsys):
    folder, _ = here
    status, text, _ = run(capsys, "show", folder / "1.safetensors")
    assert status == 0
    assert text.strip() == EditPatch.load(folder / "1.safetensors").show()
    status, text, _ = run(capsys, "show", folder / "2.safetensors", "--json")
    assert status == 0
    found = json.loads(text)
    assert [item["rank"] for item in found["weights"]] == [2, 1]
    assert found["provenance"]["editor"] == "rome"


ODD = [
    {"editor": "\ud800"},
    {"editor": "x\n\x1b[2J\x1b[31mweights: none"},
    {"model": {"name": "\x9b2J\u202e\ud800"}},
    {"scores": {"\ud800": "\r\x07"}},
    {"note": "\U000e0041 ж"},
    {"edits": [{"prompt": "\x1b]0;{}", "subject": "\x1b\n", "target_new": "\ud800"}]},
]


@pytest.mark.parametrize("known", ODD, ids=ascii)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_show_prints_what_others_wrote_and_does_nothing_of_it(tmp_path, capfdbinary, known, more):
    path = patch_for(model("llama"), {1: 1}, provenance=known).save(tmp_path / "p")
    assert main(["patch", "show", str(path), *more]) == 0
    text = capfdbinary.readouterr().out.decode()  # bytes: as in a terminal, no character may be impossible
    assert all(char.isprintable() or char == "\n" for char in text)
    if more:
        assert json.loads(text)["provenance"] == known
    else:
        plain = patch_for(model("llama"), {1: 1}, provenance={}).show()
        extra = {"scores": 2, "edits": 1}.get(next(iter(known)), 0)
        assert text.count("\n") == plain.count("\n") + 1 + extra


def test_apply_and_revert(here, capsys):
    folder, edited = here
    patches = ["--patch", folder / "1.safetensors", "--patch", folder / "2.safetensors"]
    status, text, _ = run(capsys, "apply", folder / "base", *patches, "--out", folder / "edited", "--link")
    assert status == 0
    assert "rewritten" in text
    assert bytes_of(loaded(folder / "edited")) == bytes_of(edited)
    words = ["revert", folder / "edited", "--base", folder / "base", *patches, "--out", folder / "back"]
    assert run(capsys, *words)[0] == 0
    assert bytes_of(loaded(folder / "back")) == bytes_of(loaded(folder / "base"))


def test_one_of_several_is_taken_away(here, capsys):
    folder, _ = here
    one, two = folder / "1.safetensors", folder / "2.safetensors"
    run(capsys, "apply", folder / "base", "--patch", one, "--patch", two, "--out", folder / "both")
    words = ["revert", folder / "both", "--base", folder / "base", "--patch", one, "--out"]
    status, text, errors = run(capsys, *words, folder / "second")
    assert (status, errors) == (0, [])
    assert "patches on it: 1" in text
    run(capsys, "apply", folder / "base", "--patch", two, "--out", folder / "fresh", "--force")
    assert bytes_of(loaded(folder / "second")) == bytes_of(loaded(folder / "fresh"))
    for path in (folder / "both/kedit-patches").iterdir():
        path.unlink()
    for force in ([], ["--force"]):
        status, _, (error,) = run(capsys, *words, folder / "third", *force)
        assert status == 1
        assert "On record there: rome (no edits named)" in error
        assert "--drop-others" in error
    status, text, _ = run(capsys, *words, folder / "third", "--drop-others")
    assert status == 0
    assert "lost: rome (no edits named)" in text


def test_merge_then_apply_is_apply_twice(here, capsys):
    folder, edited = here
    words = ["merge", folder / "1.safetensors", folder / "2.safetensors", "--out", folder / "both.safetensors"]
    status, text, _ = run(capsys, *words)
    assert status == 0
    assert "merged from 2" in text
    words = ["apply", folder / "base", "--patch", folder / "both.safetensors", "--out", folder / "edited"]
    assert run(capsys, *words)[0] == 0
    assert bytes_of(loaded(folder / "edited")) == bytes_of(edited)
    words = ["merge", folder / "1.safetensors", folder / "2.safetensors", "--tolerance", 0.99, "--out", folder / "m"]
    assert run(capsys, *words)[0] == 0
    assert [delta.rank for delta in EditPatch.load(folder / "m").deltas.values()] == [1, 1]


def test_diff(here, capsys):
    folder, _ = here
    run(capsys, "apply", folder / "base", "--patch", folder / "1.safetensors", "--out", folder / "edited")
    status, _, _ = run(capsys, "diff", folder / "base", folder / "edited", "--out", folder / "diff.safetensors")
    assert status == 0
    found, known = EditPatch.load(folder / "diff.safetensors"), EditPatch.load(folder / "1.safetensors")
    assert found.fingerprints == known.fingerprints
    for name, delta in known.deltas.items():
        assert torch.allclose(found.deltas[name].dense, delta.dense, rtol=0, atol=2e-6)


def test_export_needs_only_the_configuration(here, capsys):
    peft = pytest.importorskip("peft")
    folder, _ = here
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    words = ["export", folder / "1.safetensors", "--model", folder / "config", "--out", folder / "adapter"]
    assert run(capsys, *words)[0] == 0
    config = peft.PeftConfig.from_pretrained(folder / "adapter")
    assert config.r == 1
    edited = loaded(folder / "base")
    EditPatch.load(folder / "1.safetensors").apply(edited)
    adapted = peft.PeftModel.from_pretrained(loaded(folder / "base"), folder / "adapter")
    assert torch.allclose(logits(adapted), logits(edited), rtol=0, atol=1e-5)


def test_errors_are_one_sentence_and_leave_nothing(here, capsys):
    folder, _ = here
    tokenizer().save_pretrained(folder / "base")
    (folder / "empty").write_bytes(b"")
    before = sorted(os.listdir(folder))
    one, two, out = folder / "1.safetensors", folder / "2.safetensors", folder / "out"
    for words in (
        ["show", folder / "none"],
        ["show", folder / "empty"],
        ["show", folder / "base"],
        ["merge", one, two, "--out", two],
        ["attach", two, "--model", folder / "base", "--prompt", "The"],
        ["attach", one, "--model", folder / "base", "--prompt", "The", "--tokens", 0],
        ["attach", one, "--model", folder / "base", "--prompt", ""],
        ["attach", one, "--model", folder / "base", "--prompt", "The river " * 500],
        ["attach", one, "--model", folder / "base", "--prompt", "The", "--tokens", 5000],
        ["apply", folder / "base", "--patch", two, "--out", out],
        ["apply", folder / "base", "--patch", folder / "empty", "--out", out],
        ["apply", folder / "none", "--patch", one, "--out", out],
        ["apply", folder / "base", "--patch", one, "--out", folder / "base"],
        ["revert", folder / "base", "--base", folder / "base", "--patch", one, "--out", out],
        ["merge", one, folder / "empty", "--out", out],
        ["merge", one, "--tolerance", 2, "--out", out],
        ["diff", folder / "base", folder / "base", "--out", out],
        ["diff", folder / "base", folder / "none", "--out", out],
        ["export", one, "--model", folder / "none", "--out", out],
    ):
        status, text, errors = run(capsys, *words)
        assert (status, text, len(errors)) == (1, "", 1), words
    assert sorted(os.listdir(folder)) == before


def test_errors_do_nothing_in_a_terminal(here, capsys):
    folder, _ = here
    (folder / "odd\x1b[2J").write_text("x")
    for words in (["show", folder / "odd\x1b[2J"], ["show", folder / "none\x1b]0;\x07"]):
        assert main(["patch", *map(str, words)]) == 1
        said = capsys.readouterr().err
        assert "\\x1b" in said
        assert "\x1b" not in said


def test_force_is_explicit(here, capsys):
    folder, _ = here
    words = ["apply", folder / "base", "--patch", folder / "2.safetensors", "--out", folder / "out"]
    status, _, (error,) = run(capsys, *words)
    assert status == 1
    assert "--force" in error
    assert run(capsys, *words, "--force")[0] == 0


def test_messages_say_a_thing_once(here, capsys):
    folder, _ = here
    for wrong, said in (("none", "There is no file"), ("base", "is a folder")):
        _, _, (error,) = run(capsys, "show", folder / wrong)
        assert error.count(str(folder / wrong)) == 1
        assert said in error


def test_attach_shows_what_the_patches_together_would_change(here, capsys):
    folder, edited = here
    tokenizer().save_pretrained(folder / "base")
    patches = [folder / "1.safetensors", folder / "2.safetensors"]
    before = bytes_of(loaded(folder / "base"))
    words = [
        "attach",
        *patches,
        "--model",
        folder / "base",
        "--prompt",
        "The river",
        "--prompt",
        "Paris",
        "--tokens",
        5,
    ]
    status, text, _ = run(capsys, *words)
    assert status == 0
    said = re.findall(r"(?m)^(.*)\n  without: (.*)\n  with:    (.*)$", text)
    assert [prompt for prompt, _, _ in said] == ["The river", "Paris"]
    for prompt, without, changed in said:
        for subject, text in ((loaded(folder / "base"), without), (edited, changed)):
            ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
            found = subject.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert text == repr(tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    assert any(without != changed for _, without, changed in said)
    assert bytes_of(loaded(folder / "base")) == before


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit):
        run(capsys)
