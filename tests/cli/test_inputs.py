"""What the command line reads: each message says what a file is and what would be taken, and other models' settings do no harm."""

import json
import socket
import sys
import time

import pytest

import kedit
from kedit.cli import main
from kedit.edit import Edit
from kedit.errors import EditError
from patch_common import patch_for
from tiny_models import tiny_model, tokenizer

DONE = (0, 3)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of many kinds, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    patch_for(tiny_model("llama"), {1: 1}).save("patch.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    (tmp_path / "text.csv").write_text("It was a cold day.\nIt rained.\n")
    (tmp_path / "table.csv").write_text("prompt,subject,target_new\n{} is,Ada,red\n")
    (tmp_path / "table.jsonl").write_text("prompt,subject,target_new\n{} is,Ada,red\n")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (tmp_path / "list.json").write_text(json.dumps([[1, 2], [3]]))
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "other.json").write_text(json.dumps([{"question": "?", "answer": "!"}]))
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": "{} is", "subject": "Ada", "target_new": "red"}]))
    (tmp_path / "wrong.json").write_text(json.dumps([{"edit": [], "probes": [3]}]))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.jsonl", "There is no file 'none.jsonl'"),
        ("table.csv", "a table (CSV) beginning with 'prompt,subject,target_new'"),
        ("table.jsonl", "a table (CSV) beginning with"),
        ("patch.safetensors", "is a safetensors file"),
        ("model.gguf", "is a GGUF model"),
        ("latin.jsonl", "is not text in UTF-8"),
        ("edits.json", "one object per line"),
        ("folder", "is a folder"),
        ("number.json", "not 3"),
    ],
)
def test_files_that_hold_no_edits(files, capsys, name, words):
    with pytest.raises(EditError) as error:
        Edit.from_jsonl(name)
    assert words in str(error.value)
    if name in ("table.csv", "table.jsonl", "edits.json"):  # the command line takes these
        return
    words = "holds 3 alone" if name == "number.json" else words
    assert main(["edit", "--edits", name, "--out", "out"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "char 0" not in said
    assert "Errno" not in said
    assert '"target_new"' in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.json", "There is no file 'none.json'"),
        ("text.csv", "the fields It was a cold day"),
        ("patch.safetensors", "is a safetensors file"),
        ("model.gguf", "is a GGUF model"),
        ("list.json", "'[1, 2]', not an object with fields"),
        ("number.json", "holds 3 alone"),
        ("other.json", "the fields answer, question"),
        ("wrong.json", "probes are a list of objects"),
        ("folder", "is a folder"),
    ],
)
def test_files_that_hold_no_cases(files, capsys, name, words):
    for command in (
        ["eval"],
        ["edit", "--prompt", "{} is", "--subject", "a", "--target-new", "b", "--out", "o", "--guard"],
    ):
        option = "--data" if command == ["eval"] else "--guard-cases"
        assert main([*command, option, name]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert "attribute" not in said
        assert "char 0" not in said


@pytest.mark.parametrize("name", ["none.txt", "model.gguf", "patch.safetensors"])
def test_files_that_hold_no_text(files, capsys, name):
    tiny_model("gpt2").save_pretrained("model")
    tokenizer().save_pretrained("model")
    words = ["--model", "model", "--prompt", "{} is", "--subject", "Ada", "--target-new", "red", "--out", "out"]
    assert main(["edit", *words, "--moments-corpus", name]) == 1
    said = capsys.readouterr().err
    assert {"none.txt": "There is no file", "model.gguf": "a GGUF model"}.get(name, "a safetensors file") in said
    assert "text or JSONL" in said


@pytest.mark.parametrize("what", ["model", "corpus", "data"])
def test_without_network_the_error_comes_at_once(files, capsys, monkeypatch, what):
    """Also where the datasets package is there, which would try again for half a minute."""

    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise AssertionError("asked for a data set without network")

    def unknown(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    monkeypatch.setattr(socket, "create_connection", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    tiny_model("gpt2").save_pretrained("model")
    tokenizer().save_pretrained("model")
    edit = ["edit", "--prompt", "{} is", "--subject", "Ada", "--target-new", "red", "--out", "out"]
    words = {
        "model": [*edit, "--model", "nobody/nothing"],
        "corpus": [*edit, "--model", "model"],
        "data": ["eval", "--data", "nobody/nothing"],
    }[what]
    start = time.perf_counter()
    assert main(words) == 1
    assert "the Hugging Face hub cannot be reached" in capsys.readouterr().err
    assert time.perf_counter() - start < 20  # most of it imports


@pytest.fixture
def odd(files):
    """A model whose generation settings ask for dictionaries and samples, and whose tokenizer gives more than a model takes."""
    model = tiny_model("llama")
    model.save_pretrained("odd")
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    (files / "odd/generation_config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained("odd")
    config = json.loads((files / "odd/tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (files / "odd/tokenizer_config.json").write_text(json.dumps(config))
    loaded, found = kedit.load("odd")
    assert "token_type_ids" in found("Ada")
    patch_for(loaded, {1: 1}).save("odd.safetensors")
    return ["patch", "attach", "odd.safetensors", "--model", "odd"]


def test_attach_on_a_model_of_other_settings(odd, capsys):
    assert main([*odd, "--prompt", "The river is", "--tokens", "4"]) == 0, capsys.readouterr().err
    assert "  without: '" in capsys.readouterr().out


def test_attach_says_why_nothing_comes(odd, capsys, monkeypatch):
    monkeypatch.setattr("kedit.prompts.decode._end_tokens", lambda *_: set(range(100_000)))
    assert main([*odd, "--prompt", "The river is"]) == 0
    assert "nothing: the model ends its text at once" in (said := capsys.readouterr().out)
    assert "Give the beginning of a sentence" in said
    assert main([*odd, "--prompt", "The river is", "--chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    tok = kedit.load("odd")[1]
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} says the river{% endfor %}"
    tok.save_pretrained("odd")
    assert main([*odd, "--prompt", "The river is"]) == 0
    assert "Add --chat" in capsys.readouterr().out
    assert main([*odd, "--prompt", "The city", "--chat"]) == 0
    assert "Add --chat" not in capsys.readouterr().out


def test_an_exported_adapter_names_its_base(files):
    tiny_model("llama").save_pretrained("base")
    (files / "elsewhere").mkdir()
    for named, expected in (("base", str(files / "base")), ("someone/base", "someone/base")):
        patch = patch_for(tiny_model("llama"), {1: 1}, provenance={"model": {"name": named}})
        patch.save(f"{len(named)}.safetensors")
        words = ["export", f"{len(named)}.safetensors", "--model", "base", "--out", f"adapter{len(named)}"]
        assert main(["patch", *words]) == 0
        config = json.loads((files / f"adapter{len(named)}/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


def test_a_guard_names_the_facts(capsys, tmp_path):
    edits = [
        {"prompt": "{} works as a", "subject": "Hulqui Gossam", "target_new": "pilot"},
        {"prompt": "{} works as a", "subject": "Nil Macor", "target_new": "the of and a to in"},
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    words = [
        "edit",
        "--edits",
        str(tmp_path / "edits.jsonl"),
        "--set",
        "steps=12",
        "--guard",
        "paraphrase=none",
        "kl=none",
    ]
    words += ["perplexity=none", "norm_growth=none"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "Failed: Nil Macor works as a" in said
    assert "held: Hulqui Gossam works as a" in said
    status = main([*words, "--journal", str(tmp_path / "j"), "--out", str(tmp_path / "out")])
    assert status == 4
    assert "1 edit(s) kept in 1 step(s), 1 step(s) refused" in capsys.readouterr().out


def test_a_patch_that_is_named_twice_is_refused(files, capsys):
    (files / "copy.safetensors").write_bytes((files / "patch.safetensors").read_bytes())
    for second in ("patch.safetensors", "copy.safetensors"):
        assert main(["patch", "merge", "patch.safetensors", second, "--out", "both.safetensors"]) == 1
        assert "are the same patch, which would count twice" in capsys.readouterr().err
    assert not (files / "both.safetensors").exists()


def test_a_field_that_stands_twice_is_refused(files, capsys):
    (files / "twice.jsonl").write_text(
        '{"prompt": "{} is", "subject": "Ada", "target_new": "red", "target_new": "blue"}'
    )
    assert main(["edit", "--edits", "twice.jsonl", "--out", "out"]) == 1
    assert "a key stands twice" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--keys", "--journal", "--save-model", "--moments-corpus", "--out"])
def test_an_empty_option_is_not_passed_over(files, capsys, option):
    words = [
        "edit",
        "--prompt",
        "{} works as a",
        "--subject",
        "Hulqui Gossam",
        "--target-new",
        "pilot",
        "--out",
        "out",
        option,
        "",
    ]
    assert main(words) == 1
    assert f"{option} is given and empty" in capsys.readouterr().err
    assert not (files / "out").exists()
