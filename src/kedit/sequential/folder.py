"""A journal's folder: held by one process, its files in order, each written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedit.errors import PatchError
from kedit.utils.files import reading, write_text
from kedit.utils.folders import lock_folder, unlock

HEADER, START = "journal.json", "start.safetensors"
_ENTRY = re.compile(r"([0-9]{6})\.(safetensors|refused\.json)", re.ASCII)
_LEFT_BEHIND = re.compile(rf"\.(journal\.json|start\.safetensors|{_ENTRY.pattern})\.[^.]+\.partial", re.ASCII)


def is_begun(folder: str | Path) -> bool:
    """Return whether there is a journal in a folder, so that a run there goes on."""
    return os.path.isfile(os.path.join(folder, HEADER))


def entries(where: Path) -> list[Path]:
    """The files of all steps in order; raises where one is missing or there twice."""
    with reading(where):
        paths = sorted(path for path in where.iterdir() if _ENTRY.fullmatch(path.name)) if where.exists() else []
    for number, path in enumerate(paths):
        if int(path.name[:6]) != number:
            raise PatchError(
                f"The journal {where} has no single file for step {number:06}; found {path.name}. It is damaged."
            )
    return paths


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file, durably, whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")


@contextmanager
def held(where: Path) -> Iterator[None]:
    """Keep a journal for this process, and remove what a killed one was writing."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        names = os.listdir(where)
        lock = lock_folder(where)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise PatchError(f"Cannot use {str(where)!r} as a journal: {error}. Name a folder.") from error
    if lock is None:
        raise PatchError(f"The journal {where} is in use by another process. Wait for it, or name another folder.")
    try:
        if HEADER not in names and any(not name.startswith(".") and name != START for name in names):
            raise PatchError(f"{where} holds other things and no {HEADER}. Name a new folder for the journal.")
        for name in names:
            if _LEFT_BEHIND.fullmatch(name) and (where / name).is_file():
                (where / name).unlink(missing_ok=True)
        yield
    finally:
        unlock(lock)
