"""Patches on checkpoints: the same bits as in memory, and whole or not at all, whatever breaks in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kedit.errors import KEditError, NonFiniteError, PatchError, PatchMismatchError
from kedit.patch import EditPatch
from kedit.patch.card import CARD
from kedit.patch.checkpoint.apply import apply_to_checkpoint, revert_checkpoint
from kedit.patch.checkpoint.copy import _copy_some
from kedit.patch.checkpoint.manifest import FOLDER, RECORD
from kedit.patch.checkpoint.read import INDEX
from kedit.utils.progress import Progress
from patch_common import TYPES, bytes_of, patch_for, random_delta, save_checkpoint
from tiny_models import tiny_model as model
from tiny_models import tokenizer

DTYPES = (torch.float32, torch.bfloat16)


def tree(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded(folder):
    """The model in a folder, in the dtype it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture
def base(tmp_path):
    """A sharded bfloat16 checkpoint with tokenizer, and a patch for it."""
    folder = tmp_path / "base"
    subject = save_checkpoint(folder, shard="60KB")
    tokenizer().save_pretrained(folder)
    patch = patch_for(subject, {1: 2, 3: None})
    return folder, patch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_on_disk_and_in_memory_give_the_same_bits(tmp_path, kind, dtype):
    subject = save_checkpoint(tmp_path / "base", kind, dtype)
    before = tree(tmp_path / "base")
    first = patch_for(subject, {1: 2, 3: None})
    first.apply(subject)
    second = patch_for(subject, {1: 1, 2: 3}, seed=4)  # made for the model with the first
    second.apply(subject)
    report = apply_to_checkpoint(tmp_path / "base", [first, second], tmp_path / "out")
    assert bytes_of(loaded(tmp_path / "out")) == bytes_of(subject)
    assert tree(tmp_path / "base") == before
    after = tree(tmp_path / "out")
    assert {name for name in after if not name.startswith(FOLDER)} == set(before) | {RECORD, CARD}
    assert len(list((tmp_path / "out" / FOLDER).iterdir())) == 2
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == set(report.rewritten)
    assert set(report.kept) == {name for name in before if name.endswith(".safetensors")} - changed
    assert report.kept
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_the_record_says_what_was_done_and_grows(tmp_path, base):
    folder, patch = base
    apply_to_checkpoint(folder, [patch], tmp_path / "one")
    subject = loaded(tmp_path / "one")
    second = patch_for(subject, {1: 1}, provenance={"editor": "second"})
    apply_to_checkpoint(tmp_path / "one", [second], tmp_path / "two")
    record = json.loads((tmp_path / "two" / RECORD).read_text())
    assert [item["provenance"]["editor"] for item in record["patches"]] == ["rome", "second"]
    assert record["patches"][0]["fingerprints"] == patch.fingerprints
    (tmp_path / "two" / RECORD).write_text("[")
    with pytest.raises(PatchError, match=RECORD):
        apply_to_checkpoint(tmp_path / "two", [patch], tmp_path / "three", force=True)


def test_a_single_file_checkpoint(tmp_path):
    subject = model("gpt2")
    subject.save_pretrained(tmp_path / "base")
    patch = patch_for(subject, {1: 1})
    patch.apply(subject)
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out")
    assert bytes_of(loaded(tmp_path / "out")) == bytes_of(subject)


def test_names_without_the_base_models_prefix_are_found(tmp_path):
    """As the original gpt2 checkpoint stores them."""
    subject = model("gpt2")
    subject.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    patch = patch_for(subject, {1: 1})
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out")
    patch.apply(subject)
    name = "h.1.mlp.c_proj.weight"
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[name], subject.transformer.h[1].mlp.c_proj.weight
    )


def test_a_patch_made_in_float32_goes_onto_the_bfloat16_checkpoint_it_came_from(tmp_path, base):
    folder, _ = base
    wide = loaded(folder).float()
    patch = patch_for(wide, {1: 1})
    apply_to_checkpoint(folder, [patch], tmp_path / "out")
    subject = loaded(folder)
    patch.apply(subject)
    assert bytes_of(loaded(tmp_path / "out")) == bytes_of(subject)


def test_linking_shares_what_did_not_change_and_nothing_else(tmp_path, base):
    folder, patch = base
    report = apply_to_checkpoint(folder, [patch], tmp_path / "out", link=True)
    for shard in report.kept:
        assert (tmp_path / "out" / shard).samefile(folder / shard)
    for name in [*report.rewritten, "config.json", INDEX, "tokenizer.json"]:
        assert not (tmp_path / "out" / name).samefile(folder / name)
    copied = apply_to_checkpoint(folder, [patch], tmp_path / "copied")
    assert not any((tmp_path / "copied" / shard).samefile(folder / shard) for shard in copied.kept)
    assert tree(tmp_path / "copied") == tree(tmp_path / "out")


def test_a_folder_of_links_as_the_hubs_cache_is_followed(tmp_path, base):
    folder, patch = base
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    folder.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / path.name)
    before = tree(blobs)
    for number, link in enumerate((False, True)):
        out = tmp_path / f"out{number}"
        apply_to_checkpoint(snapshot, [patch], out, link=link)
        assert not any(path.is_symlink() for path in out.iterdir())
    assert tree(blobs) == before
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")


def test_weights_in_other_forms_stay_behind_and_other_files_travel(tmp_path, base):
    folder, patch = base
    stale = ["pytorch_model.bin", "pytorch_model.bin.index.json", "other.safetensors", "sub/weights.gguf"]
    kept = ["README.md", "sub/template.jinja", "generation_config.json"]
    for name in stale + kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    report = apply_to_checkpoint(folder, [patch], tmp_path / "out")
    assert sorted(report.left_out) == sorted(stale)
    found = set(tree(tmp_path / "out"))
    assert found >= set(kept)
    assert not found & {*stale, ".git/HEAD"}


# Revert


def test_reverting_on_disk_gives_the_bases_bytes(tmp_path, base):
    folder, first = base
    subject = loaded(folder)
    first.apply(subject)
    second = patch_for(subject, {1: 2, 2: 1}, seed=3)
    apply_to_checkpoint(folder, [first, second], tmp_path / "edited")
    revert_checkpoint(tmp_path / "edited", folder, [first, second], tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


def test_reverting_what_is_not_all_leaves_the_rest(tmp_path, base):
    folder, first = base
    subject = loaded(folder)
    first.apply(subject)
    second = patch_for(subject, {1: 2}, seed=3)
    apply_to_checkpoint(folder, [first, second], tmp_path / "edited")
    revert_checkpoint(tmp_path / "edited", folder, [first], tmp_path / "back")
    apply_to_checkpoint(folder, [second], tmp_path / "fresh", force=True)
    assert bytes_of(loaded(tmp_path / "back")) == bytes_of(loaded(tmp_path / "fresh"))


# Refusals: the output never appears, the input never changes


def refuses(folder, patches, out, error, match, **options):
    before, beside = tree(folder), sorted(os.listdir(folder.parent))
    with pytest.raises(error, match=match):
        apply_to_checkpoint(folder, patches, out, **options)
    assert tree(folder) == before
    assert sorted(os.listdir(folder.parent)) == beside


def test_other_weights_are_refused_unless_forced(tmp_path, base):
    folder, _ = base
    other = patch_for(model("llama", seed=1, dtype=torch.bfloat16), {1: 1})
    refuses(folder, [other], tmp_path / "out", PatchMismatchError, "not the weight that this patch was made for")
    apply_to_checkpoint(folder, [other], tmp_path / "out", force=True)
    assert (tmp_path / "out").is_dir()


def test_the_order_of_patches_is_checked(tmp_path, base):
    folder, first = base
    subject = loaded(folder)
    first.apply(subject)
    second = patch_for(subject, {1: 1}, seed=3)
    refuses(folder, [second, first], tmp_path / "out", PatchMismatchError, "not the weight")


@pytest.mark.parametrize("force", [False, True])
def test_wrong_shapes_and_other_models_are_refused_even_when_forced(tmp_path, base, force):
    folder, patch = base
    name = next(iter(patch.deltas))
    odd = EditPatch({name: random_delta((4, 5), 1)}, patch.fingerprints)
    refuses(folder, [odd], tmp_path / "out", PatchMismatchError, "shape", force=force)
    gpt2 = patch_for(model("gpt2"), {1: 1})
    refuses(folder, [gpt2], tmp_path / "out", PatchMismatchError, "nothing of that name", force=force)


def test_nan_and_overflow_are_refused(tmp_path, base):
    folder, patch = base
    name = next(iter(patch.deltas))
    patch.deltas[name].left[0, 0] = float("nan")
    refuses(folder, [patch], tmp_path / "out", NonFiniteError, "NaN")
    patch.deltas[name].left[0, 0] = 1e38
    patch.deltas[name].right[:] = 1e10
    refuses(folder, [patch], tmp_path / "out", NonFiniteError, "NaN or infinite")


def test_no_patch_is_refused(tmp_path, base):
    refuses(base[0], [], tmp_path / "out", PatchError, "no patch")


def test_a_taken_target_is_refused(tmp_path, base):
    folder, patch = base
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "file", "link"):
        refuses(folder, [patch], tmp_path / name, PatchError, "exists already")
    for inside in (folder, folder / "sub", tmp_path / "out" / ".." / "base"):
        refuses(folder, [patch], inside, PatchError, "own folder")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    refuses(folder, [patch], tmp_path / "file" / "out", PatchError, "Cannot write")


def damage(folder, how):
    """Damage a checkpoint in one way; return nothing."""
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    table = json.loads(index.read_text())
    first = shards[0].name
    match how:
        case "truncated":
            shards[0].write_bytes(shards[0].read_bytes()[:-1])
        case "truncated in the header":
            shards[0].write_bytes(shards[0].read_bytes()[:20])
        case "empty shard":
            shards[0].write_bytes(b"")
        case "longer":
            shards[0].write_bytes(shards[0].read_bytes() + b"\0")
        case "missing shard":
            shards[0].unlink()
        case "empty index":
            index.write_bytes(b"")
        case "index of another kind":
            index.write_text("[]")
        case "index without map":
            index.write_text('{"weight_map": {}}')
        case "index too deep":
            index.write_text("[" * 100_000)
        case "wrong place":
            table["weight_map"] = dict.fromkeys(table["weight_map"], first)
            index.write_text(json.dumps(table))
        case "unknown tensor":
            table["weight_map"]["ghost"] = first
            index.write_text(json.dumps(table))
        case "no config":
            (folder / "config.json").unlink()
        case "broken config":
            (folder / "config.json").write_text("{")
        case "config of nothing":
            (folder / "config.json").write_text('{"model_type": "no such thing"}')
        case "config of another size":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 88}))
        case "no weights":
            for path in [*shards, index]:
                path.unlink()
        case _:
            table["weight_map"] = {name: how if file == first else file for name, file in table["weight_map"].items()}
            index.write_text(json.dumps(table))


DAMAGES = ["truncated", "truncated in the header", "empty shard", "longer", "missing shard", "empty index"]
DAMAGES += [
    "index of another kind",
    "index without map",
    "index too deep",
    "wrong place",
    "unknown tensor",
    "no config",
]
DAMAGES += ["broken config", "config of nothing", "config of another size", "no weights"]
TRICKS = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "..",
    "",
    ".hidden.safetensors",
    "a\0.safetensors",
    "sub/x.safetensors",
]
TRICKS += ["a\\b.safetensors", "x.bin", "model\n.safetensors"]


@pytest.mark.parametrize("how", DAMAGES + TRICKS)
def test_damaged_checkpoints_are_refused_in_words(tmp_path, base, how):
    folder, patch = base
    damage(folder, how)
    refuses(folder, [patch], tmp_path / "out", KEditError, r"\w+ \w+ \w+")


def test_a_name_that_leads_out_is_not_even_read(tmp_path, base):
    folder, patch = base
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], tmp_path / "x.safetensors")
    damage(folder, "../x.safetensors")
    refuses(folder, [patch], tmp_path / "out", PatchError, "not the name of a safetensors file")


def test_a_flipped_byte_in_an_edited_weight_is_noticed(tmp_path, base):
    folder, patch = base
    for name in patch.deltas:
        shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        good = shard.read_bytes()
        weights = load_file(shard)
        weights[name].view(torch.int16)[3, 7] ^= 1
        save_file(weights, shard, metadata={"format": "pt"})
        refuses(folder, [patch], tmp_path / "out", PatchMismatchError, "not the weight")
        shard.write_bytes(good)


def test_quantized_checkpoints_are_refused(tmp_path, base):
    folder, patch = base
    name = next(iter(patch.deltas))
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    weights = load_file(shard)
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, shard, metadata={"format": "pt"})
    refuses(folder, [patch], tmp_path / "out", PatchError, "I8", force=True)


def test_a_folder_that_is_none(tmp_path):
    patch = patch_for(model("llama"), {1: 1})
    for wrong in (tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(PatchError):
            apply_to_checkpoint(wrong, [patch], tmp_path / "out")


def test_a_full_disk_leaves_nothing_under_the_name(base, tiny_disk):
    folder, patch = base
    (folder / "README.md").write_bytes(b"x" * 900_000)
    before = tree(folder)
    for link in (False, True):
        with pytest.raises(PatchError, match="No space left"):
            apply_to_checkpoint(folder, [patch], tiny_disk / "out", link=link)
        assert os.listdir(tiny_disk) == []
    assert tree(folder) == before


@pytest.mark.parametrize("how", ["no such call", "refused", "says 0"])
def test_copies_are_the_same_where_the_system_cannot_copy_ranges(tmp_path, base, monkeypatch, how):
    folder, patch = base
    apply_to_checkpoint(folder, [patch], tmp_path / "expected")

    def copy(*args):
        if how == "refused":
            raise OSError(95, "Operation not supported")
        return 0

    if how == "no such call":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    monkeypatch.setattr("kedit.patch.checkpoint.copy._STEP", 1000)
    apply_to_checkpoint(folder, [patch], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_shard_that_shrinks_while_it_is_copied_is_noticed(tmp_path, base, monkeypatch):
    folder, patch = base
    monkeypatch.setattr("kedit.patch.checkpoint.copy._copy_some", lambda *args: 0)
    refuses(folder, [patch], tmp_path / "out", PatchError, "ends early")


def test_a_refusal_does_not_wait_for_all_copies(tmp_path, base, monkeypatch):
    folder, _ = base
    other = patch_for(model("llama", seed=1, dtype=torch.bfloat16), {1: 1})
    copied = []
    real = _copy_some

    def slow(source, target, start, most):
        time.sleep(0.05)
        copied.append(real(source, target, start, most))
        return copied[-1]

    monkeypatch.setattr("kedit.patch.checkpoint.copy._STEP", 100)  # thousands of pieces: a minute and more
    monkeypatch.setattr("kedit.patch.checkpoint.copy._copy_some", slow)
    refuses(folder, [other], tmp_path / "out", PatchMismatchError, "not the weight")
    assert copied
    assert sum(copied) < sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2


def test_progress_counts_every_shard_and_every_weight(tmp_path, base, monkeypatch):
    folder, patch = base
    totals, steps = [], []

    class Counted(Progress):
        def __init__(self, total, *words):
            totals.append(total)
            super().__init__(total, *words)

        def advance(self, steps_done=1):
            steps.append(steps_done)

    monkeypatch.setattr("kedit.patch.checkpoint.rewrite.Progress", Counted)
    report = apply_to_checkpoint(folder, [patch], tmp_path / "out")
    assert totals == [sum(steps)] == [2 + len(report.rewritten) + len(report.kept)]


def test_an_error_at_any_stage_leaves_nothing(tmp_path, base):
    folder, patch = base
    stages = []
    apply_to_checkpoint(folder, [patch], tmp_path / "out", on_stage=stages.append)
    shutil.rmtree(tmp_path / "out")
    for number in range(len(stages) - 1):  # after the last one, it is done

        def broken(stage, number=number):
            if stage == stages[number]:
                raise KeyboardInterrupt(stage)

        refuses(folder, [patch], tmp_path / "out", KeyboardInterrupt, stages[number], on_stage=broken)


KILLED = """
    import os, signal
    from kedit.patch import EditPatch
    from kedit.patch.checkpoint.apply import apply_to_checkpoint
    import transformers, kedit.models  # the slow part, before any process is made
    patch = EditPatch.load({patch!r})
    for base, out, link in {cases!r}:
        stages = []
        apply_to_checkpoint(base, [patch], out + "-rehearsal", link=link, on_stage=stages.append)
        for number in range(len(stages)):
            process = os.fork()
            if process == 0:
                seen = iter(range(len(stages)))
                apply_to_checkpoint(
                    base, [patch], f"{{out}}-{{number}}", link=link,
                    on_stage=lambda stage: next(seen) == number and os.kill(os.getpid(), signal.SIGKILL),
                )
                os._exit(3)
            status = os.waitpid(process, 0)[1]
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            print(link, number, stages[number].split()[0], os.path.exists(f"{{out}}-{{number}}"))
"""


def test_killed_at_every_stage_it_is_whole_or_absent_and_the_next_run_cleans_up(tmp_path, base):
    folder, patch = base
    save_checkpoint(tmp_path / "linked", shard="200KB")
    patch.save(tmp_path / "p.safetensors")
    cases = [(folder, tmp_path / "outs" / "out", False), (tmp_path / "linked", tmp_path / "links" / "out", True)]
    before = [tree(case[0]) for case in cases]
    names = {
        "patch": str(tmp_path / "p.safetensors"),
        "cases": [(str(one), str(two), link) for one, two, link in cases],
    }
    script = textwrap.dedent(KILLED.format(**names))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for source, out, link in cases:
        expected = tree(out.with_name("out-rehearsal"))
        lines = [line.split()[1:] for line in done.stdout.splitlines() if line.split()[0] == str(link)]
        kinds = {kind for _, kind, _ in lines}
        assert kinds == {"checked", "begun", "taken", "rewritten", "described", "durable", "done"}
        for number, kind, there in lines:
            assert (there == "True") == (kind == "done")
            if there == "True":
                assert tree(out.with_name(f"out-{number}")) == expected
        left = [name for name in os.listdir(out.parent) if name.endswith(".partial")]
        assert len(left) == len(lines) - 2  # nothing was begun at the first stage, and all was moved at the last
        for number, kind, _ in lines:
            if kind != "done":
                report = apply_to_checkpoint(source, [patch], out.with_name(f"out-{number}"), link=link)
                assert tree(out.with_name(f"out-{number}")) == expected
                assert {(report.folder / shard).samefile(source / shard) for shard in report.kept} == {link}
        assert not [name for name in os.listdir(out.parent) if name.endswith(".partial")]
    assert [tree(case[0]) for case in cases] == before


def test_a_run_in_progress_is_not_cleaned_up_by_another(tmp_path, base):
    folder, patch = base
    seen = []

    def other(stage):
        if stage == "durable" and not seen:
            seen.extend(path.name for path in tmp_path.glob(".out.*.partial"))
            apply_to_checkpoint(folder, [patch], tmp_path / "out")  # the other run is first
            assert (tmp_path / seen[0]).is_dir()

    with pytest.raises(PatchError, match="Cannot write"):
        apply_to_checkpoint(folder, [patch], tmp_path / "out", on_stage=other)
    assert len(seen) == 1
    assert bytes_of(loaded(tmp_path / "out")) != bytes_of(loaded(folder))
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


@pytest.mark.slow
def test_killed_at_random_times(tmp_path, base):
    folder, patch = base
    patch.save(tmp_path / "p.safetensors")
    command = [sys.executable, "-m", "kedit", "patch", "apply", str(folder), "--patch", str(tmp_path / "p.safetensors")]
    apply_to_checkpoint(folder, [patch], tmp_path / "expected")
    expected, before = tree(tmp_path / "expected"), tree(folder)
    finished = 0
    for number in range(30):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(4.0 + 0.1 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert tree(out) == expected
            finished += 1
    assert tree(folder) == before
    assert finished
