"""The patch file: round trips, and thousands of files that are none."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kedit.errors import KEditError, NonFiniteError, PatchError
from kedit.patch import EditPatch
from kedit.patch.delta import DenseDelta, LowRankDelta
from kedit.patch.format import checksum
from kedit.utils.files import read_header
from patch_common import bytes_of, patch_for, random_delta
from tiny_models import tiny_model as model

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def patch():
    return patch_for(
        model("llama"),
        {1: 2, 2: None},
        provenance={"editor": "rome", "edits": [{"prompt": "{} – «ж»", "subject": "Ünï"}], "model": {"name": "tiny"}},
    )


def write(path, tensors=None, **changes):
    """A well-formed patch file with some texts or tensors changed, and a checksum that fits them."""
    tensors = tensors or {f"{NAME}.left": torch.ones(48, 1), f"{NAME}.right": torch.ones(80, 1)}
    names = {key.rpartition(".")[0] for key in tensors}
    metadata = {
        "format": "kedit-patch",
        "format_version": "1",
        "kedit_version": "0",
        "fingerprints": json.dumps(dict.fromkeys(names, "sha256:" + "0" * 64)),
        "provenance": "{}",
    } | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata.setdefault("checksum", checksum(tensors, metadata))
    save_file(tensors, path, metadata=metadata)
    return path


def test_save_and_load_give_the_same_patch(patch, tmp_path):
    path = patch.save(tmp_path / "deep" / "edit.safetensors")
    found = EditPatch.load(path)
    assert found.provenance == patch.provenance
    assert found.fingerprints == patch.fingerprints
    assert set(found.deltas) == set(patch.deltas)
    for name, delta in patch.deltas.items():
        assert type(found.deltas[name]) is type(delta)
        for suffix, tensor in delta.tensors().items():
            assert torch.equal(found.deltas[name].tensors()[suffix], tensor)
    assert os.listdir(path.parent) == ["edit.safetensors"]


def test_a_loaded_patch_does_what_the_saved_one_did(patch, tmp_path):
    path = patch.save(tmp_path / "edit.safetensors")
    one, other = model("llama"), model("llama")
    patch.apply(one)
    EditPatch.load(path).apply(other)
    assert bytes_of(one) == bytes_of(other)


def test_the_file_is_plain_safetensors_that_others_read(patch, tmp_path):
    path = patch.save(tmp_path / "edit.safetensors")
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["format"] == "kedit-patch"
        assert torch.equal(file.get_tensor(f"{NAME}.left"), patch.deltas[NAME].left)


def test_the_same_patch_gives_the_same_bytes(patch, tmp_path):
    one, other = patch.save(tmp_path / "a.safetensors"), patch.save(tmp_path / "b.safetensors")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("given", "stored"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str
)
def test_factors_are_stored_in_float32_or_wider(tmp_path, given, stored):
    delta = random_delta((48, 80), 1)
    delta = delta.to(torch.device("cpu"), given)
    path = EditPatch({NAME: delta}, {NAME: "sha256:" + "0" * 64}).save(tmp_path / "p.safetensors")
    assert EditPatch.load(path).deltas[NAME].left.dtype == stored


def test_provenance_that_is_no_json_is_saved_as_text(tmp_path):
    odd = {"config": {"lr": float("nan"), "path": tmp_path, 3: (1, 2)}, "note": "\ud800"}
    path = EditPatch({NAME: random_delta((4, 5), 1)}, {NAME: "sha256:" + "0" * 64}, odd).save(
        tmp_path / "p.safetensors"
    )
    found = EditPatch.load(path).provenance
    assert found == {"config": {"lr": "nan", "path": repr(tmp_path), "3": [1, 2]}, "note": "\ud800"}


def test_what_would_not_load_is_not_saved(tmp_path):
    good, delta = {NAME: "sha256:" + "0" * 64}, random_delta((48, 80), 1)
    empty = LowRankDelta(torch.zeros(48, 0), torch.zeros(80, 0))
    deep = []
    for _ in range(600):
        deep = [deep]
    for deltas, prints, known, said in (
        ({NAME: delta}, {}, {}, "fingerprints"),
        ({NAME: delta}, {NAME: "x"}, {}, "fingerprints"),
        ({NAME: delta}, {NAME: 3}, {}, "fingerprints"),
        ({NAME: empty}, good, {}, "no columns"),
        ({NAME: delta}, good, {"a": deep}, "nested"),
        ({NAME: delta}, good, {"model": "gpt2"}, "'model' as 'gpt2'"),
    ):
        with pytest.raises(PatchError, match=said):
            EditPatch(deltas, prints, known).save(tmp_path / "p")
    assert os.listdir(tmp_path) == []
    with pytest.raises(PatchError, match="no columns"):
        EditPatch({NAME: empty}, good).to_peft(tmp_path / "adapter", model("llama"))
    EditPatch({NAME: delta}, {**good, "other": "x"}).save(tmp_path / "p")
    assert EditPatch.load(tmp_path / "p").fingerprints == good


def test_an_existing_file_survives_a_save_that_fails(patch, tmp_path, monkeypatch):
    path = patch.save(tmp_path / "edit.safetensors")
    before = path.read_bytes()
    list(patch.deltas.values())[0].left[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        patch.save(path)
    list(patch.deltas.values())[0].left[0, 0] = 0

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kedit.utils.files.os.fsync", full)
    with pytest.raises(PatchError, match="No space left"):
        patch.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["edit.safetensors"]


def test_saving_where_no_file_can_be_is_an_error_in_words(patch, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x.safetensors", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(PatchError, match="Cannot write"):
            patch.save(target)
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0" * 8, b"\xff" * 8, b"\2\0\0\0\0\0\0\0{}", b"PK\3\4" * 10, b"\x80\x04K\x01."]
)
def test_files_of_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(PatchError, match=r"safetensors|patch"):
        EditPatch.load(tmp_path / "p")


def test_missing_files_folders_and_impossible_names_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path, "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(PatchError):
            EditPatch.load(path)


def test_foreign_safetensors_are_refused(tmp_path):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(PatchError, match="not a kedit patch"):
        EditPatch.load(tmp_path / "model.safetensors")


def test_the_helper_writes_what_loads(tmp_path):
    assert list(EditPatch.load(write(tmp_path / "p")).deltas) == [NAME]


@pytest.mark.parametrize("number", ["2", "999999"])
def test_newer_formats_are_refused(tmp_path, number):
    with pytest.raises(PatchError, match="Update kedit"):
        EditPatch.load(write(tmp_path / "p", format_version=number))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": "one"},
        {"format_version": "-1"},
        {"format_version": "٣"},
        {"format_version": "1" * 10_000},
        {"format_version": None},
        {"fingerprints": "[]"},
        {"fingerprints": "{}"},
        {"fingerprints": None},
        {"fingerprints": json.dumps({NAME: 3})},
        {"fingerprints": json.dumps({NAME: "sha256:"})},
        {"fingerprints": json.dumps({NAME: "sha256:" + "0" * 64, "other": "sha256:" + "0" * 64})},
        {"provenance": "null"},
        {"provenance": "[1, 2]"},
        {"provenance": "{"},
        {"provenance": '{"a": NaN}'},
        {"provenance": '{"a": 1, "a": 2}'},
        {"provenance": '{"a": ' + "9" * 5000 + "}"},
        {"provenance": '{"scores": {"kl": 1e999}}'},
        {"provenance": '{"scores": {"kl": -1e999}}'},
        {"provenance": '{"a": ' + "[" * 300 + "]" * 300 + "}"},
        {"provenance": '{"a": ' + '{"b": ' * 600 + "1" + "}" * 600 + "}"},
        {"provenance": "[" * 100_000},
        {"provenance": '{"model": []}'},
        {"provenance": '{"model": "gpt2"}'},
        {"provenance": '{"edits": [1]}'},
        {"provenance": '{"edits": {"a": 1}}'},
        {"provenance": '{"regularizers": ["sadr"]}'},
        {"provenance": '{"contexts": [{}]}'},
        {"provenance": '{"editor": 7}'},
        {"provenance": '{"scores": []}'},
        {"checksum": "sha256:" + "0" * 64},
        {"checksum": ""},
    ],
    ids=lambda changes: next(iter(f"{key}={str(value)[:30]}" for key, value in changes.items())),
)
def test_texts_of_the_wrong_kind_are_refused(tmp_path, changes):
    with pytest.raises(PatchError):
        EditPatch.load(write(tmp_path / "p", **changes))


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a..b",
    ".weight",
    "a b.weight",
    "model.layers.1.mlp.down_proj.weight\n",
    "model/layers",
    "model\\layers",
    "x\0y",
    "ж.weight",
    "a" * 501,
    "",
    "a.weight[x]",
    "a[1].weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_tricks_in_tensor_names_are_refused(tmp_path, name):
    tensors = {f"{name}.left": torch.ones(3, 1), f"{name}.right": torch.ones(4, 1)}
    with pytest.raises(PatchError):
        EditPatch.load(write(tmp_path / "p", tensors))
    with pytest.raises(PatchError):
        EditPatch({name: LowRankDelta(torch.ones(3, 1), torch.ones(4, 1))}, {name: "x"}).save(tmp_path / "q")
    assert not (tmp_path / "q").exists()


NO_WEIGHTS = [
    "__class__.weight",
    "model.__init__.weight",
    "_parameters.x",
    "forward.weight",
    "weight",
    "model.layers.1",
    "model.layers.1.mlp.down_proj.bias",
    "model.layers.1.mlp.down_proj.T_destination",
    "model.norm.weight",
    "model.embed_tokens.weight",
]


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_names_of_things_that_are_no_weights_reach_nothing(tmp_path, name):
    subject = model("llama")
    before = bytes_of(subject)
    tensors = {f"{name}.left": torch.ones(48, 1), f"{name}.right": torch.ones(80, 1)}
    patch = EditPatch.load(write(tmp_path / "p", tensors))
    for force in (False, True):
        with pytest.raises(KEditError):
            patch.apply(subject, force=force)
        with pytest.raises(KEditError):
            patch.attach(subject, force=force)
    assert bytes_of(subject) == before


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{NAME}.left": torch.ones(4, 1)},
        {f"{NAME}.left": torch.ones(4, 1), f"{NAME}.right": torch.ones(5, 2)},
        {f"{NAME}.left": torch.ones(4, 1), f"{NAME}.right": torch.ones(5, 1), f"{NAME}.dense": torch.ones(4, 5)},
        {f"{NAME}.left": torch.ones(4), f"{NAME}.right": torch.ones(5)},
        {f"{NAME}.left": torch.ones(4, 0), f"{NAME}.right": torch.ones(5, 0)},
        {f"{NAME}.dense": torch.ones(2, 3, 4)},
        {f"{NAME}.dense": torch.ones(2, 3, dtype=torch.int64)},
        {f"{NAME}.dense": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        {f"{NAME}.dense": torch.ones(2, 3, dtype=torch.bool)},
        {f"{NAME}.other": torch.ones(2, 3)},
        {f"{NAME}.dense": torch.full((2, 3), float("nan"))},
        {f"{NAME}.left": torch.ones(4, 1), f"{NAME}.right": torch.full((5, 1), float("inf"))},
    ],
)
def test_tensors_that_are_no_update_are_refused(tmp_path, tensors):
    with pytest.raises(PatchError):
        EditPatch.load(write(tmp_path / "p", tensors))


def test_every_truncation_is_noticed(patch, tmp_path):
    data = patch.save(tmp_path / "p").read_bytes()
    cuts = {*range(0, 64), *random.Random(0).sample(range(len(data)), 200), len(data) - 1}
    for cut in sorted(cuts):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(PatchError):
            EditPatch.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    with pytest.raises(PatchError):
        EditPatch.load(tmp_path / "cut")


def test_every_flipped_bit_is_noticed(tmp_path):
    data = bytearray(patch_for(model("llama"), {1: 1}).save(tmp_path / "p").read_bytes())
    dice = random.Random(1)
    for _ in range(1000):
        place, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
        data[place] ^= bit
        (tmp_path / "flipped").write_bytes(data)
        data[place] ^= bit
        try:
            found = EditPatch.load(tmp_path / "flipped")
        except PatchError:
            continue
        # Only what carries no meaning may differ: the padding of the header, the case of an escape, an unsigned key.
        original = EditPatch.load(tmp_path / "p")
        assert found.provenance == original.provenance
        assert found.fingerprints == original.fingerprints
        for name, delta in original.deltas.items():
            assert torch.equal(found.deltas[name].dense, delta.dense)


def _mutate(dice, data):
    """A file near a patch file: bytes, pieces, numbers and words of it changed."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        place = dice.randrange(max(1, min(len(data), dice.choice((10, 600, len(data) or 1)))))
        match dice.randrange(8):
            case 0:
                data[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[place : place + dice.choice((1, 8, 100))]
            case 2:
                data[place:place] = bytes(dice.randrange(256) for _ in range(dice.choice((1, 8, 50))))
            case 3:
                data[:8] = dice.choice((0, 2, len(data), 1 << 31, (1 << 64) - 1, dice.randrange(2000))).to_bytes(
                    8, "little"
                )
            case 4:
                words = (
                    b"null",
                    b"-1",
                    b"1e9",
                    b"[[[[",
                    b"{}",
                    b'"F32"',
                    b'"BF16"',
                    b'"I64"',
                    b"99999999999999999999",
                    b"NaN",
                )
                data[place : place + dice.randrange(8)] = dice.choice(words)
            case 5:
                old = dice.choice(
                    (b"left", b"right", b"dense", b"F32", b"shape", b"data_offsets", b"weight", b"format", b"[")
                )
                data = bytearray(
                    bytes(data).replace(old, dice.choice((b"left", b"x", b"", b"dense", b"F64", b"..", b"\\u0000")), 1)
                )
            case 6:
                other = dice.randrange(max(1, len(data)))
                data[place : place + 30] = data[other : other + 30]
            case _:
                data[place:] = data[place : place + dice.randrange(1000)]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files_raise_nothing_but_kedit_errors(tmp_path, seed):
    subject = patch_for(model("llama"), {1: 1, 2: 2})
    good = subject.save(tmp_path / "p").read_bytes()
    dice, messages = random.Random(seed), []
    for _ in range(500):
        (tmp_path / "f").write_bytes(_mutate(dice, good))
        try:
            found = EditPatch.load(tmp_path / "f")
            found.show()
        except KEditError as error:
            messages.append(str(error))
    assert len(messages) > 470
    assert min(map(len, messages)) > 20


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_texts_with_a_valid_checksum_raise_nothing_but_kedit_errors(tmp_path, seed):
    """Behind the checksum: what a malicious writer, who can compute it, may put there."""
    dice = random.Random(100 + seed)
    values = [None, True, -1, 1.5, "", "x", [], {}, [[]], [{}], {"a": None}, "\u0000", "{}", [None], {"name": []}]
    keys = ["editor", "config", "regularizers", "edits", "contexts", "moments", "model", "scores", "merged", "other"]
    loaded = 0
    for _ in range(300):
        provenance = {key: dice.choice(values) for key in dice.sample(keys, dice.randrange(4))}
        prints = dice.choice(values) if dice.random() < 0.2 else {NAME: "sha256:" + "0" * 64}
        write(tmp_path / "f", provenance=json.dumps(provenance), fingerprints=json.dumps(prints))
        try:
            found = EditPatch.load(tmp_path / "f")
        except KEditError:
            continue
        loaded += 1
        found.show()
        repr(found)
        with pytest.raises(KEditError):
            found.apply(model("llama"))
        EditPatch.merge([found, found]).show()
    assert 30 < loaded < 300


def test_headers_are_checked_against_the_files_size(tmp_path):
    def file(table, data=b"\0" * 8):
        head = json.dumps(table).encode()
        (tmp_path / "h").write_bytes(len(head).to_bytes(8, "little") + head + data)
        return tmp_path / "h"

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert list(read_header(file({"a": entry})).tensors) == ["a"]
    huge = [1 << 62, 4]
    changes = [{"shape": shape} for shape in ([3], [-2], [2.0], [True, 2], "2", None, huge)]
    changes += [{"dtype": dtype} for dtype in ("F33", 4, None)]
    changes += [{"data_offsets": place} for place in ([0], [8, 0], [8, 16], [-8, 0], None)]
    for change in [*changes, {"more": 1}]:
        with pytest.raises(PatchError):
            read_header(file({"a": entry | change}))
    with pytest.raises(PatchError):  # two tensors on the same bytes
        read_header(file({"a": entry, "b": entry}))
    with pytest.raises(PatchError):  # bytes that belong to none
        read_header(file({"a": entry}, b"\0" * 9))


def test_a_full_disk_leaves_neither_file_nor_rest(tiny_disk):
    big = EditPatch({NAME: DenseDelta(torch.ones(1000, 1000))}, {NAME: "sha256:" + "0" * 64})
    small = EditPatch({NAME: random_delta((4, 5), 1)}, {NAME: "sha256:" + "0" * 64})
    path = small.save(tiny_disk / "p.safetensors")
    before = path.read_bytes()
    with pytest.raises(PatchError, match="No space left"):
        big.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tiny_disk) == ["p.safetensors"]
    assert shutil.disk_usage(tiny_disk).free > 500_000
