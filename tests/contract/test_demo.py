"""`kedit demo` on the embedded model and on a model of the user's: texts, files, and options that do not fit."""

import sys

import pytest
from transformers import PreTrainedTokenizerFast

import kedit
from gguf_files import write_gguf
from kedit.cli import demo, main
from tiny_models import tiny_model, tokenizer

OWN = ["--prompt", "{} works in the old city of", "--subject", "Ada Lovelace", "--target-new", "Berlin"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, a cache of its own, and few tokens for the second moments."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(demo, "KEYS_PER_DIMENSION", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(folder, tok: PreTrainedTokenizerFast):
    tiny_model("gpt2").save_pretrained(folder)
    tok.save_pretrained(folder)


def test_embedded_model(place, capsys):
    assert main(["demo", "--case", "10"]) == 0
    out = capsys.readouterr().out
    rows = out.split("distracted: ")[1].splitlines()
    assert rows[1].count("✓") == 2  # before, and with SADR
    assert "bit-identical" in out
    assert max(map(len, out.splitlines())) <= 100
    assert (place / "kedit-demo/attention.png").stat().st_size > 10_000


def test_gguf_file_with_a_chat_template(place, capsys):
    write_gguf(place / "tiny.gguf")
    assert main(["demo", "--model", "tiny.gguf", "--out", "out"]) == 0
    out = capsys.readouterr().out
    asked = (
        "plain text: The Eiffel Tower is located",
        "paraphrase: To see",
        "chat: In which",
        "neighbour: The Louvre is",
    )
    assert [out.count(f"\n{line}") for line in asked] == [1, 1, 1, 1]
    assert "distracted neighbour: The Eiffel Tower is located in the city of Rome. The Louvre is" in out
    assert "come from the embedded model's text" in out
    assert max(map(len, out.splitlines())) <= 100
    patch = kedit.EditPatch.load("out/edit.safetensors")
    assert patch.provenance["regularizers"][0]["gamma"] is None
    patch.apply(kedit.load("tiny.gguf")[0])


def test_an_edit_of_ones_own_without_template_and_picture(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save(place / "model", tokenizer())
    (place / "text.txt").write_text("The capital of France is Paris. The river is long.\n\n" * 40)
    given = [*OWN, "--neighbour", "The painter works in the old city of", "--question", "Where does Ada Lovelace work?"]
    assert main(["demo", "--model", "model", *given, "--gamma", "0.5", "--moments-corpus", "text.txt"]) == 0
    out, err = capsys.readouterr()
    assert "plain text: Ada Lovelace works in the old city of" in out
    assert "distracted neighbour: Ada Lovelace works in the old city of Berlin. The painter works in" in out
    assert "no chat template, so the question is left out" in out
    assert "Left out, as the edit is your own: --paraphrase." in out
    assert "γ of SADR is" not in out
    assert "embedded" not in out
    assert "matplotlib is not installed" in err
    assert kedit.EditPatch.load("kedit-demo/edit.safetensors").provenance["regularizers"][0]["gamma"] == 0.5


def test_a_chat_template_that_fails(place, capsys):
    tok = tokenizer()
    tok.chat_template = "{{ raise_exception('no such turn') }}"
    save(place / "model", tok)
    assert main(["demo", "--model", "model"]) == 1
    assert "chat template fails (no such turn)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--gamma", "1"], "--gamma can be given with --model"),
        (["--prompt", "{} is", "--neighbour", "x"], "--prompt, --neighbour can be given with --model"),
        (["--model", "./none", "--case", "3"], "--case is a fact of the embedded model"),
        (["--case", "100"], "a number from 0 to 99"),
        (["--model", "./none"], "there is no such file or folder"),
        (["--model", "./none", "--subject", " "], "Edit.subject is empty"),
        (["--model", "./none", "--prompt", "no slot"], "holds neither"),
        (["--out", "/dev/null/x"], "--out /dev/null/x is not a folder"),
    ],
)
def test_what_does_not_fit(given, words, capsys):
    assert main(["demo", *given]) == 1
    assert words in capsys.readouterr().err
