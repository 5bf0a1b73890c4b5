"""Running a sequence of edits, and going on where a run ended."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.edit import Edit, as_edits
from kedit.editors.observers import warn_of_ineffective
from kedit.errors import ConfigError, IneffectiveEditWarning, NonFiniteError, PatchError, PatchMismatchError
from kedit.evaluation.guard import Guard, GuardError
from kedit.models.lock import editing
from kedit.patch import EditPatch
from kedit.patch.ledger import Ledger
from kedit.prompts.predictions import EditCheck, Prediction
from kedit.regularizers import Choice
from kedit.sequential.folder import HEADER, entries, held, is_begun, write_json
from kedit.sequential.head import begin
from kedit.utils.files import parse_json, reading
from kedit.utils.progress import Progress, logger
from kedit.utils.terminal import printable
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from kedit.editors.base import Editor


@dataclass(frozen=True)
class Refusal:
    """Edits that were rolled back, and why."""

    edits: list[Edit]
    reason: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class JournalResult:
    """The result of a run: kept and refused edits.

    Attributes:
        patches: of the kept edits, in order.
        refused: what was rolled back.
        resumed: how many steps were found in the journal.
        checks: per kept edit, what the model said of it before its step and says at the end of the run, with all edits; empty
            where nothing was kept.
    """

    patches: list[EditPatch] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    resumed: int = 0
    checks: list[EditCheck] = field(default_factory=list)

    @property
    def all_said(self) -> bool | None:
        """Whether the model says the target of every kept edit at the end; ``None`` where it was not asked."""
        return all(check.after.said for check in self.checks) if self.checks else None

    @property
    def patch(self) -> EditPatch:
        """All kept edits as one patch."""
        merged = EditPatch.merge(self.patches)
        before = [check.before.to_dict() for check in self.checks if check.before is not None]
        if self.checks and len(before) == len(self.checks):
            merged.provenance |= {"before": before, "after": [check.after.to_dict() for check in self.checks]}
        return merged

    def report(self) -> str:
        """Describe how many edits were kept and what was refused: a text for people."""
        edits = sum(len(patch.provenance.get("edits", [])) for patch in self.patches)
        resumed = f", {self.resumed} step(s) of them from the journal" if self.resumed else ""
        lines = [f"{edits} edit(s) kept in {len(self.patches)} step(s), {len(self.refused)} step(s) refused{resumed}"]
        if self.checks:
            said = sum(check.after.said for check in self.checks)
            lines.append(f"  in the end the model says {said} of {len(self.checks)} target(s)")
        for check in self.checks:
            lines.append(f"  {check.edit.text} → {check.edit.target_new}")
            lines += [f"    {line}" for line in check.lines()]
        for refusal in self.refused:
            texts = "; ".join(f"{edit.text} -> {edit.target_new}" for edit in refusal.edits[:3])
            lines.append(f"  refused: {texts}: {refusal.reason}")
        return "\n".join(map(printable, lines))


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
    of edits may have grown at its end. An editor that remembers keys of earlier edits (AlphaEdit) gets those that the run
    began with from the journal, unless it has them already; those of the kept edits come with their patches.

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
    check_whole("batch_size", batch_size, 1)
    if guard is not None and not isinstance(guard, Guard):
        raise ConfigError(f"guard is a kedit.Guard or None, not {guard!r:.60}.")
    chosen = as_edits(edits)
    steps = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    if Ledger.of(editor.model).touched:
        raise PatchMismatchError(
            "The model carries edits already. Revert them, or load the model anew, before the run."
        )
    where = Path(folder)
    with held(where), editing(editor.model):
        editor.prepare()  # contexts and moments belong to the unedited model
        begin(where, editor, regularizer, guard, batch_size)
        result = JournalResult()
        known = entries(where)
        with _all_or_nothing(editor, result), Progress(len(steps), "journal", "step") as progress:
            for number, step in enumerate(steps):
                if number < len(known):
                    _repeat(known[number], step, editor, regularizer, result)
                else:
                    _write(where, number, step, editor, regularizer, guard, result)
                progress.advance()
            if result.patches:
                result.checks = _at_the_end(editor, result.patches)
                warn_of_ineffective(result.checks, editor.config)
    return result


def _at_the_end(editor: Editor, patches: Sequence[EditPatch]) -> list[EditCheck]:
    """Checks of every kept edit once all are written: a later step may have undone an earlier one."""
    edits: list[Edit] = []
    before: list[Prediction | None] = []
    for patch in patches:
        own = [Edit.from_dict(record) for record in patch.provenance.get("edits", [])]
        known = [Prediction.from_dict(record) for record in patch.provenance.get("before", [])]
        edits += own
        before += known if len(known) == len(own) else [None] * len(own)
    return [replace(check, before=old) for check, old in zip(editor.check(edits), before, strict=True)]


def read_journal(folder: str | Path) -> list[EditPatch]:
    """The patches of the kept edits, in order; merge them, or apply them one by one.

    Raises:
        PatchError: the folder is no journal, or damaged.
    """
    if not is_begun(folder):
        raise PatchError(f"There is no journal in {str(folder)!r}: it has no {HEADER}. Check the path.")
    return [EditPatch.load(path) for path in entries(Path(folder)) if path.suffix == ".safetensors"]


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IneffectiveEditWarning)  # said once, at the end, of all edits
            applied = editor.apply(step, regularizer, guard=guard)
    except (GuardError, NonFiniteError) as error:
        scores = error.report.scores if isinstance(error, GuardError) else {}
        finite = {name: value for name, value in scores.items() if value - value == 0}
        record = {"edits": [edit.to_dict() for edit in step], "reason": str(error), "scores": finite}
        write_json(where / f"{number:06}.refused.json", record)
        logger.info("Step %d refused: %s", number, error)
        result.refused.append(Refusal(step, str(error), finite))
        return
    result.patches.append(applied.patch)  # before it is durable: what fails takes it back from the model too
    applied.patch.save(where / f"{number:06}.safetensors")


@contextmanager
def _all_or_nothing(editor: Editor, result: JournalResult) -> Iterator[None]:
    """Give the model its original weights back where a run breaks off; the journal keeps what was done."""
    try:
        yield
    except BaseException:
        Ledger.of(editor.model).revert_all()
        result.patches.clear()
        raise


def _check_edits(path: Path, known: Any, step: Sequence[Edit]) -> None:
    if known != [edit.to_dict() for edit in step]:
        raise PatchError(
            f"{path} is of other edits than those given at its place. Give the same edits in the same order (more may "
            "follow at the end), or use a new folder."
        )
