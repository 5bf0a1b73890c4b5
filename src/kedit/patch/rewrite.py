"""Writing a changed copy of a checkpoint folder: beside its place, durable, then moved there; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit.errors import PatchError
from kedit.patch.checkpoint import INDEX, Checkpoint
from kedit.patch.copying import Copies
from kedit.patch.files import open_to_others, sync_folder, to_bytes

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


def write_folder(
    source: Checkpoint,
    changes: Mapping[str, Callable[[], Tensor]],
    out: Path,
    *,
    link: bool,
    record: dict[str, Any] | None,
    stage: Stage,
) -> DiskReport:
    """Write a checkpoint folder beside its place, with some tensors changed, and move it there when it is durable.

    Args:
        source: the checkpoint; only read.
        changes: what gives a tensor its new value, by the tensor's name; called one after another, with what they return
            written before the next.
        out: the new folder.
        link: hard-link shards that do not change.
        record: what is written to kedit.json; ``None``: no such file.
        stage: is called with a word on each thing that was done, always in the same order.
    """
    out = Path(os.path.abspath(out))
    _check_target(source.folder, out)
    edited = dict.fromkeys(source.files[key] for key in changes)
    kept = [shard for shard in source.shards if shard not in edited]
    report = DiskReport(out, sorted(edited), sorted(kept))
    stage("checked")
    with _refusals(out), _partial(out) as folder:
        stage("begun")
        copied, linked = ([*edited], kept) if link else ([*edited, *kept], [])
        with Copies(source.folder, folder, copied, linked) as copies:
            for key, change in changes.items():  # while shards are copied
                _rewrite(source, key, change(), folder, copies)
                stage(f"rewritten {key}")
            for shard in source.shards:
                copies.wait(shard)
                stage(f"taken {shard}")
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


def _rewrite(source: Checkpoint, key: str, tensor: Tensor, folder: Path, copies: Copies) -> None:
    """Replace one tensor's bytes in the copy of its shard, once that is there."""
    shard = source.files[key]
    left = to_bytes(tensor)
    copies.wait(shard)
    with open(folder / shard, "r+b", buffering=0) as file:
        file.seek(source.shards[shard].tensors[key].start)
        while left:
            left = left[file.write(left[: 1 << 26]) :]


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
            shutil.copyfile(old, new / place)
    return left_out


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


def quiet(word: str) -> None:
    """Say nothing."""
