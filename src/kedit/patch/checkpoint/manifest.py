"""``kedit.json``: which patches a checkpoint folder carries, and which of them were applied in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ArchitectureError, PatchError, PatchMismatchError
from kedit.patch.checkpoint.read import Checkpoint
from kedit.patch.checkpoint.rewrite import RECORD
from kedit.patch.format import plain
from kedit.utils.files import parse_json

if TYPE_CHECKING:
    from kedit.patch.patch import EditPatch


def entries(folder: Path) -> list[dict[str, Any]]:
    """What the record in a checkpoint says of the patches that it carries, in order; nothing where there is none.

    Raises:
        PatchError: the file is not one that kedit wrote.
    """
    path = folder / RECORD
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PatchError(f"Cannot read {path}: {error}. Check the file.") from error
    content = parse_json(raw, str(path))
    known = content.get("patches") if isinstance(content, dict) else None
    sound = isinstance(known, list) and all(
        isinstance(item, dict) and isinstance(item.get("fingerprints"), dict) for item in known
    )
    if not sound:
        raise PatchError(f"{path} is not a record that kedit wrote. Remove or repair it.")
    found: list[dict[str, Any]] = plain(known, str(path))
    return found


def appended(folder: Path, patches: Sequence[EditPatch]) -> dict[str, Any]:
    """The record of a checkpoint after one more run with ``patches``."""
    known = entries(folder)
    run = 1 + max((_run(item) for item in known), default=0)
    new = [
        {"run": run, "provenance": plain(patch.provenance, RECORD), "fingerprints": patch.fingerprints}
        for patch in patches
    ]
    return _record([*known, *new])


def without(edited: Checkpoint, base: Checkpoint, reverted: set[str]) -> dict[str, Any] | None:
    """The record of ``edited`` once the tensors ``reverted`` are those of ``base``; ``None`` where no patch is left.

    A patch stays on record with the weights that still carry it.
    """
    known, before = entries(edited.folder), entries(base.folder)
    kept = [_restricted(item, lambda name: _key(base, name) in reverted) for item in before if item not in known]
    for item in known:
        there = item in before
        kept.append(item if there else _restricted(item, lambda name: _key(edited, name) not in reverted))
    left = [item for item in kept if item["fingerprints"]]
    return _record(left) if left else None


def ways_of_running(folder: Path, patches: Sequence[EditPatch]) -> list[list[int]]:
    """How ``patches`` may have been put onto a checkpoint, by patch the run: as recorded, in one, each in its own."""
    number = len(patches)
    ways = [[0] * number, list(range(number))]
    known = iter(entries(folder))
    recorded = []
    for patch in patches:
        found = next((item for item in known if item["fingerprints"] == patch.fingerprints), None)
        if found is None:
            return ways
        recorded.append(_run(found))
    return [recorded, *ways]


def _record(known: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kedit_version": version("kedit"), "patches": known}


def _run(item: dict[str, Any]) -> int:
    run = item.get("run")
    return run if type(run) is int else 0


def _restricted(item: dict[str, Any], stays: Callable[[str], bool]) -> dict[str, Any]:
    return {**item, "fingerprints": {name: value for name, value in item["fingerprints"].items() if stays(name)}}


def _key(checkpoint: Checkpoint, name: str) -> str:
    """Where a parameter is stored; its own name where it is not."""
    try:
        return checkpoint.key_of(name)
    except (PatchMismatchError, ArchitectureError):
        return name
