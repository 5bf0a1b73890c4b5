"""``kedit.json`` and ``kedit-patches/``: the patches that a checkpoint folder carries, and in which runs they were applied."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kedit.errors import PatchError
from kedit.patch.card import drop_card, model_card, write_card
from kedit.patch.content import PatchContent
from kedit.patch.format import identity, plain, read_patch, write_patch
from kedit.utils.files import parse_json

RECORD, FOLDER = "kedit.json", "kedit-patches"
_FILE = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A patch on record.

    Attributes:
        run: the number of the run that applied it; a 16-bit weight is rounded once in each.
        provenance: of the patch.
        fingerprints: of the patch, without those of weights from which it was taken away.
        file: where its file is in the folder; ``None`` where the record names none, as those of older versions.
        source: the folder that has the file, or the patch itself; ``None`` where neither is at hand.
    """

    run: int
    provenance: dict[str, Any]
    fingerprints: dict[str, str]
    file: str | None = None
    source: Path | PatchContent | None = None

    @classmethod
    def of(cls, patch: PatchContent, run: int) -> Entry:
        """The entry of a patch that is applied now."""
        file = f"{FOLDER}/{identity(patch)}.safetensors"
        return cls(run, plain(patch.provenance, RECORD), patch.fingerprints, file, patch)

    @property
    def record(self) -> dict[str, Any]:
        """Return the entry as it is written to the record."""
        file = {} if self.file is None else {"file": self.file}
        return {"run": self.run, **file, "provenance": self.provenance, "fingerprints": self.fingerprints}

    def load(self) -> PatchContent | None:
        """The patch; ``None`` where its file is not kept, or holds weights that no longer carry it.

        Raises:
            PatchError: the file is damaged, or another patch.
        """
        if not isinstance(self.source, Path):
            return self.source
        assert self.file is not None
        patch = read_patch(self.source / self.file)
        if not self.file.endswith(f"/{identity(patch)}.safetensors"):
            raise PatchError(
                f"{self.source / self.file} is not the patch that {RECORD} names. Restore or remove the file."
            )
        return patch if patch.fingerprints == self.fingerprints else None

    def describe(self) -> str:
        """The edits of the patch in a line."""
        edits = self.provenance.get("edits")
        edits = edits if isinstance(edits, list) else []
        texts = [
            f"{str(edit.get('prompt', '?')).replace('{}', str(edit.get('subject', '?')))} → {edit.get('target_new', '?')}"
            for edit in edits
            if isinstance(edit, dict)
        ]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        said = "; ".join(texts[:3]) + more if texts else "no edits named"
        return f"{self.provenance.get('editor', 'unknown editor')} ({said})"

    def restricted(self, names: Iterable[str]) -> Entry:
        """The entry with those of its weights alone that are in ``names``."""
        kept = set(names)
        return replace(self, fingerprints={key: value for key, value in self.fingerprints.items() if key in kept})


def entries(folder: Path) -> list[Entry]:
    """The patches that a checkpoint carries according to its record, in order; empty where there is no record.

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
    if not isinstance(known, list) or not all(map(_is_record, known)):
        raise PatchError(f"{path} is not a record that kedit wrote. Remove or repair it.")
    records: list[dict[str, Any]] = plain(known, str(path))
    return [_entry(folder, item) for item in records]


def _is_record(item: Any) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("fingerprints"), dict):
        return False
    file = item.get("file")
    return file is None or (isinstance(file, str) and _FILE.fullmatch(file) is not None)


def _entry(folder: Path, item: dict[str, Any]) -> Entry:
    run, file, provenance = item.get("run"), item.get("file"), item.get("provenance")
    source = folder if file is not None and (folder / file).is_file() else None
    known = provenance if isinstance(provenance, dict) else {}
    return Entry(run if type(run) is int else 0, known, item["fingerprints"], file, source)


def appended(folder: Path, patches: Sequence[PatchContent]) -> list[Entry]:
    """The patches of a checkpoint after one more run with ``patches``."""
    known = entries(folder)
    run = 1 + max((item.run for item in known), default=0)
    return [*known, *(Entry.of(patch, run) for patch in patches)]


def write_record(folder: Path, known: Sequence[Entry]) -> None:
    """Write the record, the patches' files and a model card into a new checkpoint folder; none of them where there is no patch."""
    if not known:
        drop_card(folder)
        return
    content = {"kedit_version": version("kedit"), "patches": [item.record for item in known]}
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for item in known:
        if item.file is None or item.source is None:
            continue
        target = folder / item.file
        target.parent.mkdir(exist_ok=True)
        if isinstance(item.source, Path):
            shutil.copyfile(item.source / item.file, target)
        else:
            write_patch(target, item.source)
    weights = dict.fromkeys(name for item in known for name in item.fingerprints)
    files = [item.file for item in known if item.file is not None and item.source is not None]
    write_card(folder, model_card([item.provenance for item in known], list(weights), "model", files=files))


def ways_of_running(known: Sequence[Entry], patches: Sequence[PatchContent]) -> list[list[int]]:
    """List how ``patches`` may have been put onto a checkpoint, by patch the run: as recorded, in one, each in its own."""
    number = len(patches)
    ways = [[0] * number, list(range(number))]
    left = iter(known)
    recorded = []
    for patch in patches:
        entry = next((item for item in left if item.fingerprints == patch.fingerprints), None)
        if entry is None:
            return ways
        recorded.append(entry.run)
    return [recorded, *ways]
