"""One edited model per case: where the patches come from, and the model with one of them applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from kedit.editors import get_editor as make_editor
from kedit.editors.base import Editor
from kedit.errors import ConfigError, EditError
from kedit.evaluation.cases import EditCase, check_cases
from kedit.evaluation.modes import edited, propose_each
from kedit.patch import EditPatch
from kedit.regularizers import Choice, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = str | Editor | EditPatch | Mapping[str, EditPatch]
"""An editor by name, an editor, one patch for all cases, or a patch per case id."""

CHUNK = 32  # cases whose values are optimised together


class Patches:
    """The patch of each case, made when it is asked for.

    Attributes:
        cases: all cases.
        label: the names of the editor and its regularizers.
        failures: why a case could not be edited, by id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: EditCase | Iterable[EditCase],
        source: Source,
        regularizer: Choice = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(source, str | Editor | EditPatch | Mapping):
            raise ConfigError(
                f"editor is an editor's name, an editor, a patch or a patch per case id, not {source!r}. Try 'rome'."
            )
        self.model = model
        self.cases = check_cases([cases] if isinstance(cases, EditCase) else cases)
        self.regularizers = resolve(regularizer)
        self.failures: dict[str, str] = {}
        self.given = isinstance(source, EditPatch | Mapping)
        self.source: Editor | EditPatch | Mapping[str, EditPatch]
        if isinstance(source, str):
            self.source = make_editor(source, model, tokenizer, **(config or {}))
        else:
            self.source = source
            if config:
                raise ConfigError("config belongs to an editor given by name; an editor object has its own.")
        if self.given and self.regularizers:
            raise ConfigError("A patch is written already, so there is nothing to regularize. Name an editor instead.")
        if isinstance(self.source, Editor) and self.source.model is not model:
            raise ConfigError("The editor was made for another model object. Make it with the model that is looked at.")
        if isinstance(self.source, Mapping):
            missing = [case.id for case in self.cases if case.id not in self.source]
            if missing:
                raise EditError(f"There is no patch for {len(missing)} of {len(self.cases)} cases: {missing[0]!r}, ...")
        self.label = self._label()

    def chunks(self, size: int = CHUNK) -> Iterator[list[tuple[EditCase, EditPatch]]]:
        """Cases with their patches, some at a time; those that fail are left out and noted."""
        for start in range(0, len(self.cases), size):
            part = self.cases[start : start + size]
            made = self._patches(part)
            self.failures |= {id: patch for id, patch in made.items() if isinstance(patch, str)}
            pairs = [(case, made[case.id]) for case in part]
            yield [(case, patch) for case, patch in pairs if isinstance(patch, EditPatch)]

    def all(self) -> dict[str, EditPatch]:
        """Every patch by case id: to be used again."""
        return {case.id: patch for chunk in self.chunks() for case, patch in chunk}

    def edited(self, patch: EditPatch) -> AbstractContextManager[None]:
        """The model carries ``patch`` inside; it is as before afterwards."""
        return edited(self.model, patch, force=not self.given)  # one just made for this model needs no check

    def _patches(self, cases: Sequence[EditCase]) -> Mapping[str, EditPatch | str]:
        """By case, its patch or why there is none."""
        if isinstance(self.source, Editor):
            return propose_each(self.source, self.regularizers, cases)
        return (
            dict.fromkeys((case.id for case in cases), self.source)
            if isinstance(self.source, EditPatch)
            else self.source
        )

    def _label(self) -> str:
        if isinstance(self.source, Editor):
            return " + ".join([self.source.name.upper(), *(item.name.upper() for item in self.regularizers)])
        first = self.source if isinstance(self.source, EditPatch) else next(iter(self.source.values()))
        names = [item["name"] for item in first.provenance.get("regularizers", [])]
        return " + ".join(str(name).upper() for name in [first.provenance.get("editor", "patch"), *names])
