"""What the command line writes, and where: no file lost, no device replaced, no work lost to output that cannot be printed."""

import io
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import kedit
from kedit.cli import main
from kedit.errors import PatchError
from patch_common import patch_for, save_checkpoint
from tiny_models import tiny_model, tokenizer

EDIT = ["edit", "--prompt", "{} works as a", "--subject", "Hulqui Gossam", "--target-new", "pilot", "--set", "steps=2"]
DONE = (0, 3)


@pytest.fixture
def patches(tmp_path):
    """Paths of two patches of one model."""
    subject = tiny_model("llama")
    return [str(patch_for(subject, {1: 1}, seed=seed).save(tmp_path / f"{seed}.safetensors")) for seed in (1, 2)]


def make(kind, path):
    """Something that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    elif kind == "folder":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("Needs the right to make a device node (root).")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, patches, capsys, kind):
    path = tmp_path / "out"
    make(kind, path)
    before = os.lstat(path)
    for words in (["patch", "merge", *patches, "--out"], [*EDIT, "--out"]):
        for force in ([], ["--force"]):
            assert main([*words, str(path), *force]) == 1
            assert f"it is a {kind}, not a regular file" in capsys.readouterr().err
    with pytest.raises(PatchError, match=f"is a {kind}"):
        kedit.EditPatch.load(patches[0]).save(path)
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino, before.st_rdev) == (after.st_mode, after.st_ino, after.st_rdev)


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_lead_to_the_new_file(tmp_path, patches, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/real").write_text("old")
    (tmp_path / "link").symlink_to("far/real")
    assert main(["patch", "merge", *patches, "--out", str(tmp_path / "link"), *["--force"][: int(there)]]) == 0
    assert os.readlink(tmp_path / "link") == "far/real"
    assert len(kedit.EditPatch.load(tmp_path / "far/real").deltas) == 1
    assert os.listdir(tmp_path / "far") == ["real"]


def test_existing_files_are_overwritten_by_force_alone(tmp_path, patches, capsys):
    out = tmp_path / "out"
    out.write_text("mine")
    fact = ["trace", "--prompt", "{} works as a", "--subject", "Hulqui Gossam", "--samples", "1"]
    for words in (EDIT, ["patch", "merge", *patches], fact, ["report", "--cases", "1"]):
        assert main([*words, "--out", str(out)]) == 1
        assert "exists already. Choose another --out, or add --force" in capsys.readouterr().err
        assert out.read_text() == "mine"
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn/tracing.png").write_text("mine")
    assert main([*fact, "--figures", str(tmp_path / "drawn")]) == 1
    assert "tracing.png exists already" in capsys.readouterr().err
    assert main([*EDIT, "--out", str(out), "--force"]) in DONE
    assert kedit.EditPatch.load(out).provenance["editor"] == "rome"


def names(folder):
    return sorted(os.listdir(folder))


def test_the_model_alone_can_be_saved(tmp_path, capsys):
    assert main([*EDIT, "--save-model", str(tmp_path / "edited")]) in DONE, capsys.readouterr().err
    model, _ = kedit.load(tmp_path / "edited")
    base, _ = kedit.load()
    assert not torch.equal(model.transformer.h[0].mlp.c_proj.weight, base.transformer.h[0].mlp.c_proj.weight) or any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    )
    assert names(tmp_path) == ["edited"]
    card = (tmp_path / "edited/README.md").read_text()
    assert "# Edited model: Hulqui Gossam works as a" in card
    [kept] = (tmp_path / "edited/kedit-patches").iterdir()
    base.save_pretrained(tmp_path / "base")
    words = ["--base", str(tmp_path / "base"), "--patch", str(kept), "--out", str(tmp_path / "back")]
    assert main(["patch", "revert", str(tmp_path / "edited"), *words]) == 0, capsys.readouterr().err
    back = kedit.load(tmp_path / "back")[0]
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), base.parameters(), strict=True))
    assert not (tmp_path / "back/README.md").exists()
    assert main(EDIT) == 1
    assert "--out FILE" in (said := capsys.readouterr().err)
    assert "--save-model DIR" in said


def test_folders_that_hold_anything_keep_it(tmp_path, capsys):
    save_checkpoint(tmp_path / "other", shard="30KB")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    model, tok = kedit.load()
    model.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    base = ["--model", str(tmp_path / "base"), "--moments-corpus", str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text("Hulqui Gossam works as a painter. The city is old.\n\n" * 50)
    for folder in ("other", "notes", "base"):
        before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert main([*EDIT, *base, "--save-model", str(tmp_path / folder)]) == 1
        assert "already. Choose a new folder, or add --force" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before


def test_a_forced_model_folder_holds_one_model_and_what_was_not_a_model(tmp_path):
    save_checkpoint(tmp_path / "other", shard="30KB")
    (tmp_path / "other/README.md").write_text("mine")
    (tmp_path / "other/pytorch_model.bin").write_bytes(b"old weights")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    assert main([*EDIT, "--save-model", str(tmp_path / "other"), "--force"]) in DONE
    assert [path.name for path in (tmp_path / "other").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "other/pytorch_model.bin").exists()
    assert not list((tmp_path / "other").glob("*.index.json"))
    assert (tmp_path / "other/README.md").read_text() == "mine"
    assert "Edited model" in (tmp_path / "other/README.kedit.md").read_text()
    assert kedit.load(tmp_path / "other")[0].config.model_type == "gpt2"
    assert names(tmp_path) == ["other"]


def test_a_link_to_an_empty_folder_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main([*EDIT, "--save-model", str(tmp_path / "link")]) in DONE
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/config.json").is_file()


def test_no_patch_among_the_shards_of_a_model(tmp_path, capsys):
    words = ["--save-model", str(tmp_path / "m"), "--out", str(tmp_path / "m/edit.safetensors")]
    assert main([*EDIT, *words]) == 1
    assert "--out lies in the --save-model folder" in capsys.readouterr().err


class Stream(io.TextIOWrapper):
    """Standard output in an encoding of its own."""

    def __init__(self, encoding, raw=None):
        self.raw_bytes = raw or io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, write_through=True)


class Full(io.BytesIO):
    """A file that takes nothing."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_output_in_another_encoding(tmp_path, monkeypatch, encoding):
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*EDIT, "--out", str(tmp_path / "out")]) in DONE
    said = stream.raw_bytes.getvalue().decode(encoding)
    assert "Hulqui Gossam works as a -> pilot" in said
    assert f"patch: {tmp_path / 'out'}" in said
    assert stream.errors == "strict"
    assert sys.stdout is stream


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["eval", "--help"], ["demo", "--help"]])
def test_help_in_ascii(monkeypatch, words):
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert b"usage: kedit" in stream.raw_bytes.getvalue()
    if words[0] == "edit":
        assert b" gamma" in stream.raw_bytes.getvalue()


def test_eval_in_ascii(tmp_path, monkeypatch):
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    words = ["eval", "--cases", "1", "--editor", "ft", "--set", "steps=2", "--no-exact", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert b"report.html" in stream.raw_bytes.getvalue()


@pytest.mark.parametrize(("number", "status"), [(32, DONE), (28, (1, 3))], ids=["closed", "full"])
def test_the_patch_is_written_where_the_report_cannot_be_printed(tmp_path, monkeypatch, capsys, number, status):
    monkeypatch.setattr(sys, "stdout", Stream("utf-8", Full(number)))
    assert main([*EDIT, "--out", str(tmp_path / "out")]) in status
    assert kedit.EditPatch.load(tmp_path / "out").deltas
    assert ("standard output cannot be written" in capsys.readouterr().err) == (number == 28)


def test_a_missing_standard_output_is_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*EDIT, "--out", str(tmp_path / "out")]) in DONE
    assert sys.stdout is None
    assert kedit.EditPatch.load(tmp_path / "out").deltas


def test_a_process_whose_reader_is_gone(tmp_path, patches):
    """The interpreter says nothing of it either when it ends."""
    out = tmp_path / "merged"
    command = [sys.executable, "-m", "kedit", "patch", "merge", *patches, "--out", str(out)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert kedit.EditPatch.load(out).deltas


@pytest.mark.parametrize("where", ["name", "target"])
def test_no_escape_sequence_reaches_the_terminal(tmp_path, capfdbinary, where):
    odd = "\x1b[31mpilot\x1b]0;x\x07"
    tiny_model("gpt2").save_pretrained(tmp_path / "m\x1b[2Jm")
    tokenizer().save_pretrained(tmp_path / "m\x1b[2Jm")
    (tmp_path / "text.txt").write_text("The capital of France is Paris. The river is long.\n\n" * 60)
    model = ["--model", str(tmp_path / "m\x1b[2Jm"), "--moments-corpus", str(tmp_path / "text.txt")]
    edit = {"prompt": "{} works as a", "subject": "Ada", "target_new": odd if where == "target" else "pilot"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(edit) + "\n")
    words = ["--edits", str(tmp_path / "edits.jsonl"), "--out", str(tmp_path / "o"), "--set", "steps=2"]
    for more in ([], ["--journal", str(tmp_path / "j"), "--force"]):
        assert main(["edit", *model, *words, *more]) in DONE
        said = b"".join(capfdbinary.readouterr())
        assert b"\x1b" not in said
        assert b"\x07" not in said
    (tmp_path / "cases.jsonl").write_text(json.dumps({"edit": edit, "id": "\x1b[2J"}) + "\nx\x1b[2J\n")
    for words in (
        ["eval", *model, "--data", str(tmp_path / "cases.jsonl"), "--editor", "ft", "--set", "steps=2"],
        ["trace", *model[:2], "--prompt", "{} works as a", "--subject", "Ada", "--answer", odd, "--samples", "1"],
        ["drift", *model, "--data", str(tmp_path / "cases.jsonl"), "--editor", "ft", "--set", "steps=2"],
    ):
        main(words)
        said = b"".join(capfdbinary.readouterr())
        assert b"\x1b" not in said, words


def test_reports_of_the_library_hold_no_escape_sequence():
    odd = "\x1b[31mpilot"
    model, tok = kedit.load()
    edit = kedit.Edit("{} works as a", "Hulqui Gossam", odd)
    with pytest.warns(kedit.IneffectiveEditWarning):
        result = kedit.FT(model, tok, steps=2, stop_loss=0.0).apply(edit)
    assert "\x1b" not in result.report()
    assert "\\x1b[31mpilot" in result.report()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "a/"], "names a folder"),
        (["--out", "same", "--keys", "./same", "--editor", "alphaedit"], "--out and --keys name one file"),
        (["--out", "j/000009.safetensors", "--journal", "j"], "--out lies in the --journal folder"),
        (["--save-model", "j/m", "--journal", "j"], "--save-model lies in the --journal folder"),
    ],
)
def test_outputs_that_would_damage_one_another(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert main([*EDIT, *more]) == 1
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_evaluation_overwrites_no_page_of_others(tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert main(["eval", "--cases", "1", "--unedited", "--no-exact", "--out", str(tmp_path)]) == 1
    assert "report.html exists already" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [["edit", "--out", "o", "--edits"], ["eval", "--data"], ["stats", "--layers", "0", "--corpus"]]
)
def test_a_device_is_not_read_for_ever(words, capsys):
    assert main([*words, "/dev/zero"]) == 1
    assert (said := capsys.readouterr().err).count("is a device") == 1
    assert said.count("Give ") == 1
