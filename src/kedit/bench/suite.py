"""Evaluations of one model into one folder: each is kept, so that a second start goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.editors import editor_class, presets
from kedit.editors.base import Editor
from kedit.editors.value_editor import ValueEditor
from kedit.errors import ConfigError
from kedit.evaluation.api import evaluate
from kedit.evaluation.cases import EditCase
from kedit.evaluation.provenance import describe_editor, digest, versions
from kedit.evaluation.report import EvalReport
from kedit.evaluation.shared_values import RememberingEngine
from kedit.keys.estimate import estimate_moments, tokenizer_fingerprint
from kedit.keys.second_moment import SecondMoments
from kedit.models import ModelArch, unwrap
from kedit.models.fingerprint import model_fingerprint
from kedit.regularizers import Choice, resolve
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINISHED = "summary.json"  # the report's last but two files; a run whose report is there is read, not run


class Suite:
    """Evaluations of one model, kept in a folder by what they are.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        folder: where runs are kept, each in a folder of its own whose name ends with a hash of all that matters to it.
        corpus: text for the second moments; ``None``: the model's default.
        contexts: how many contexts of the optimisation are used, the bare prompt among them; ``None``: the editor's own number.
        config: hyper-parameters for every editor that has them, or, named as ``"rome.clamp"``, for one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        *,
        corpus: str | Path | None = None,
        contexts: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if contexts is not None:
            check_whole("contexts", contexts, 1)
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        self.corpus, self.num_contexts, self.config = corpus, contexts, dict(config or {})
        self._contexts: dict[Any, Sequence[str]] = {}  # the same for all editors that sample alike
        self._engine: RememberingEngine | None = None  # of all editors: values that are the same are optimised once
        self.weights = f"{model_fingerprint(unwrap(model))} {tokenizer_fingerprint(tokenizer)}"

    def editor(self, name: str, **overrides: Any) -> Editor:
        """A new editor with the suite's corpus, contexts and hyper-parameters; ``overrides`` go before these."""
        config = hyper_parameters_of(name, self.config) | overrides
        kind = editor_class(name)
        key = (kind.context_lengths, kind.context_seed, kind.contexts)
        if key not in self._contexts:
            found = kind(self.model, self.tokenizer, **config).contexts
            self._contexts[key] = found if self.num_contexts is None else fewer(found, self.num_contexts)
        made = kind(self.model, self.tokenizer, contexts=self._contexts[key], **config)
        if self._engine is None:
            self._engine = RememberingEngine(made.arch)
        made.engine = self._engine
        return made

    def prepare(self, editors: Sequence[Editor]) -> None:
        """Estimate the second moments that some editors read, those of all their layers in one pass over the text per dtype."""
        readers: dict[str | None, list[ValueEditor]] = {}
        for editor in editors:
            if isinstance(editor, ValueEditor) and editor.moment_layers:
                readers.setdefault(editor.config.compute_dtype, []).append(editor)
        arch = ModelArch(self.model)
        for compute_dtype, alike in readers.items():
            found = estimate_moments(
                arch,
                self.tokenizer,
                sorted({layer for editor in alike for layer in editor.moment_layers}),
                self.corpus,
                ridge=presets.ridge(arch),
                compute_dtype=compute_dtype,
            )
            for reader in alike:
                reader.moments = SecondMoments({layer: found[layer] for layer in reader.moment_layers})

    def run(
        self,
        editor: Editor | None,
        regularizer: Choice,
        cases: Sequence[EditCase],
        mode: str = "single",
        **extent: Any,
    ) -> EvalReport:
        """One evaluation: read where it is finished, gone on with where it was interrupted.

        Args:
            editor: an editor of this model, ``None`` for the unedited model.
            regularizer: as in :func:`kedit.evaluate`.
            cases: what is edited and asked.
            mode: as there.
            extent: its further options (``exact``, ``generate``, ``chunk``, ...).
        """
        folder = self.folder_of(editor, regularizer, cases, mode, **extent)
        if (folder / FINISHED).is_file():
            return EvalReport.load(folder)
        chosen: Any = mode
        return evaluate(self.model, self.tokenizer, cases, editor, resolve(regularizer), chosen, out=folder, **extent)

    def folder_of(
        self, editor: Editor | None, regularizer: Choice, cases: Sequence[EditCase], mode: str = "single", **extent: Any
    ) -> Path:
        """Where such a run is kept; raises ``ConfigError`` where the editor has no use for a regularizer."""
        regularizers = resolve(regularizer)
        identity = digest(
            [
                versions(),
                self.weights,
                describe_editor(editor),
                None if editor is None else editor.describe_call(regularizers),  # with what the preset says for these
                [case.to_dict() for case in cases],
                mode,
                repr(sorted(extent.items())),
            ]
        )
        names = [editor.name if editor else "unedited", *(item.name for item in regularizers), mode, str(len(cases))]
        return self.folder / f"{'-'.join(names)}-{identity}"

    def finished(self, *run: Any, **extent: Any) -> bool:
        """Whether a run, given as to :meth:`run`, is finished."""
        return (self.folder_of(*run, **extent) / FINISHED).is_file()


def fewer(contexts: Sequence[str], number: int) -> list[str]:
    """So many of an editor's contexts, evenly taken, the bare prompt first."""
    if number >= len(contexts):
        return list(contexts)
    return [contexts[0], *contexts[1 :: max(1, len(contexts) // number)]][:number]


def hyper_parameters_of(editor: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters for one editor: those for all that it has, and before these its own (``"rome.clamp"``)."""
    known = editor_class(editor).Config.field_names()
    shared = {key: value for key, value in config.items() if key in known}
    own = {key.partition(".")[2]: value for key, value in config.items() if key.partition(".")[0] == editor}
    return shared | own


def check_hyper_parameters(editors: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` where a hyper-parameter belongs to none of the editors."""
    for key in config:
        prefix, dot, field = key.partition(".")
        owners = [name for name in editors if not dot or name == prefix]
        if not any((field if dot else prefix) in editor_class(name).Config.field_names() for name in owners):
            raise ConfigError(
                f"No editor that is run has the hyper-parameter {key!r}. Editors: {', '.join(editors)}; name one "
                "hyper-parameter of all (clamp=2) or of one of them (rome.clamp=2)."
            )
