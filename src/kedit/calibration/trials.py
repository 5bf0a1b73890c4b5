"""Trials: candidates evaluated on parts of the development cases, each once, kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.calibration.candidates import Candidate, Gamma
from kedit.editors import presets
from kedit.editors.value_editor import ValueEditor
from kedit.evaluation import EditCase, EvalReport
from kedit.evaluation.journal import Journal
from kedit.evaluation.probing import EvalOptions
from kedit.evaluation.provenance import digest
from kedit.evaluation.runner import CHUNK, Run
from kedit.evaluation.shared_values import RememberingEngine
from kedit.keys.second_moment import SecondMoments
from kedit.regularizers import Regularizer, describe
from kedit.regularizers.base import is_adaptive
from kedit.utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trials:
    """What was tried of one editor on one model.

    Args:
        model: unedited.
        tokenizer: its tokenizer.
        kind: the editor's class.
        moments: second moments of every block that is tried.
        contexts: of the optimisation.
        regularizer: makes the regularizer of a γ.
        folder: where finished parts are kept.
        compute_dtype: of the optimisation.
        about: what else a finished part depends on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: type[ValueEditor],
        moments: SecondMoments,
        contexts: Sequence[str],
        regularizer: Callable[[Gamma], Regularizer] | None,
        folder: Path,
        compute_dtype: str | None,
        about: str,
    ) -> None:
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.moments, self.contexts, self.regularizer = moments, contexts, regularizer
        self.folder, self.compute_dtype, self.about = folder, compute_dtype, about
        self._engine: RememberingEngine | None = None
        self._reports: dict[str, EvalReport] = {}
        self._subsets: dict[tuple[int, ...], SecondMoments] = {}

    def report(self, candidate: Candidate, parts: Sequence[Sequence[EditCase]], progress: Progress) -> EvalReport:
        """One candidate on some parts of the cases, as one report."""
        found = []
        for cases in parts:
            key = self._key(candidate, cases)
            if key not in self._reports:
                with Progress.hidden():  # one bar for the whole calibration
                    self._reports[key] = self._evaluate(candidate, cases, key)
                progress.advance(len(cases))
            found.append(self._reports[key])
        return EvalReport([record for report in found for record in report.records], found[0].meta)

    def _evaluate(self, candidate: Candidate, cases: Sequence[EditCase], key: str) -> EvalReport:
        chosen = [] if candidate.gamma is None or self.regularizer is None else [self.regularizer(candidate.gamma)]
        config = candidate.config
        if any(map(is_adaptive, chosen)) and "steps" not in candidate.changed:  # as editors do
            config = config.replace(steps=round(presets.ADAPTIVE_STEPS * config.steps))
        editor = self.kind(
            self.model,
            self.tokenizer,
            config.replace(compute_dtype=self.compute_dtype),
            moments=self._moments_of(config.layers),
            contexts=self.contexts,
        )
        if self._engine is None:
            self._engine = RememberingEngine(editor.arch)
        editor.engine = self._engine
        run = Run(self.model, self.tokenizer, list(cases), editor, chosen, "single", EvalOptions(exact=False), CHUNK, 1)
        return EvalReport(run.go(Journal(self.folder / key, run.identity())), {})  # its tables and pages are not needed

    def _moments_of(self, layers: tuple[int, ...]) -> SecondMoments:
        """The moments of some blocks; the same object each time, which keeps what was computed from them."""
        if layers not in self._subsets:
            self._subsets[layers] = SecondMoments({layer: self.moments[layer] for layer in layers})
        return self._subsets[layers]

    def _key(self, candidate: Candidate, cases: Sequence[EditCase]) -> str:
        chosen: dict[str, Any] = {}
        if candidate.gamma is not None and self.regularizer is not None:
            chosen = describe(self.regularizer(candidate.gamma))
        return digest([self.about, candidate.config.to_dict(), chosen, [case.to_dict() for case in cases]])
