"""Finished cases and steps of a run, on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kedit.edit import json_lines
from kedit.errors import EditError, PatchError
from kedit.evaluation.records import CaseRecord
from kedit.patch import EditPatch
from kedit.utils import files
from kedit.utils.distributed import current_group

RUN, RECORDS, PATCHES, STEPS = "run.json", "records.jsonl", "patches", "steps.jsonl"
Line = TypeVar("Line")


@dataclass(frozen=True)
class Step:
    """A finished step of a joint edit.

    Attributes:
        patch: what it wrote; ``None`` where it failed.
        failure: why it failed.
        seconds: that it took.
    """

    patch: EditPatch | None
    failure: str | None
    seconds: float


class Journal:
    """The folder of one run.

    ``run.json`` says what the run is; ``records.jsonl`` holds a line per finished case; ``patches/`` the steps of the joint
    edit of a batch or sequential run, a line each in ``steps.jsonl`` once its patch is there. Several processes share the
    folder: each writes its finished cases to a file of its own.

    Raises:
        EditError: the folder holds another run, is damaged, or cannot be written.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = make_folder(folder)
        group = current_group()
        self.path = self.folder / (RECORDS if group.leads else f"records-{group.rank}.jsonl")
        self.records = group.run_on_all(lambda: self._open(dict(identity)) if group.leads else {})[0]

    def append(self, record: CaseRecord) -> None:
        """Add a finished case; it is on disk when this returns."""
        _append(self.path, record.to_dict())
        self.records[record.id] = record

    def tidy(self) -> None:
        """Once the report holds all records in one file: remove those of the other processes."""
        for path in self.folder.glob("records-*.jsonl"):
            path.unlink()

    def add_step(self, number: int, step: Step) -> None:
        """Keep step ``number`` (from 0) of a joint edit; it is on disk when this returns."""
        if step.patch is not None:
            step.patch.save(self._patch(number))
        _append(self.folder / PATCHES / STEPS, {"step": number, "failure": step.failure, "seconds": step.seconds})

    def steps(self) -> list[Step]:
        """The finished steps of the interrupted run's joint edit, in order."""
        path = self.folder / PATCHES / STEPS

        def load(number: int, record: Mapping[str, Any]) -> Step:
            if record["step"] != number:
                raise ValueError(f"step {record['step']} stands where step {number} belongs")
            failure = record["failure"]
            patch = EditPatch.load(self._patch(number)) if failure is None else None
            return Step(patch, failure, float(record["seconds"]))

        return _read(path, load) if path.exists() else []

    def _patch(self, number: int) -> Path:
        return self.folder / PATCHES / f"{number:06d}.safetensors"

    def _open(self, identity: dict[str, Any]) -> dict[str, CaseRecord]:
        """Claim the folder for a run; what it has finished, by case."""
        self._claim(identity)
        files = [self.folder / RECORDS, *sorted(self.folder.glob("records-*.jsonl"))]
        records = [record for path in files if path.exists() for record in _read(path, _case)]
        return {record.id: record for record in records}

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / RECORDS).exists():
                raise EditError(f"{self.folder} holds {RECORDS} but no {RUN}. Give another folder, or remove the file.")
            write_text(path, json.dumps(identity, indent=2))
            return
        with _reading(path):
            known = json.loads(path.read_bytes())
            if not isinstance(known, dict):
                raise ValueError(f"it is a {type(known).__name__}, no object")
        differs = sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key))
        if differs:
            raise EditError(
                f"{self.folder} holds another run (its {', '.join(differs)} differ). Give another folder, or remove this one."
            )


def make_folder(folder: str | Path) -> Path:
    """The folder of a run, made where it does not exist; raises ``EditError`` where it cannot be."""
    try:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:  # ValueError: a null character
        raise EditError(f"The folder {str(folder)!r} cannot be made: {error}. Give another one.") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; raises ``EditError`` where it cannot be written."""
    try:
        files.write_text(path, text)
    except PatchError as error:
        raise EditError(str(error)) from error


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON; it is on disk when this returns."""
    make_folder(path.parent)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: half of a surrogate pair
        raise EditError(
            f"Cannot write to {path}: {error}. What is finished stays; make room, and start the run again."
        ) from error


def _read(path: Path, load: Callable[[int, Any], Line]) -> list[Line]:
    """The finished lines; a last one that was cut off by an interruption is removed from the file."""
    with _reading(path):
        whole = path.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        if len(complete) < len(whole):
            path.write_bytes(complete)
        lines = json_lines(complete.decode())
        return [load(number, json.loads(line)) for number, (_, line) in enumerate(lines)]


def _case(number: int, record: Mapping[str, Any]) -> CaseRecord:
    return CaseRecord.from_dict(record)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except EditError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EditError(f"{path} is damaged ({error}). Remove it to evaluate anew.") from error
