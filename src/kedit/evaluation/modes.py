"""The edits of a run: each case's alone in the model, or all facts together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kedit.edit import Edit
from kedit.editors.base import Editor
from kedit.errors import ConfigError, DependencyError, EditError, KEditError, ProcessError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.journal import Journal, Step
from kedit.patch import EditPatch
from kedit.patch.ledger import Ledger
from kedit.regularizers import Regularizer
from kedit.utils.distributed import current_group
from kedit.utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FATAL_ERRORS = (ConfigError, DependencyError, ProcessError)  # would fail for every case, or says nothing about this one


@contextmanager
def edited(model: PreTrainedModel, patch: EditPatch, *, force: bool = True) -> Iterator[None]:
    """The model carries ``patch`` inside; it is as before afterwards. With ``force``, its base is not compared."""
    patch.apply(model, force=force)
    try:
        yield
    finally:
        patch.revert(model)


def propose_each(
    editor: Editor, regularizers: Sequence[Regularizer], cases: Sequence[EditCase]
) -> dict[str, EditPatch | str]:
    """By case: the patch that writes its facts on the unedited model, or why there is none."""
    single = [case for case in cases if not case.more]
    patches: dict[str, EditPatch | str] = {}
    try:
        made = editor.propose([case.edit for case in single], list(regularizers)) if single else []
        patches.update(zip((case.id for case in single), made, strict=True))
    except FATAL_ERRORS:
        raise
    except KEditError:
        pass  # which one fails shows below
    for case in cases:
        if case.id in patches:
            continue
        try:
            if not case.more:
                patches[case.id] = editor.propose(case.edit, list(regularizers))[0]
                continue
            with editor.unchecked():
                result = editor.apply(case.edits, list(regularizers))
            result.revert()
            patches[case.id] = result.patch
        except FATAL_ERRORS:
            raise
        except KEditError as error:
            patches[case.id] = str(error)
    return patches


class JointEdit:
    """The edit of a batch (one step) or sequential run.

    Attributes:
        patches: of the steps that succeeded, in order.
        failures: why the others did not, by case.
        seconds: that editing took, in the interrupted runs before this one too.
    """

    def __init__(
        self,
        editor: Editor,
        regularizers: Sequence[Regularizer],
        steps: Sequence[Sequence[EditCase]],
        journal: Journal | None,
    ) -> None:
        self.editor, self.regularizers, self.steps, self.journal = editor, list(regularizers), steps, journal
        self.patches: list[EditPatch] = []
        self.failures: dict[str, str] = {}
        self.seconds = 0.0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The edited model inside; unedited again outside, whatever happens.

        Raises:
            EditError: no step succeeded; or as ``Editor.apply`` for a batch.
        """
        clean = not Ledger.of(self.editor.model).touched
        try:
            self._write()
            if not self.patches:
                raise EditError(f"No edit succeeded. The first: {next(iter(self.failures.values()), 'none was tried')}")
            yield
        finally:
            self._take_back(clean)

    def _write(self) -> None:
        group, journal = current_group(), self.journal
        known = group.run_on_all(lambda: journal.steps() if journal is not None and group.leads else [])[0]
        with Progress(sum(map(len, self.steps)), "editing") as progress:
            for number, cases in enumerate(self.steps):
                edits = [edit for case in cases for edit in case.edits]
                if number < len(known):
                    step = known[number]
                    self._again(step, edits)
                else:
                    step = self._new(number, edits)
                if step.failure is not None:
                    self.failures |= {case.id: step.failure for case in cases}
                self.seconds += step.seconds
                progress.advance(len(cases))

    def _again(self, step: Step, edits: list[Edit]) -> None:
        """Put a step of the interrupted run back."""
        if step.patch is not None:
            self.patches.append(step.patch)
            self.editor.reapply(step.patch, edits, self.regularizers)

    def _new(self, number: int, edits: list[Edit]) -> Step:
        start = time.perf_counter()
        patch, failure = None, None
        try:
            with self.editor.unchecked():  # the probes ask more
                patch = self.editor.apply(edits, self.regularizers).patch
            self.patches.append(patch)
        except FATAL_ERRORS:
            raise
        except KEditError as error:
            if len(self.steps) == 1:
                raise
            failure = str(error)
        step = Step(patch, failure, time.perf_counter() - start)
        group, journal = current_group(), self.journal
        if journal is not None:
            group.run_on_all(lambda: journal.add_step(number, step) if group.leads else None)
        return step

    def _take_back(self, clean: bool) -> None:
        """Revert; all at once where the model carried nothing before, since each single revert sums up all others."""
        ledger = Ledger.of(self.editor.model)
        if clean:
            ledger.revert_all()
            return
        for patch in reversed(self.patches):
            if ledger.carries(patch):
                patch.revert(self.editor.model)
