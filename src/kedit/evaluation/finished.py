"""Measuring what is finished: a patch on its model, or an edited model beside the model that it was made from."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kedit.errors import ConfigError
from kedit.evaluation.cases import EditCase, drop_edited
from kedit.evaluation.kept import BeforeScores
from kedit.evaluation.modes import edited
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import describe_model, digest
from kedit.evaluation.records import CaseRecord, CaseScore
from kedit.evaluation.runner import Run
from kedit.keys.estimate import tokenizer_fingerprint
from kedit.models import ModelArch, unwrap
from kedit.models.fingerprint import model_fingerprint, tensor_fingerprint
from kedit.patch import EditPatch
from kedit.utils.progress import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FinishedRun(Run):
    """One evaluation in which nothing is edited: "before" is the base model, "after" the same with a patch, or another model.

    Raises:
        ConfigError: neither or both of ``patch`` and ``changed`` are given.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: list[EditCase],
        extent: EvalOptions,
        chunk: int,
        cache: bool = True,
        *,
        patch: EditPatch | None = None,
        changed: PreTrainedModel | None = None,
    ) -> None:
        if (patch is None) == (changed is None):
            raise ConfigError(
                "Give a patch that is measured on its model, or a base beside the edited model; not both."
            )
        self.patch, self.changed = patch, changed
        kept, dropped = drop_edited(cases)
        super().__init__(base, tokenizer, kept, None, None, "single", extent, chunk, 1, cache)
        self.dropped = dropped
        self.unnamed = self._unnamed(cases)

    def _unnamed(self, cases: list[EditCase]) -> int:
        """How many cases are about edits that the patch does not name; 0 where nothing is known."""
        named = [] if self.patch is None else self.patch.provenance.get("edits") or []
        if not named:
            return 0
        known = {(str(edit.get("subject")), str(edit.get("target_new"))) for edit in named if isinstance(edit, Mapping)}
        count = sum((case.edit.subject, case.edit.target_new) not in known for case in cases)
        if count:
            logger.warning("%d of %d cases are about edits that the patch does not name.", count, len(cases))
        return count

    def identity(self) -> dict[str, Any]:
        """As of every run, and what is measured."""
        if self.patch is None:
            assert self.changed is not None
            return {**super().identity(), "mode": "model", "changed": model_fingerprint(unwrap(self.changed))}
        parts = {
            name: {key: tensor_fingerprint(tensor) for key, tensor in delta.tensors().items()}
            for name, delta in self.patch.deltas.items()
        }
        return {**super().identity(), "mode": "patch", "patch": digest(parts)}

    def meta(self) -> dict[str, Any]:
        """The description of the run in its report."""
        known = super().meta()
        if self.patch is None:
            assert self.changed is not None
            return {
                **known,
                "editor": "edited model",
                "mode": "model",
                "model": describe_model(self.changed),
                "base": known["model"],
            }
        provenance = self.patch.provenance
        used = {"regularizers": provenance.get("regularizers") or [], "config": provenance.get("config")}
        named = {"editor": provenance.get("editor") or "patch", "mode": "patch", "patch": list(self.patch.deltas)}
        return {**known, **used, **named, "cases_not_in_patch": self.unnamed}

    def _fingerprints(self) -> dict[str, str]:
        if self.patch is None:
            return {}
        arch = ModelArch(self.model)
        return {name: tensor_fingerprint(arch.weight_of(name).stored) for name in self.patch.deltas}

    def _single(
        self, examiner: ProbeScorer, kept: BeforeScores, done: Mapping[str, CaseRecord]
    ) -> Generator[CaseRecord, None, None]:
        start = time.perf_counter()
        before: dict[str, CaseScore] = {}
        for cases in self._chunks():
            before |= {case.id: score for case, score in zip(cases, kept.scores(examiner, cases), strict=True)}
        shared = {"before": (time.perf_counter() - start) / len(self.cases)}
        with self._scorer_of_changed(examiner) as scorer:
            yield from self._asked_after(scorer, done, before, shared, {})

    @contextmanager
    def _scorer_of_changed(self, examiner: ProbeScorer) -> Iterator[ProbeScorer]:
        if self.patch is not None:
            with edited(self.model, self.patch, force=False):
                yield examiner
            return
        assert self.changed is not None
        other = ProbeScorer(self.changed, self.tokenizer, self.extent, self.cases)
        other.baseline = examiner.baseline  # what later scores are compared with is the base model's
        yield other


def check_same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raise ``ConfigError`` unless two models' tokenizers give the same tokens, without which nothing can be compared."""
    if tokenizer_fingerprint(one) != tokenizer_fingerprint(other):
        raise ConfigError(
            "The two models have different tokenizers, so their answers cannot be compared token by token."
        )
