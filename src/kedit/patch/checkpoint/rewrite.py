"""Writing a changed copy of a checkpoint folder: beside its place, durable, then moved there; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from kedit.errors import PatchError
from kedit.patch.checkpoint.copy import Copies
from kedit.patch.checkpoint.manifest import FOLDER, RECORD, Entry, write_record
from kedit.patch.checkpoint.read import INDEX, Checkpoint
from kedit.utils.files import sync_folder, to_bytes
from kedit.utils.folders import check_new, is_within, partial_folder
from kedit.utils.progress import Progress

Stage = Callable[[str], None]
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
    """Reports the changes made on disk.

    Attributes:
        folder: the finished checkpoint.
        rewritten: shards with other weights.
        kept: shards taken over as they were.
        left_out: files that hold the unedited weights in other forms, and did not travel along.
        passed_over: links to folders, links that lead nowhere, and what is no file: these did not travel along either.
        applied: the patches that the checkpoint carries, in order.
        dropped: changes of weights that were lost, where the caller allowed it.
    """

    folder: Path
    rewritten: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def write_folder(
    source: Checkpoint,
    changes: Mapping[str, Callable[[], Tensor]],
    out: Path,
    *,
    link: bool,
    record: Sequence[Entry],
    stage: Stage,
) -> DiskReport:
    """Write a checkpoint folder beside its place, with some tensors changed, and move it there when it is durable.

    Args:
        source: the checkpoint; only read.
        changes: what gives a tensor its new value, by the tensor's name; called one after another, with what they return
            written before the next.
        out: the new folder.
        link: hard-link shards that do not change.
        record: the patches that the new checkpoint carries; they go to kedit.json and kedit-patches.
        stage: is called with a word on each thing that was done, always in the same order.
    """
    out = Path(os.path.abspath(out))
    _check_target(source.folder, out)
    edited = dict.fromkeys(map(source.file_of, changes))
    kept = [shard for shard in source.shards if shard not in edited]
    report = DiskReport(out, sorted(edited), sorted(kept), applied=[item.describe() for item in record])
    stage("checked")
    with _refusals(out), partial_folder(out) as folder:
        stage("begun")
        copied, linked = ([*edited], kept) if link else ([*edited, *kept], [])
        progress = Progress(len(changes) + len(source.shards), "writing", "part")
        with progress, Copies(source.folder, folder, copied, linked) as copies:
            for key, change in changes.items():  # while shards are copied
                _rewrite(source, key, change(), folder, copies)
                progress.advance()
                stage(f"rewritten {key}")
            for shard in source.shards:
                copies.wait(shard)
                progress.advance()
                stage(f"taken {shard}")
        _take_the_rest(source, folder, report)
        write_record(folder, record)
        stage("described")
        _sync(folder)
        stage("durable")
        os.replace(folder, out)
        sync_folder(out.parent)
        stage("done")
    return report


def _rewrite(source: Checkpoint, key: str, tensor: Tensor, folder: Path, copies: Copies) -> None:
    """Replace one tensor's bytes in the copy of its shard, once that is there."""
    shard = source.file_of(key)
    place, left = source.shards[shard].info(key), to_bytes(tensor)
    if len(left) != place.stop - place.start:  # more would overwrite the neighbour, fewer leave a mixture
        raise PatchError(
            f"{key} takes {place.stop - place.start} bytes in {shard}, and its new value has {len(left)}. Nothing is "
            "written; the new value must have the stored dtype and shape."
        )
    copies.wait(shard)
    with open(folder / shard, "r+b", buffering=0) as file:
        file.seek(place.start)
        while left:
            left = left[file.write(left[: 1 << 26]) :]


def _check_target(base: Path, out: Path) -> None:
    if is_within(out, base):
        raise PatchError(
            f"{out} is the checkpoint's own folder or lies in it; the base is never changed. Name another one."
        )
    check_new(out)


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise PatchError(
            f"Cannot write {out}: {error}. Nothing was left there. Check the folder and the free space."
        ) from error


def _take_the_rest(source: Checkpoint, new: Path, report: DiskReport) -> None:
    """Copy configuration, tokenizer and the like; leave out unedited weights in other forms; note what stays behind."""
    for root, folders, files in os.walk(source.folder):
        here = Path(root)
        top = here == source.folder
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (top and name == FOLDER))
        # os.walk names links to folders and does not follow them: they may lead anywhere, also in a circle.
        report.passed_over.extend(_place(source, here / name) for name in folders if (here / name).is_symlink())
        for name in sorted(files):
            place = _place(source, here / name)
            if place in source.shards or place == RECORD:
                continue
            if not (here / name).is_file():
                report.passed_over.append(place)
            elif place != INDEX and name.lower().endswith(_WEIGHTS):
                report.left_out.append(place)
            else:
                (new / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, new / place)


def _place(source: Checkpoint, path: Path) -> str:
    return str(path.relative_to(source.folder))


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
