"""Patches on checkpoints that need not fit into memory: tensor by tensor, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.delta import add_delta, sum_dtype
from kedit.errors import PatchError, PatchMismatchError
from kedit.fingerprint import has_fingerprint
from kedit.ledger import cast_checked
from kedit.patch.checkpoint import INDEX, Checkpoint, skeleton, weight_in
from kedit.patch.files import open_to_others, sync_folder, to_bytes

if TYPE_CHECKING:
    from kedit.arch import ModelArch
    from kedit.patch.core import EditPatch

Stage = Callable[[str], None]
RECORD = "kedit.json"
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ckpt",
) + (
    ".bin.index.json",
    ".safetensors.index.json",
)


@dataclass(frozen=True)
class DiskReport:
    """What was done on disk.

    Attributes:
        folder: the finished checkpoint.
        rewritten: shards with other weights.
        kept: shards taken over as they were.
        left_out: files that hold the unedited weights in other forms, and did not travel along.
    """

    folder: Path
    rewritten: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def apply_to_checkpoint(
    base: str | Path,
    patches: Sequence[EditPatch],
    out: str | Path,
    *,
    force: bool = False,
    link: bool = False,
    on_stage: Stage | None = None,
) -> DiskReport:
    """Write the checkpoint in ``base`` with patches applied, in order, to ``out``.

    The edited weights have the same bits as after ``patch.apply`` in memory on a model loaded in the checkpoint's
    dtype. One weight is in memory at a time. ``out`` appears only when it is complete; ``base`` is only read.

    Args:
        base: a folder with config.json and safetensors weights.
        patches: at least one.
        out: the new folder; must not exist, or be empty.
        force: do not compare the weights with those that the patches were made for.
        link: hard-link what does not change instead of copying it. Then the two folders share those files: a program
            that overwrites one of them in place changes both.
        on_stage: is called with a word on each thing that was done.

    Raises:
        PatchError: a damaged checkpoint, a taken target, or no space.
        PatchMismatchError: a patch was made for other weights.
    """
    if not patches:
        raise PatchError("There is no patch to apply. Name at least one.")
    source, arch = Checkpoint.open(base), skeleton(base)
    names = dict.fromkeys(name for patch in patches for name in patch.deltas)
    places = {name: weight_in(source, arch, name)[0] for name in names}

    def edited(name: str) -> Tensor:
        return _edited(source, arch, name, places[name], patches, force=force)

    changes = {key: partial(edited, name) for name, key in places.items()}
    applied = [{"provenance": patch.provenance, "fingerprints": patch.fingerprints} for patch in patches]
    record = {"kedit_version": version("kedit"), "patches": [*_earlier(source.folder), *applied]}
    return _write_folder(source, changes, Path(out), link=link, record=record, stage=on_stage or _quiet)


def revert_checkpoint(
    edited: str | Path,
    base: str | Path,
    patches: Sequence[EditPatch],
    out: str | Path,
    *,
    force: bool = False,
    link: bool = False,
    on_stage: Stage | None = None,
) -> DiskReport:
    """Write the checkpoint in ``edited`` with the weights that ``patches`` changed as they are in ``base``.

    Args:
        edited: a checkpoint that carries ``patches``, and no others on the same weights.
        base: the checkpoint that they were applied to.
        patches: all of them, in the order of application.
        out: the new folder; must not exist, or be empty.
        force: do not check that base plus patches is what ``edited`` holds.
        link: as for :func:`apply_to_checkpoint`.
        on_stage: is called with a word on each thing that was done.
    """
    if not patches:
        raise PatchError("There is no patch to take away. Name at least one.")
    source, origin, arch = Checkpoint.open(edited), Checkpoint.open(base), skeleton(edited)
    names = dict.fromkeys(name for patch in patches for name in patch.deltas)
    places = {name: (weight_in(source, arch, name)[0], weight_in(origin, arch, name)[0]) for name in names}

    def original(name: str) -> Tensor:
        there, here = places[name]
        if not force and not torch.equal(source.read(there), _edited(origin, arch, name, here, patches, force=False)):
            raise PatchMismatchError(
                f"{there} in {edited} is not what {base} with the given patches holds, so it carries other changes too. "
                "Name all of its patches in their order, or force it (--force) to give it the base's weights anyway."
            )
        return origin.read(here)

    changes = {there: partial(original, name) for name, (there, _) in places.items()}
    return _write_folder(source, changes, Path(out), link=link, record=None, stage=on_stage or _quiet)


def _edited(
    source: Checkpoint, arch: ModelArch, name: str, key: str, patches: Sequence[EditPatch], *, force: bool
) -> Tensor:
    """``cast(W₀ + Σ deltas)`` of one weight, checking before each patch that it was made for what is there."""
    stored = source.read(key)
    weight = arch.weight_of(name)
    dtype, total = stored.dtype, stored.to(sum_dtype(stored.dtype), copy=True)
    for patch in patches:
        if name not in patch.deltas:
            continue
        patch.check_shape(name, patch.deltas[name], tuple(weight.matrix.shape))
        if not force and not has_fingerprint(stored, patch.fingerprints.get(name)):
            raise patch.mismatch(f"{key} in {source.folder}")
        del stored
        add_delta(total, patch.deltas[name], transposed=weight.transposed)
        stored = cast_checked(name, total, dtype)
    return stored


def _write_folder(
    source: Checkpoint,
    changes: Mapping[str, Callable[[], Tensor]],
    out: Path,
    *,
    link: bool,
    record: dict[str, Any] | None,
    stage: Stage,
) -> DiskReport:
    """Write a checkpoint folder beside its place, with some tensors changed, and move it there when it is durable."""
    out = Path(os.path.abspath(out))
    _check_target(source.folder, out)
    edited_shards = {source.files[key] for key in changes}
    report = DiskReport(out, sorted(edited_shards), sorted(set(source.shards) - edited_shards))
    stage("checked")
    with _refusals(out), _partial(out) as folder:
        stage("begun")
        for shard in source.shards:
            _take(source.folder / shard, folder / shard, link=link and shard not in edited_shards)
            stage(f"taken {shard}")
        for key, change in changes.items():
            info = source.shards[source.files[key]].tensors[key]
            data = to_bytes(change())
            with open(folder / source.files[key], "r+b", buffering=0) as file:
                file.seek(info.start)
                _write_all(file, data)
            stage(f"rewritten {key}")
        report.left_out.extend(_take_the_rest(source, folder))
        if record is not None:
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        stage("described")
        _sync(folder)
        stage("durable")
        os.replace(folder, out)
        sync_folder(out.parent)
        stage("done")
    return report


def _earlier(folder: Path) -> list[Any]:
    """What the record in a checkpoint says of the patches that it carries already."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))["patches"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise PatchError(
            f"{folder / RECORD} is not a record that kedit wrote ({error}). Remove or repair it."
        ) from error
    return known if isinstance(known, list) else [known]


def _check_target(base: Path, out: Path) -> None:
    inside = base.resolve()
    if out.resolve() == inside or inside in out.resolve().parents:
        raise PatchError(
            f"{out} is the checkpoint's own folder or lies in it; the base is never changed. Name another one."
        )
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise PatchError(f"{out} exists already. Name a new folder, or remove it first.")


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise PatchError(
            f"Cannot write {out}: {error}. Nothing was left there. Check the folder and the free space."
        ) from error


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, removed unless it was moved there; what killed runs left behind is removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{_glob_safe(out.name)}.*.partial"):
        if _abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    lock = lock_folder(folder)
    try:
        open_to_others(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            unlock(lock)


def _glob_safe(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def lock_folder(folder: Path) -> int | None:
    """Hold a folder for this process; the system lets go when the process ends, however it ends. None: it is held."""
    number = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        os.close(number)
        return None
    return number


def _abandoned(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    lock = lock_folder(folder)
    if lock is not None:
        unlock(lock)
    return lock is not None


def unlock(lock: int) -> None:
    """Let go of what :func:`lock_folder` holds."""
    os.close(lock)


def _take(old: Path, new: Path, *, link: bool) -> None:
    """Link or copy one file; a link in the source (as the hub's cache has) is followed."""
    real = old.resolve()
    if link:
        try:
            os.link(real, new)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(real, new)


def _take_the_rest(source: Checkpoint, new: Path) -> list[str]:
    """Copy configuration, tokenizer and the like; leave out unedited weights in other forms."""
    left_out = []
    for root, folders, files in os.walk(source.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            old = Path(root) / name
            place = old.relative_to(source.folder)
            if str(place) in source.shards or str(place) == RECORD or not old.is_file():
                continue
            if str(place) != INDEX and name.lower().endswith(_WEIGHTS):
                left_out.append(str(place))
                continue
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            _take(old, new / place, link=False)
    return left_out


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data[: 1 << 26]) :]


def _sync(folder: Path) -> None:
    """Make a folder's files and names durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            number = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        sync_folder(Path(root))


def _quiet(word: str) -> None:
    """Say nothing."""
