"""Long sequences of edits that survive a crash: each kept edit is on the disk before the next one begins.

A journal is a folder: ``journal.json`` says what the run is, ``000000.safetensors``, ``000001.safetensors``, ... are the
patches of the kept edits (each an ordinary patch file), ``000002.refused.json`` stands for one that was rolled back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kedit.edit import Edit, as_edits
from kedit.errors import ConfigError, NonFiniteError, PatchError, PatchMismatchError
from kedit.fingerprint import model_fingerprint, tensor_fingerprint
from kedit.guard import Guard, GuardError
from kedit.ledger import Ledger
from kedit.patch import EditPatch
from kedit.patch.files import parse_json, reading, write_whole
from kedit.pipeline import describe
from kedit.progress import Progress, logger
from kedit.regularizers import Choice, resolve

if TYPE_CHECKING:
    from kedit.editors.base import Editor

HEADER = "journal.json"
FORMAT = "kedit-journal"
_ENTRY = re.compile(r"([0-9]{6})\.(safetensors|refused\.json)", re.ASCII)


@dataclass(frozen=True)
class Refusal:
    """Edits that were rolled back, and why."""

    edits: list[Edit]
    reason: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class JournalResult:
    """What a run left on the model.

    Attributes:
        patches: of the kept edits, in order.
        refused: what was rolled back.
        resumed: how many steps were found in the journal.
    """

    patches: list[EditPatch] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    resumed: int = 0

    @property
    def patch(self) -> EditPatch:
        """All kept edits as one patch."""
        return EditPatch.merge(self.patches)

    def report(self) -> str:
        """How many edits were kept and what was refused: a text for people."""
        edits = sum(len(patch.provenance.get("edits", [])) for patch in self.patches)
        found = f", {self.resumed} step(s) of them from the journal" if self.resumed else ""
        lines = [f"{edits} edit(s) kept in {len(self.patches)} step(s), {len(self.refused)} step(s) refused{found}"]
        for refusal in self.refused:
            texts = "; ".join(f"{edit.text} -> {edit.target_new}" for edit in refusal.edits[:3])
            lines.append(f"  refused: {texts}: {refusal.reason}")
        return "\n".join(lines)


def run_journal(
    folder: str | Path,
    editor: Editor,
    edits: Edit | Iterable[Edit],
    regularizer: Choice = None,
    *,
    guard: Guard | None = None,
    batch_size: int = 1,
) -> JournalResult:
    """Write edits into the editor's model one step after another, each kept one durably; go on where a run ended.

    Called again with the same editor settings on the unedited model, it puts the kept patches back (each checks that
    the weights are those it was made for) and goes on with the next edit; the result is that of an unbroken run. The list
    of edits may have grown at its end.

    Args:
        folder: the journal; made where it does not exist.
        editor: on the model as it was at the start of the first run.
        edits: all edits, from the first.
        regularizer: as for ``editor.apply``.
        guard: limits for each step; what misses one is rolled back, noted and passed over.
        batch_size: edits per step.

    Raises:
        PatchError: the journal is damaged, in use, or of another run; or there is no space.
        PatchMismatchError: the model is not the one that the journal began with.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
    chosen = as_edits(edits)
    steps = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    if Ledger.of(editor.model).touched:
        raise PatchMismatchError(
            "The model carries edits already. Revert them, or load the model anew, before the run."
        )
    where = Path(folder)
    with _held(where):
        editor.prepare()  # contexts and moments belong to the unedited model
        _check_header(where, _header(editor, regularizer, guard, batch_size))
        result = JournalResult()
        entries = _entries(where)
        with _all_or_nothing(editor, result), Progress(len(steps), "journal", "step") as progress:
            for number, step in enumerate(steps):
                if number < len(entries):
                    _repeat(entries[number], step, editor, regularizer, result)
                else:
                    _write(where, number, step, editor, regularizer, guard, result)
                progress.advance()
    return result


def read_journal(folder: str | Path) -> list[EditPatch]:
    """The patches of the kept edits, in order; merge them, or apply them one by one."""
    return [EditPatch.load(path) for path in _entries(Path(folder)) if path.suffix == ".safetensors"]


def _repeat(path: Path, step: list[Edit], editor: Editor, regularizer: Choice, result: JournalResult) -> None:
    """Do again what the journal says of one step."""
    result.resumed += 1
    if path.suffix == ".safetensors":
        patch = EditPatch.load(path)
        _check_edits(path, patch.provenance.get("edits"), step)
        editor.reapply(patch, step, regularizer)
        result.patches.append(patch)
        return
    with reading(path):
        record = parse_json(path.read_bytes(), str(path))
    if not isinstance(record, dict) or not isinstance(record.get("reason"), str):
        raise PatchError(f"{path} is not a note of a refused edit. The journal is damaged.")
    _check_edits(path, record.get("edits"), step)
    scores = record.get("scores")
    result.refused.append(Refusal(step, record["reason"], scores if isinstance(scores, dict) else {}))


def _write(
    where: Path,
    number: int,
    step: list[Edit],
    editor: Editor,
    regularizer: Choice,
    guard: Guard | None,
    result: JournalResult,
) -> None:
    """One new step: edit, check, make durable."""
    try:
        found = editor.apply(step, regularizer, guard=guard)
    except (GuardError, NonFiniteError) as error:
        scores = error.report.scores if isinstance(error, GuardError) else {}
        finite = {name: value for name, value in scores.items() if value - value == 0}
        record = {"edits": [edit.to_dict() for edit in step], "reason": str(error), "scores": finite}
        _write_json(where / f"{number:06}.refused.json", record)
        logger.info("Step %d refused: %s", number, error)
        result.refused.append(Refusal(step, str(error), finite))
        return
    result.patches.append(found.patch)  # before it is durable: what fails takes it back from the model too
    found.patch.save(where / f"{number:06}.safetensors")


@contextmanager
def _all_or_nothing(editor: Editor, result: JournalResult) -> Iterator[None]:
    """Where a run breaks off, give the model its original weights back; the journal keeps what was done."""
    try:
        yield
    except BaseException:
        Ledger.of(editor.model).revert_all()
        result.patches.clear()
        raise


def _header(editor: Editor, regularizer: Choice, guard: Guard | None, batch_size: int) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON."""
    moments = editor.moments if editor.needs_moments else {}
    limits = None if guard is None else {name: getattr(guard, name) for name in Guard.limits()}
    if guard is not None and limits is not None:
        limits["texts"] = list(guard.texts_for(editor.model))
        limits["cases"] = [case.to_dict() for case in guard.cases]
    header = {
        "format": FORMAT,
        "format_version": 1,
        "kedit_version": version("kedit"),
        "model": model_fingerprint(editor.model),
        "editor": editor.name,
        "config": editor.config.to_dict(),
        "regularizers": [describe(item) for item in resolve(regularizer)],
        "contexts": list(editor.contexts),
        "moments": {str(layer): tensor_fingerprint(moments[layer].matrix) for layer in moments},
        "batch_size": batch_size,
        "guard": limits,
    }
    found: dict[str, Any] = json.loads(json.dumps(header))
    return found


def _check_header(where: Path, header: dict[str, Any]) -> None:
    path = where / HEADER
    if not path.exists():
        _write_json(path, header)
        return
    with reading(path):
        known = parse_json(path.read_bytes(), str(path))
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise PatchError(f"{path} is not the head of a kedit journal. Name a new folder for the journal.")
    if known.get("model") != header["model"]:
        raise PatchMismatchError(
            f"The model is not the one that the journal {where} began with. Load that model, unedited, to go on."
        )
    other = [key for key in header if key != "kedit_version" and known.get(key) != header[key]]
    if other:
        raise PatchError(
            f"The journal {where} was begun with another {', '.join(other)}, so going on would not give the same result. "
            "Use the same settings, or a new folder."
        )


def _check_edits(path: Path, known: Any, step: Sequence[Edit]) -> None:
    if known != [edit.to_dict() for edit in step]:
        raise PatchError(
            f"{path} is of other edits than those given at its place. Give the same edits in the same order (more may "
            "follow at the end), or use a new folder."
        )


def _entries(where: Path) -> list[Path]:
    """The files of all steps in order; raises where one is missing or there twice."""
    with reading(where):
        found = sorted(path for path in where.iterdir() if _ENTRY.fullmatch(path.name)) if where.exists() else []
    for number, path in enumerate(found):
        if int(path.name[:6]) != number:
            raise PatchError(
                f"The journal {where} has no single file for step {number:06}; found {path.name}. It is damaged."
            )
    return found


def _write_json(path: Path, record: dict[str, Any]) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(json.dumps(record, indent=1).encode() + b"\n")

    write_whole(path, write)


@contextmanager
def _held(where: Path) -> Iterator[None]:
    """Keep a journal for this process, and remove what a killed one was writing."""
    from kedit.patch.folders import lock_folder, unlock

    try:
        where.mkdir(parents=True, exist_ok=True)
        if not (where / HEADER).exists() and any(not name.startswith(".") for name in os.listdir(where)):
            raise PatchError(f"{where} holds other things and no {HEADER}. Name a new folder for the journal.")
        lock = lock_folder(where)
    except OSError as error:
        raise PatchError(f"Cannot use {where} as a journal: {error}. Name a folder.") from error
    if lock is None:
        raise PatchError(f"The journal {where} is in use by another process. Wait for it, or name another folder.")
    try:
        for path in where.glob(".*.partial"):
            path.unlink(missing_ok=True)
        yield
    finally:
        unlock(lock)
