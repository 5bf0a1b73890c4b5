"""Each case's edit alone in the model: proposed for many cases together, written and taken back one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kedit.editors.base import Editor
from kedit.errors import ConfigError, DependencyError, KEditError, ProcessError
from kedit.evaluation.cases import EditCase
from kedit.patch import EditPatch
from kedit.processes import alone
from kedit.regularizers import Regularizer

HOPELESS = (ConfigError, DependencyError, ProcessError)  # would fail for every case, or says nothing about this one


class SingleEdits:
    """The edits of a run that makes each one on the unedited model."""

    def __init__(self, editor: Editor, regularizers: Sequence[Regularizer]) -> None:
        self.editor, self.regularizers = editor, list(regularizers)

    def propose(self, cases: Sequence[EditCase]) -> dict[str, EditPatch | str]:
        """A patch, or why there is none, for every case that writes one fact."""
        plain = [case for case in cases if not case.more]
        if not plain:
            return {}
        with alone():
            try:
                found = self.editor.propose([case.edit for case in plain], self.regularizers)
                return {case.id: patch for case, patch in zip(plain, found, strict=True)}
            except HOPELESS:
                raise
            except KEditError:  # find the one that fails
                return {case.id: self._one(case) for case in plain}

    @contextmanager
    def in_place(self, case: EditCase, patch: EditPatch | None) -> Iterator[str | None]:
        """The edited model inside; yields why the edit failed, if it did."""
        with ExitStack() as stack:
            failure = None
            try:
                if patch is not None:
                    patch.apply(self.editor.model, force=True)
                    stack.callback(patch.revert, self.editor.model)
                else:
                    with alone(), self.editor.unchecked():
                        result = self.editor.apply(case.edits, self.regularizers)
                    stack.callback(result.revert)
            except HOPELESS:
                raise
            except KEditError as error:
                failure = str(error)
            yield failure

    def _one(self, case: EditCase) -> EditPatch | str:
        try:
            return self.editor.propose(case.edit, self.regularizers)[0]
        except HOPELESS:
            raise
        except KEditError as error:
            return str(error)
