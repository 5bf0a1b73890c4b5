"""What a run has finished, on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kedit.edit import json_lines
from kedit.errors import EditError
from kedit.evaluation.scores import CaseRecord
from kedit.patch import EditPatch
from kedit.processes import here

RUN, RECORDS, PATCHES = "run.json", "records.jsonl", "patches"


class Journal:
    """The folder of one run.

    ``run.json`` says what the run is; ``records.jsonl`` holds a line per finished case; ``patches/`` the joint edit
    of a batch or sequential run. Several processes share the folder: each writes its finished cases to a file of its own.

    Raises:
        EditError: the folder holds another run.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        group = here()
        self.path = self.folder / (RECORDS if group.leads else f"records-{group.rank}.jsonl")
        self.records = group.attempt(lambda: self._open(dict(identity)) if group.leads else {})[0]

    def _open(self, identity: dict[str, Any]) -> dict[str, CaseRecord]:
        """Claim the folder for a run; what it has finished, by case."""
        self._claim(identity)
        files = [self.folder / RECORDS, *sorted(self.folder.glob("records-*.jsonl"))]
        return {record.id: record for path in files if path.exists() for record in _read(path)}

    def append(self, record: CaseRecord) -> None:
        """Add a finished case; it is on disk when this returns."""
        line = json.dumps(record.to_dict(), ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record.id] = record

    def tidy(self) -> None:
        """Once the report holds all records in one file: remove those of the other processes."""
        for path in self.folder.glob("records-*.jsonl"):
            path.unlink()

    def save_patches(self, patches: Iterable[EditPatch], failures: Mapping[str, str], seconds: float) -> None:
        """Keep a finished joint edit."""
        count = 0
        for count, patch in enumerate(patches, start=1):
            patch.save(self.folder / PATCHES / f"{count:05d}.safetensors")
        done = {"patches": count, "failures": dict(failures), "seconds": seconds}
        _write(self.folder / PATCHES / "done.json", done)

    def load_patches(self) -> tuple[list[EditPatch], dict[str, str], float] | None:
        """The joint edit of the interrupted run, where it was finished: patches, failures, seconds."""
        path = self.folder / PATCHES / "done.json"
        if not path.exists():
            return None
        done = json.loads(path.read_text(encoding="utf-8"))
        files = [self.folder / PATCHES / f"{i:05d}.safetensors" for i in range(1, done["patches"] + 1)]
        return [EditPatch.load(file) for file in files], done["failures"], done["seconds"]

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / RECORDS).exists():
                raise EditError(f"{self.folder} holds {RECORDS} but no {RUN}. Give another folder, or remove the file.")
            _write(path, identity)
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        differs = sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key))
        if differs:
            raise EditError(
                f"{self.folder} holds another run (its {', '.join(differs)} differ). Give another folder, or remove this one."
            )


def _read(path: Path) -> list[CaseRecord]:
    """The finished cases; a last line that was cut off by an interruption is removed from the file."""
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) < len(whole):
        path.write_bytes(complete)
    try:
        return [CaseRecord.from_dict(json.loads(line)) for _, line in json_lines(complete.decode())]
    except (ValueError, KeyError, TypeError) as error:
        raise EditError(f"{path} is damaged ({error}). Remove it to evaluate anew.") from error


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)
