"""Editing and asking, case by case or all at once."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, get_args

from kedit.editors.base import Editor
from kedit.errors import ConfigError, KEditError
from kedit.evaluation.cases import EditCase, drop_edited
from kedit.evaluation.journal import Journal
from kedit.evaluation.kept import BeforeScores
from kedit.evaluation.metrics import Running
from kedit.evaluation.modes import FATAL_ERRORS, JointEdit, edited, propose_each
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import describe_editor, describe_model, digest, environment, versions
from kedit.evaluation.records import CaseRecord, CaseScore
from kedit.keys.estimate import tokenizer_fingerprint
from kedit.models import unwrap
from kedit.models.fingerprint import model_fingerprint, tensor_fingerprint
from kedit.patch import EditPatch
from kedit.regularizers import Choice, resolve
from kedit.utils.distributed import alone, current_group
from kedit.utils.progress import Progress
from kedit.utils.validation import check_choice, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EvalMode = Literal["single", "batch", "sequential"]
CHUNK = 32  # cases whose values are optimised together in single mode


class Run:
    """One evaluation: what is edited and asked, in which mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: list[EditCase],
        editor: Editor | None,
        regularizer: Choice,
        mode: str,
        extent: EvalOptions,
        chunk: int,
        batch_size: int,
        cache: bool = True,
    ) -> None:
        check_choice("mode", mode, get_args(EvalMode))
        check_whole("chunk", chunk, 1)
        check_whole("batch_size", batch_size, 1)
        self.model, self.editor, self.mode, self.extent = model, editor, mode, extent
        self.regularizers = resolve(regularizer)
        if editor is None and self.regularizers:
            raise ConfigError("Without an editor there is nothing to regularize. Name an editor, or no regularizer.")
        self.chunk, self.batch_size, self.cache = chunk, batch_size, cache
        self.dropped = 0
        if mode != "single" and editor is not None:
            cases, self.dropped = drop_edited(cases)
        self.cases = cases
        self.tokenizer = tokenizer
        self.base = self._fingerprints()
        self.settings = self._settings()
        self.seconds: dict[str, float] = {}

    def identity(self) -> dict[str, Any]:
        """Settings by which a run is the same as another; the editor's contexts and second moments are made where missing."""
        texts = digest(list(self.extent.texts))
        with self._timed("prepare"):
            editor = describe_editor(self.editor)
        return {
            "versions": versions(),
            "cases": digest([case.to_dict() for case in self.cases]),
            "model": model_fingerprint(unwrap(self.model)),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **editor,
            **self.settings,
            "mode": self.mode,
            "extent": {**asdict(self.extent), "texts": texts},
            "chunk": self.chunk,
            "batch_size": self.batch_size,
        }

    def meta(self) -> dict[str, Any]:
        """The description of the run in its report."""
        return {
            "editor": None if self.editor is None else self.editor.name,
            **self.settings,
            "mode": self.mode,
            "cases": len(self.cases),
            "dropped_probes": self.dropped,
            "model": describe_model(self.model),
            "weights_restored": self._fingerprints() == self.base,
            "prepare_seconds": self.seconds.get("prepare", 0.0),
            "environment": environment(),
        }

    def go(self, journal: Journal | None) -> list[CaseRecord]:
        """All records, in the order of the cases; of several processes each asks its share of the chunks."""
        group = current_group()
        done = {} if journal is None else dict(journal.records)
        if len(done) < len(self.cases):
            with self._timed("prepare"):
                examiner = ProbeScorer(self.model, self.tokenizer, self.extent, self.cases)
                kept = BeforeScores(self.model, self.tokenizer, self.extent, self.cases, wanted=self.cache)
                if self.editor is not None:
                    self.editor.prepare()
            work = (
                self._single(examiner, kept, done) if self._each_alone else self._joint(examiner, kept, done, journal)
            )
            # Closed here and now: an error would keep the generator, and with it the edited model, as long as its traceback.
            with closing(work), Progress(len(self.cases), "evaluating", unit="case") as progress:
                running = Running()
                for record in done.values():
                    running.add(record)
                progress.advance(len(done))
                for record in work:
                    done[record.id] = record
                    if journal is not None:
                        journal.append(record)
                    running.add(record)
                    progress.note(**running.means())
                    progress.advance()
            done = {id: record for share in group.gather(done) for id, record in share.items()}
        return [done[case.id] for case in self.cases]

    @property
    def _each_alone(self) -> bool:
        return self.mode == "single" or self.editor is None

    def _single(
        self, examiner: ProbeScorer, kept: BeforeScores, done: Mapping[str, CaseRecord]
    ) -> Generator[CaseRecord, None, None]:
        """Chunks are the same in every run, so that a resumed one rounds alike; only what is missing is asked again."""
        for cases in self._chunks():
            if all(case.id in done for case in cases):
                continue
            begin = time.perf_counter()
            before = dict(zip([case.id for case in cases], kept.scores(examiner, cases), strict=True))
            middle = time.perf_counter()
            patches: Mapping[str, EditPatch | str] = {}
            if self.editor is not None:
                with alone():  # the chunks are shared out already
                    patches = propose_each(self.editor, self.regularizers, cases)
            shared = {
                "before": (middle - begin) / len(cases),
                "edit": (time.perf_counter() - middle) / len(cases),
            }
            for case in cases:
                if case.id not in done:
                    yield self._after(examiner, case, before[case.id], patches.get(case.id), shared)

    def _after(
        self,
        examiner: ProbeScorer,
        case: EditCase,
        before: CaseScore,
        patch: EditPatch | str | None,
        shared: Mapping[str, float],
    ) -> CaseRecord:
        seconds, after = dict(shared), before
        failure = patch if isinstance(patch, str) else None
        if isinstance(patch, EditPatch):
            start = time.perf_counter()
            with ExitStack() as stack:
                try:
                    stack.enter_context(edited(self.model, patch))
                except FATAL_ERRORS:
                    raise
                except KEditError as error:
                    failure = str(error)
                seconds["edit"] += time.perf_counter() - start
                start = time.perf_counter()
                after = before if failure else examiner.score([case])[0]
            seconds["after"] = time.perf_counter() - start
        return CaseRecord(
            id=case.id,
            prompt=_title(case),
            asked=case.probes,
            before=before,
            after=after,
            seconds=seconds,
            failure=failure,
        )

    def _joint(
        self, examiner: ProbeScorer, kept: BeforeScores, done: Mapping[str, CaseRecord], journal: Journal | None
    ) -> Generator[CaseRecord, None, None]:
        """All facts written, then everything asked."""
        assert self.editor is not None
        start = time.perf_counter()
        before: dict[str, CaseScore] = {}
        for cases in self._chunks():
            before |= {case.id: score for case, score in zip(cases, kept.scores(examiner, cases), strict=True)}
        shared = {"before": (time.perf_counter() - start) / len(self.cases)}
        size = len(self.cases) if self.mode == "batch" else self.batch_size
        steps = [self.cases[first : first + size] for first in range(0, len(self.cases), size)]
        edit = JointEdit(self.editor, self.regularizers, steps, journal)
        with edit.in_place():
            shared["edit"] = edit.seconds / len(self.cases)
            yield from self._asked_after(examiner, done, before, shared, edit.failures)

    def _asked_after(
        self,
        examiner: ProbeScorer,
        done: Mapping[str, CaseRecord],
        before: Mapping[str, CaseScore],
        shared: Mapping[str, float],
        failures: Mapping[str, str],
    ) -> Iterator[CaseRecord]:
        """The records of all cases that are missing, asked of the model as it is now."""
        for cases in self._chunks():
            if all(case.id in done for case in cases):
                continue
            start = time.perf_counter()
            after = examiner.score(cases)
            seconds = {**shared, "after": (time.perf_counter() - start) / len(cases)}
            for case, score in zip(cases, after, strict=True):
                if case.id not in done:
                    yield CaseRecord(
                        id=case.id,
                        prompt=_title(case),
                        asked=case.probes,
                        before=before[case.id],
                        after=score,
                        seconds=seconds,
                        failure=failures.get(case.id),
                    )

    def _chunks(self) -> Iterator[list[EditCase]]:
        """The chunks of cases that this process asks."""
        for start in current_group().share(range(0, len(self.cases), self.chunk)):
            yield self.cases[start : start + self.chunk]

    def _fingerprints(self) -> dict[str, str]:
        if self.editor is None:
            return {}
        return {weight.name: tensor_fingerprint(weight.stored) for weight in self.editor.edited_weights}

    def _settings(self) -> dict[str, Any]:
        """The hyper-parameters that are really used: a preset may change some for a regularizer."""
        if self.editor is None:
            return {"regularizers": [], "config": None}
        return self.editor.describe_call(self.regularizers)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _title(case: EditCase) -> str:
    return "; ".join(f"{edit.text} → {edit.target_new}" for edit in case.edits)
