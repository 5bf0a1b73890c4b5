"""``evaluate``: every case before and after its edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.editors import get_editor as make_editor
from kedit.editors.base import Editor
from kedit.errors import ConfigError
from kedit.evaluation.cases import EditCase, check_cases
from kedit.evaluation.finished import FinishedRun
from kedit.evaluation.journal import Journal
from kedit.evaluation.metrics import METRICS
from kedit.evaluation.probing import EvalOptions
from kedit.evaluation.report import EvalReport
from kedit.evaluation.runner import CHUNK, EvalMode, Run
from kedit.models.lock import holding_model
from kedit.patch import EditPatch
from kedit.regularizers import Choice
from kedit.utils.distributed import current_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@holding_model
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Iterable[EditCase],
    editor: str | Editor | EditPatch | None = "rome",
    regularizer: Choice = None,
    mode: EvalMode = "single",
    *,
    base: PreTrainedModel | None = None,
    out: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    metrics: str | Sequence[str] | None = None,
    chunk: int = CHUNK,
    batch_size: int = 1,
    cache: bool = True,
    **extent: Any,
) -> EvalReport:
    """Ask every case's probes before and after its edit; the model is unedited again when this returns or raises.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        cases: what to edit and to ask; see :func:`kedit.data.load_cases`.
        editor: a name, an editor of this very model, or ``None`` for the unedited model alone. A finished patch
            (:class:`kedit.EditPatch`) is measured as it is: "before" is the model without it, "after" the model with it.
        regularizer: as in :meth:`Editor.apply`.
        mode: ``"single"``: each case alone on the unedited model; ``"batch"``: all at once; ``"sequential"``: one
            after the other, ``batch_size`` cases at a time, all asked at the end.
        base: the model before its edits, where ``model`` is a finished one: "before" is measured on ``base``, "after" on ``model``.
            Give ``editor=None`` with it. Both models have the tokenizer.
        out: folder for records and report; a run that was interrupted there goes on where it stopped.
        config: the editor's hyper-parameters, where it is given by name.
        metrics: name or names of the metrics to report; all that have values if not given.
        chunk: cases whose values are optimised together in single mode.
        batch_size: cases per step of a sequence.
        cache: reuse what an earlier run measured of this model, unedited, on the same chunk of cases: in memory, and in kedit's
            cache folder where that exists. Attention is always measured anew.
        extent: what is measured beside the likelihoods: the fields of :class:`~kedit.evaluation.probing.EvalOptions`
            (``exact``, ``generate``, ``attention``, ``texts``, ...).

    Raises:
        EditError: a case is malformed or does not fit the model; ``out`` holds another run or cannot be written.
        ConfigError: an option is of the wrong type or out of range.
        UnknownNameError: there is no such editor, regularizer or metric.
    """
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    for name in metrics or ():
        METRICS[name]
    chosen = check_cases(cases)
    measured = _extent(extent)
    if base is not None or isinstance(editor, EditPatch):
        run = _finished(model, tokenizer, chosen, editor, regularizer, mode, base, config, measured, chunk, cache)
    else:
        made = _editor(model, tokenizer, editor, config)
        run = Run(model, tokenizer, chosen, made, regularizer, mode, measured, chunk, batch_size, cache)
    journal = None if out is None else Journal(out, run.identity())
    records = run.go(journal)
    report = EvalReport(records, run.meta(), tuple(metrics) if metrics is not None else None)
    if journal is not None and current_group().leads:
        report.save(journal.folder)
        journal.tidy()
    return report


def _finished(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[EditCase],
    editor: str | Editor | EditPatch | None,
    regularizer: Choice,
    mode: EvalMode,
    base: PreTrainedModel | None,
    config: Mapping[str, Any] | None,
    measured: EvalOptions,
    chunk: int,
    cache: bool,
) -> Run:
    if regularizer is not None and regularizer != [] or config or mode != "single":
        raise ConfigError(
            "What is measured is finished, so regularizer, config and mode have no meaning. Leave them out."
        )
    if base is None:
        assert isinstance(editor, EditPatch)
        return FinishedRun(model, tokenizer, cases, measured, chunk, cache, patch=editor)
    if editor is not None:
        raise ConfigError("With base, the model is edited already. Give editor=None.")
    return FinishedRun(base, tokenizer, cases, measured, chunk, cache, changed=model)


def _editor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    editor: str | Editor | None,
    config: Mapping[str, Any] | None,
) -> Editor | None:
    if isinstance(editor, str):
        return make_editor(editor, model, tokenizer, **(config or {}))
    if config:
        raise ConfigError("config belongs to an editor given by name; an editor object has its own.")
    if editor is not None and editor.model is not model:
        raise ConfigError("The editor was made for another model object. Make it with the model that is evaluated.")
    return editor


def _extent(fields: Mapping[str, Any]) -> EvalOptions:
    given = dict(fields)
    if isinstance(given.get("texts"), str):
        given["texts"] = (given["texts"],)
    texts = given.get("texts") or ()
    if not isinstance(texts, Iterable):
        raise ConfigError(f"texts is a text or a list of texts, not a {type(texts).__name__}.")
    given["texts"] = tuple(texts)
    known = EvalOptions.__dataclass_fields__
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"evaluate() does not know {', '.join(unknown)}. It measures {', '.join(known)}.")
    return EvalOptions(**given)
