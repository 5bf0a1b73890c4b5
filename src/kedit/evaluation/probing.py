"""Putting all probes of some cases to a model in its present state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from kedit.errors import ConfigError, EditError
from kedit.evaluation.attention import AttentionToSubject, attention_to_subject
from kedit.evaluation.cases import EditCase, Kind, Probe
from kedit.evaluation.language import Prose, TfIdf, n_gram_entropy
from kedit.evaluation.records import CaseScore, ProbeScore
from kedit.models import ModelArch
from kedit.prompts.decode import continue_rows, says
from kedit.prompts.likelihood import Answer, chat_text, pair_text, score_rows
from kedit.prompts.tokenize import Text, TokenizedPrompt, context_limit, encode
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXACT = (Kind.REWRITE, Kind.PARAPHRASE, Kind.ALIAS, Kind.REASONING)  # where what the model says is compared
WATCHED = (Kind.REWRITE, Kind.RELATION, Kind.DISTRACTED)  # where the edited subject stands in the context
SPARE = 4  # tokens that a greedy answer may take beyond the longest accepted one


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measurements beside the likelihoods.

    Attributes:
        exact: decode greedily and compare with the right answer.
        generate: tokens of free generation per generation probe; 0 for none.
        top_k: candidates of its sampling.
        attention: attention to the edited subject.
        texts: plain text for perplexity and KL drift; none without.
        text_tokens: how much of it is read.
        seed: of the sampling.

    Raises:
        ConfigError: a field is of the wrong type, or out of range.
    """

    exact: bool = True
    generate: int = 0
    top_k: int = 5
    attention: bool = False
    texts: tuple[str, ...] = ()
    text_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("exact", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, not {getattr(self, name)!r}.")
        for name, least in (("generate", 0), ("top_k", 1), ("text_tokens", 2), ("seed", None)):
            check_whole(name, getattr(self, name), least)
        for text in self.texts:
            if not isinstance(text, str):
                raise ConfigError(f"texts are plain text, each a string; found a {type(text).__name__}: {text!r}.")


@dataclass(frozen=True)
class Plan:
    """A case in tokens: per probe the rows of its right and wrong answer (or of the bare prompt), and the watched row."""

    case: EditCase
    right: tuple[TokenizedPrompt, ...]  # without labels for generation probes
    wrong: Mapping[int, TokenizedPrompt]  # by number of the probe
    watched: Mapping[int, TokenizedPrompt]


@dataclass
class Baseline:
    """Measurements of the unedited model that later scores are compared with."""

    log_probs: Tensor | None = None
    attention: dict[str, dict[int, AttentionToSubject]] = field(default_factory=dict)  # by case, by number of the probe


class ProbeScorer:
    """Asks one model; the model may change between calls."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, extent: EvalOptions, cases: Sequence[EditCase]
    ) -> None:
        self.arch = ModelArch(model)
        self.tokenizer = tokenizer
        self.extent = extent
        self.baseline = Baseline()
        self.plans = {case.id: self._plan(case) for case in cases}
        self._prose = None
        if extent.texts:
            self._prose = Prose.of(self.arch, tokenizer, extent.texts, extent.text_tokens)
            self.baseline.log_probs = self._prose.log_probs(self.arch)
        self._tfidf = TfIdf([" ".join(case.references) for case in cases if case.references])

    def before(self, cases: Sequence[EditCase]) -> list[CaseScore]:
        """Scores of the unedited model, which later ones are compared with."""
        for case in cases:
            self.baseline.attention.pop(case.id, None)
        return self.score(cases)

    def score(self, cases: Sequence[EditCase]) -> list[CaseScore]:
        """Scores of the model as it is now."""
        plans = [self.plans[case.id] for case in cases]
        answers = self._answers(plans)
        said = self._said(plans)
        written = self._written(plans)
        watched = self._watched(plans)
        texts = self._on_text()
        scores = []
        for plan in plans:
            name = plan.case.id
            probes = []
            for number, probe in enumerate(plan.case.probes):
                key = (name, number)
                right, wrong = answers.get((*key, True)), answers.get((*key, False))
                score = ProbeScore(kind=probe.kind, right=right, wrong=wrong, attention=watched.get(key, {}))
                if key in said:
                    text, exact = said[key]
                    score = replace(score, text=text, exact=exact)
                if key in written:
                    score = replace(score, text=written[key], entropy=n_gram_entropy(written[key]))
                probes.append(score)
            prose = [written[name, number] for number in range(len(probes)) if (name, number) in written]
            reference = self._reference(plan.case, prose)
            scores.append(CaseScore(probes=tuple(probes), texts=texts, reference=reference))
        return scores

    def _plan(self, case: EditCase) -> Plan:
        texts: list[Text] = []
        for probe in case.probes:
            texts.append(probe_text(self.tokenizer, probe, probe.right))
        wrong = [(i, probe.wrong) for i, probe in enumerate(case.probes) if probe.wrong is not None]
        texts += [probe_text(self.tokenizer, case.probes[i], answer) for i, answer in wrong]
        watched = [(i, span) for i, probe in enumerate(case.probes) for span in [_subject(case, probe)] if span]
        texts += [probe_text(self.tokenizer, case.probes[i], case.probes[i].right or "", span) for i, span in watched]
        try:
            rows = encode(self.tokenizer, texts, limit=context_limit(self.arch.model))
        except EditError as error:
            raise type(error)(f"Case {case.id!r}: {error}") from error
        count = len(case.probes)
        return Plan(
            case,
            tuple(rows[:count]),
            {i: row for (i, _), row in zip(wrong, rows[count : count + len(wrong)], strict=True)},
            {i: row for (i, _), row in zip(watched, rows[count + len(wrong) :], strict=True)},
        )

    def _answers(self, plans: Sequence[Plan]) -> dict[tuple[str, int, bool], Answer]:
        keys: list[tuple[str, int, bool]] = []
        rows: list[TokenizedPrompt] = []
        for plan in plans:
            for number, row in enumerate(plan.right):
                if row.labels:
                    keys.append((plan.case.id, number, True))
                    rows.append(row)
            for number, row in plan.wrong.items():
                keys.append((plan.case.id, number, False))
                rows.append(row)
        return dict(zip(keys, score_rows(self.arch, rows), strict=True))

    def _said(self, plans: Sequence[Plan]) -> dict[tuple[str, int], tuple[str, bool]]:
        """Greedy continuations and whether they are the right answer, for the kinds where that is asked."""
        if not self.extent.exact:
            return {}
        asked: list[tuple[tuple[str, int], TokenizedPrompt, list[str]]] = []
        for plan in plans:
            for number, probe in enumerate(plan.case.probes):
                if probe.kind in EXACT and probe.right is not None:
                    accepted = [probe.right, *probe.accept]
                    asked.append(((plan.case.id, number), plan.right[number], accepted))
        if not asked:
            return {}
        lengths = [len(row.labels) + _longer(self.tokenizer, accepted) + SPARE for _, row, accepted in asked]
        prompts = [row.ids[: row.target] for _, row, _ in asked]
        texts = continue_rows(self.arch, self.tokenizer, prompts, lengths)
        return {
            key: (text, says(text, accepted, ended=ended))
            for (key, _, accepted), (text, ended) in zip(asked, texts, strict=True)
        }

    def _written(self, plans: Sequence[Plan]) -> dict[tuple[str, int], str]:
        if not self.extent.generate:
            return {}
        prompts = [
            ((plan.case.id, number), plan.right[number].ids)
            for plan in plans
            for number, probe in enumerate(plan.case.probes)
            if probe.kind is Kind.GENERATION
        ]
        extent = self.extent
        texts = continue_rows(
            self.arch,
            self.tokenizer,
            [ids for _, ids in prompts],
            extent.generate,
            top_k=extent.top_k,
            seed=extent.seed,
        )
        return {key: text for (key, _), (text, _) in zip(prompts, texts, strict=True)}

    def _reference(self, case: EditCase, written: Sequence[str]) -> float | None:
        """All that was generated against all references, joined as in the published code."""
        if not written or not case.references:
            return None
        return self._tfidf.similarity(" ".join(written), " ".join(case.references))

    def _watched(self, plans: Sequence[Plan]) -> dict[tuple[str, int], dict[str, float]]:
        if not self.extent.attention:
            return {}
        keys = [(plan.case.id, number) for plan in plans for number in plan.watched]
        rows = [row for plan in plans for row in plan.watched.values()]
        measured = {}
        for (name, number), now in zip(keys, attention_to_subject(self.arch, rows), strict=True):
            before = self.baseline.attention.setdefault(name, {}).setdefault(number, now)
            measured[name, number] = now.measure(before)
        return measured

    def _on_text(self) -> dict[str, float]:
        if self._prose is None or self.baseline.log_probs is None:
            return {}
        return self._prose.measure(self._prose.log_probs(self.arch), self.baseline.log_probs)


def probe_text(
    tokenizer: PreTrainedTokenizerBase, probe: Probe, answer: str | None, subject: tuple[int, int] | None = None
) -> Text:
    """A probe's prompt, in the chat template where it is a message, with an answer or alone; ``subject``: a span of the prompt."""
    if probe.in_chat:
        return chat_text(tokenizer, probe.prompt, answer, subject, probe.system)
    if answer is None:
        return Text(probe.prompt, subject or (0, len(probe.prompt)))
    return pair_text(probe.prompt, answer, subject)


def _subject(case: EditCase, probe: Probe) -> tuple[int, int] | None:
    """The span of the edited subject's last mention in a watched probe."""
    if probe.kind not in WATCHED:
        return None
    start = probe.prompt.rfind(case.edit.subject)
    return None if start < 0 else (start, start + len(case.edit.subject))


def _longer(tokenizer: PreTrainedTokenizerBase, accepted: Sequence[str]) -> int:
    """Return how many tokens the longest accepted answer may have beyond the first."""
    if len(accepted) == 1:
        return 0
    lengths = [len(ids) for ids in tokenizer(list(accepted), add_special_tokens=False)["input_ids"]]
    return max(0, max(lengths) - lengths[0])
