"""Journals: a run that was killed goes on and ends where an unbroken run ends, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kedit
import zoo
from contract.common import ADA, EDITS, FRENCH, RIVER, make
from kedit.editors.key_history import KeyHistory
from kedit.errors import ConfigError, KEditError, PatchError, PatchMismatchError
from kedit.evaluation.guard import Guard
from kedit.models import ModelArch
from kedit.patch import EditPatch
from kedit.patch.ledger import Ledger
from kedit.sequential import read_journal, run_journal
from patch_common import bytes_of
from tiny_models import tiny_model

MORE = [
    kedit.Edit("{} was born in", "The painter", "Spain"),
    kedit.Edit("The capital of {} is", "Italy", "Berlin"),
]
LOOSE = {"efficacy": None, "perplexity": 1e9, "norm_growth": None}


class Stop(Exception):
    """Breaks a run off."""


def fresh(name="rome", **options):
    """A new editor on the unedited model."""
    if name == "ft":
        options = {"kl_factor": 0.0} | options
    if name == "alphaedit":  # a null space that is none would make every test of its keys one of nothing
        options = {"threshold": 1.0, "threshold_rule": "mean"} | options
    return make(name, tiny_model("gpt2"), **options)


@pytest.mark.parametrize(("name", "size"), [("rome", 1), ("memit", 2), ("alphaedit", 2), ("alphaedit", 1), ("ft", 1)])
def test_a_run_is_a_sequence_of_edits_and_goes_on_with_the_same_result(tmp_path, name, size):
    edits = [*EDITS, *MORE]
    plain = fresh(name)
    for start in range(0, len(edits), size):
        plain.apply(edits[start : start + size])
    expected = bytes_of(plain.model)
    assert expected != bytes_of(tiny_model("gpt2"))

    whole = fresh(name)
    result = run_journal(tmp_path / "whole", whole, edits, batch_size=size)
    assert bytes_of(whole.model) == expected
    assert result.resumed == 0

    first = fresh(name)
    run_journal(tmp_path / "parts", first, edits[: 2 * size], batch_size=size)
    second = fresh(name)
    result = run_journal(tmp_path / "parts", second, edits, batch_size=size)
    assert result.resumed == 2
    assert bytes_of(second.model) == expected
    assert all(delta.norm > 1e-6 for patch in result.patches for delta in patch.deltas.values())
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    for patch in reversed(result.patches):
        patch.revert(second.model)
    assert bytes_of(second.model) == bytes_of(tiny_model("gpt2"))


def test_the_kept_patches_merge_into_one(tmp_path):
    editor = fresh()
    result = run_journal(tmp_path / "j", editor, EDITS)
    other = tiny_model("gpt2")
    result.patch.apply(other)
    assert bytes_of(other) == bytes_of(editor.model)
    third = tiny_model("gpt2")
    for patch in read_journal(tmp_path / "j"):
        patch.apply(third)
    assert bytes_of(third) == bytes_of(editor.model)
    assert "3 edit(s) kept" in result.report()


def test_refused_edits_are_noted_passed_over_and_not_tried_again(tmp_path, monkeypatch):
    guard = Guard(kl=1e-9, **LOOSE)  # nothing gets through
    editor = fresh()
    result = run_journal(tmp_path / "j", editor, [ADA, FRENCH], guard=guard)
    assert bytes_of(editor.model) == bytes_of(tiny_model("gpt2"))
    assert [refusal.edits for refusal in result.refused] == [[ADA], [FRENCH]]
    assert "kl is" in result.refused[0].reason
    assert result.refused[0].scores["kl"] > 1e-9
    assert result.report().count("refused: ") == 2
    again = fresh()
    monkeypatch.setattr(type(again), "apply", lambda *args, **options: pytest.fail("tried again"))
    found = run_journal(tmp_path / "j", again, [ADA, FRENCH], guard=guard)
    assert found.refused == result.refused


def test_a_guarded_run_keeps_scores_and_resumes(tmp_path):
    guard = Guard(kl=1e9, **LOOSE)
    whole, first, second = fresh(), fresh(), fresh()
    run_journal(tmp_path / "whole", whole, EDITS, guard=guard)
    run_journal(tmp_path / "parts", first, EDITS[:1], guard=guard)
    result = run_journal(tmp_path / "parts", second, EDITS, guard=guard)
    assert bytes_of(second.model) == bytes_of(whole.model)
    assert all("kl" in patch.provenance["scores"] for patch in result.patches)


def test_a_run_that_breaks_off_leaves_the_model_unedited_and_the_journal_good(tmp_path, monkeypatch):
    editor = fresh()
    apply, count = type(editor).apply, iter(range(9))

    def broken(*args, **options):
        if next(count) == 2:
            raise Stop
        return apply(*args, **options)

    monkeypatch.setattr(type(editor), "apply", broken)
    with pytest.raises(Stop):
        run_journal(tmp_path / "j", editor, EDITS)
    monkeypatch.undo()
    assert bytes_of(editor.model) == bytes_of(tiny_model("gpt2"))
    assert Ledger.of(editor.model).touched == []
    assert run_journal(tmp_path / "j", editor, EDITS).resumed == 2  # the same editor may go on


KILLED = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    from contract.common import make
    from tiny_models import tiny_model
    import kedit
    from kedit.sequential import run_journal
    edits = kedit.Edit.from_jsonl({edits!r})
    import kedit.utils.files as files
    real = {{"fsync": os.fsync, "replace": files.Path.replace}}
    calls = 0

    def killing(name, at):
        def call(*args):
            global calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args)
        return call

    def run(folder, at):
        files.os.fsync, files.Path.replace = killing("fsync", at), killing("replace", at)
        run_journal(folder, make("rome", tiny_model("gpt2"), steps=2), edits)
        return calls

    pid = os.fork()
    if pid == 0:
        total = run({folder!r} + "/whole", 0)
        os._exit(total)
    total = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for at in range(1, total + 1):
        pid = os.fork()
        if pid == 0:
            run({folder!r} + f"/killed{{at}}", at)
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    print(total)
"""


def test_killed_at_every_write_it_goes_on_to_the_same_end(tmp_path):
    edits = [ADA, FRENCH]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit.to_dict()) + "\n" for edit in edits))
    paths = [str(Path(__file__).parents[1])]
    script = KILLED.format(paths=paths, edits=str(tmp_path / "edits.jsonl"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    total = int(done.stdout)
    assert total == 9  # per file: its bytes, its name, the folder; a head and two edits
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    whole = bytes_of(run_to_end(tmp_path / "whole", edits))
    resumed = set()
    for at in range(1, total + 1):
        folder = tmp_path / f"killed{at}"
        resumed.add(len([name for name in os.listdir(folder) if name.endswith(".safetensors")]))
        assert bytes_of(run_to_end(folder, edits)) == whole
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert resumed == {0, 1, 2}


def run_to_end(folder, edits):
    """The model after a run that goes on."""
    editor = fresh(steps=2)
    run_journal(folder, editor, edits)
    return editor.model


@pytest.fixture
def journal(tmp_path):
    """A finished journal of three edits."""
    run_journal(tmp_path / "j", fresh(steps=2), EDITS)
    return tmp_path / "j"


def refuses(folder, match, editor=None, edits=EDITS, error=PatchError, **options):
    editor = editor or fresh(steps=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plain = bytes_of(editor.model)
    with pytest.raises(error, match=match):
        run_journal(folder, editor, edits, **options)
    assert bytes_of(editor.model) == plain
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_settings_are_refused(journal):
    refuses(journal, "another config", fresh(steps=3))
    refuses(journal, "another editor", fresh("rrome", steps=2))
    refuses(journal, "another contexts", fresh(steps=2, contexts=["{}"]))
    refuses(journal, "another batch_size", batch_size=2)
    refuses(journal, "another guard", guard=Guard())
    refuses(journal, "another regularizers", regularizer=kedit.SADR(gamma=0.01))
    editor = fresh(steps=2)
    editor.engine.budget //= 2
    refuses(journal, "another budget of tokens per wave", editor)
    with pytest.raises(ConfigError, match=r"kedit\.Guard"):
        run_journal(journal, fresh(steps=2), EDITS, guard="strict")


def test_other_models_and_edits_are_refused(journal):
    other = make("rome", tiny_model("gpt2", seed=1), steps=2)
    refuses(journal, "not the one that the journal", other, error=PatchMismatchError)
    refuses(journal, "other edits", edits=[FRENCH, RIVER, ADA])
    edited = fresh(steps=2)
    edited.apply(ADA)
    refuses(journal, "carries edits already", edited, error=PatchMismatchError)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("journal.json", b""),
        ("journal.json", b"[]"),
        ("journal.json", b"{}"),
        ("journal.json", b"\xff"),
        ("journal.json", None),
        ("000001.safetensors", b""),
        ("000001.safetensors", b"x" * 100),
        ("000000.safetensors", None),
        ("000001.refused.json", b"{}"),
        ("000003.refused.json", b"{}"),
        ("000003.refused.json", b"["),
        ("000003.refused.json", b'{"reason": 3}'),
        ("000004.safetensors", b""),
    ],
)
def test_damaged_journals_are_refused_in_words(journal, file, content):
    if content is None:
        (journal / file).unlink()
    else:
        (journal / file).write_bytes(content)
    refuses(journal, r"\w+ \w+", error=KEditError, edits=[*EDITS, *MORE])


def test_a_flipped_byte_in_a_kept_edit_is_refused(journal):
    data = bytearray((journal / "000001.safetensors").read_bytes())
    data[-5] ^= 4
    (journal / "000001.safetensors").write_bytes(data)
    refuses(journal, "checksum")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / ".x.partial").write_text("mine")
    refuses(tmp_path / "model", "holds other things")


def test_alphaedits_keys_travel_between_runs_beside_the_patches(tmp_path):
    """One run of four edits, and two runs of two with patches and keys in files between them: the same bits."""
    edits = [*EDITS, *MORE][:4]
    whole, first, second = fresh("alphaedit"), fresh("alphaedit"), fresh("alphaedit")
    run_journal(tmp_path / "whole", whole, edits, batch_size=2)
    run_journal(tmp_path / "first", first, edits[:2], batch_size=2).patch.save(tmp_path / "first.safetensors")
    first.history.save(tmp_path / "first.keys.safetensors")
    second.prepare()  # contexts and moments are those of the unedited model
    EditPatch.load(tmp_path / "first.safetensors").apply(second.model)
    forgetful = second.propose(edits[2])[0]
    second.history.load(tmp_path / "first.keys.safetensors")
    knowing = second.propose(edits[2])[0]
    second.apply(edits[2:])
    assert bytes_of(second.model) == bytes_of(whole.model)
    (name,) = knowing.deltas
    assert not torch.equal(forgetful.deltas[name].dense, knowing.deltas[name].dense)


@pytest.fixture
def keys(tmp_path):
    """A file with the keys of two earlier edits, of a layer that is edited and of one that is not."""
    editor = fresh("alphaedit")
    editor.apply(MORE)
    found = editor.history.keys(2, 0)
    metadata = {"format": "kedit-key-history"}
    save_file({"keys.2": found, "keys.4": found[:1].clone()}, tmp_path / "keys.safetensors", metadata=metadata)
    return tmp_path / "keys.safetensors"


def knowing(keys, **options):
    editor = fresh("alphaedit", **options)
    editor.history.load(keys)
    return editor


def test_a_run_goes_on_with_the_keys_that_it_began_with(tmp_path, keys):
    whole = knowing(keys)
    run_journal(tmp_path / "whole", whole, EDITS)
    forgetful = fresh("alphaedit")
    run_journal(tmp_path / "forgetful", forgetful, EDITS)
    assert bytes_of(forgetful.model) != bytes_of(whole.model)
    run_journal(tmp_path / "parts", knowing(keys), EDITS[:1])
    for number, editor in enumerate((fresh("alphaedit"), knowing(keys))):  # from the journal, and brought along
        folder = tmp_path / f"parts{number}"
        shutil.copytree(tmp_path / "parts", folder)
        assert run_journal(folder, editor, EDITS).resumed == 1
        assert bytes_of(editor.model) == bytes_of(whole.model)
        assert torch.equal(editor.history.keys(2, 0), whole.history.keys(2, 0))
        assert torch.equal(editor.history.keys(4, 0), whole.history.keys(4, 0))
        assert len(editor.history.keys(2, 0)) == 5


def test_other_keys_are_refused(tmp_path, keys):
    run_journal(tmp_path / "with", knowing(keys), EDITS[:1])
    run_journal(tmp_path / "without", fresh("alphaedit"), EDITS[:1])
    twice = knowing(keys)
    twice.history.load(keys)
    refuses(tmp_path / "with", "with other keys of earlier edits", twice)
    refuses(tmp_path / "without", "with other keys of earlier edits", knowing(keys))
    editor = fresh("alphaedit", steps=2)
    refuses(tmp_path / "with", "another config", editor)
    assert editor.history.layers == []  # what came from the journal went with the refusal
    (tmp_path / "with" / "start.safetensors").write_bytes(b"x")
    refuses(tmp_path / "with", "safetensors", fresh("alphaedit"))
    (tmp_path / "with" / "start.safetensors").unlink()
    refuses(tmp_path / "with", "with other keys of earlier edits", fresh("alphaedit"))


def test_killed_between_keys_and_head_a_run_begins_anew(tmp_path, keys, monkeypatch):
    def killed(*args):
        raise Stop

    monkeypatch.setattr("kedit.sequential.head.write_json", killed)
    with pytest.raises(Stop):
        run_journal(tmp_path / "j", knowing(keys), EDITS[:1])
    monkeypatch.undo()
    assert os.listdir(tmp_path / "j") == ["start.safetensors"]
    editor, whole = knowing(keys), knowing(keys)
    run_journal(tmp_path / "j", editor, EDITS[:1])
    run_journal(tmp_path / "whole", whole, EDITS[:1])
    assert bytes_of(editor.model) == bytes_of(whole.model)


def test_reverted_edits_leave_no_empty_keys(tmp_path):
    editor = fresh("alphaedit")
    editor.apply(ADA).patch.revert(editor.model)
    other = fresh("alphaedit")
    other.history.load(editor.history.save(tmp_path / "k"))
    assert (editor.history.layers, editor.history.count, other.history.count) == ([], 0, 0)


def test_the_keys_of_a_mixture_are_as_wide_as_its_experts_together(tmp_path):
    subject = zoo.make("mixtral")
    width = ModelArch(subject).memory_width(1)
    assert width == 4 * 64
    for size in (width, 64):
        save_file({"keys.1": torch.ones(2, size)}, tmp_path / "k", metadata={"format": "kedit-key-history"})
        history = KeyHistory(subject)
        if size == width:
            history.load(tmp_path / "k")
            assert history.begins_with(tmp_path / "k")
        else:
            with pytest.raises(PatchError, match="finite matrix"):
                history.load(tmp_path / "k")


@pytest.mark.parametrize(
    ("tensors", "form", "match"),
    [
        ({"keys.1": torch.ones(2, 192)}, "pt", "no key history"),
        ({"keys.99": torch.ones(2, 192)}, "kedit-key-history", "keys.99"),
        ({"other": torch.ones(2, 192)}, "kedit-key-history", "other"),
        ({"keys.1": torch.ones(2, 3)}, "kedit-key-history", "finite matrix"),
        ({"keys.1": torch.full((2, 192), float("nan"))}, "kedit-key-history", "finite matrix"),
    ],
)
def test_files_that_are_no_key_history_are_refused(tmp_path, tensors, form, match):
    editor = fresh("alphaedit")
    save_file(tensors, tmp_path / "keys", metadata={"format": form})
    with pytest.raises(PatchError, match=match):
        editor.history.load(tmp_path / "keys")
    assert editor.history.keys(1, 192).shape == (0, 192)
    for bad in (b"", b"x" * 99):
        (tmp_path / "keys").write_bytes(bad)
        with pytest.raises(PatchError):
            editor.history.load(tmp_path / "keys")


def test_only_what_a_killed_run_was_writing_is_removed(journal):
    for name in (".000003.safetensors.abc1.partial", ".journal.json.x_y.partial", ".start.safetensors.z.partial"):
        (journal / name).write_text("half")
    (journal / ".edited.abc.partial").mkdir()
    (journal / ".000004.safetensors.q.partial").mkdir()
    (journal / ".notes.partial").write_text("mine")
    assert run_journal(journal, fresh(steps=2), EDITS).resumed == 3
    hidden = {name for name in os.listdir(journal) if name.startswith(".")}
    assert hidden == {".edited.abc.partial", ".000004.safetensors.q.partial", ".notes.partial"}


def test_places_that_hold_no_journal_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", tmp_path / ("y" * 300), f"{tmp_path}/c\0b"):
        with pytest.raises(PatchError, match="journal"):
            run_journal(place, fresh(), EDITS)
    for place in (tmp_path / "loop", tmp_path / ("y" * 300), f"{tmp_path}/c\0b", tmp_path / "none", tmp_path):
        with pytest.raises(PatchError, match="no journal"):
            read_journal(place)


def test_two_runs_on_one_journal_are_refused(journal):
    from kedit.utils.folders import lock_folder, unlock

    lock = lock_folder(journal)
    refuses(journal, "in use by another process")
    unlock(lock)
    assert run_journal(journal, fresh(steps=2), EDITS).resumed == 3


def test_impossible_requests_are_refused(tmp_path):
    for size in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="batch_size"):
            run_journal(tmp_path / "j", fresh(), EDITS, batch_size=size)
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchError, match="journal"):
        run_journal(tmp_path / "file", fresh(), EDITS)
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_ends_the_run_with_the_model_unedited(tiny_disk, tmp_path):
    editor = fresh(steps=2)
    free = shutil.disk_usage(tiny_disk).free
    (tiny_disk / "filler").write_bytes(b"x" * (free - 10_000))
    with pytest.raises(PatchError, match="No space left"):
        run_journal(tiny_disk / "j", editor, EDITS)
    assert bytes_of(editor.model) == bytes_of(tiny_model("gpt2"))
    (tiny_disk / "filler").unlink()
    run_journal(tiny_disk / "j", editor, EDITS)
    whole = fresh(steps=2)
    run_journal(tmp_path / "whole", whole, EDITS)
    assert bytes_of(editor.model) == bytes_of(whole.model)
