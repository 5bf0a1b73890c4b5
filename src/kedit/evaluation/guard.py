"""Before an edit is kept: did it work, and did it leave the rest alone?

A :class:`Guard` measures a model before and after an edit. What misses a threshold is rolled back, with a report that
says which measurement it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from kedit.edit import Edit
from kedit.errors import ConfigError, KEditError
from kedit.evaluation.cases import EditCase, Kind
from kedit.evaluation.metrics import all_tokens, success
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.records import CaseScore, ProbeScore
from kedit.models import ModelArch
from kedit.models.defaults import model_defaults
from kedit.patch.ledger import Ledger
from kedit.utils.linalg import is_finite
from kedit.utils.validation import is_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEXTS = (
    "The river rises in the hills to the north of the town and flows for about forty miles through farmland before it "
    "reaches the sea. Along its banks there are several old mills, most of which stopped working in the last century.",
    "In the spring the members of the council met to discuss the new library. They agreed that the building should be "
    "open to everyone, and that the books should be chosen together with the schools.",
    "Water boils at a lower temperature in the mountains, because the pressure of the air is lower there. This is why "
    "rice and potatoes take longer to cook.",
)
"""Texts for KL and perplexity where none are given."""

_MOST = 10  # edits that an error names
_GAINS = {"efficacy": Kind.REWRITE, "paraphrase": Kind.PARAPHRASE}
_DROPS = {"neighbour_drop": Kind.NEIGHBOUR, "distracted_drop": Kind.DISTRACTED, "relation_drop": Kind.RELATION}


@dataclass(frozen=True)
class Measurement:
    """One measured number and the limit it had to keep."""

    name: str
    value: float
    limit: float
    least: bool  # whether the limit is a lower one
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; a number that is none never keeps it."""
        if not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.least else "at most"
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict:6} {self.name} {self.value:.4g}, {sign} {self.limit:.4g}" + (
            f" ({self.note})" if self.note else ""
        )


@dataclass(frozen=True)
class GuardReport:
    """All measurements of one check.

    Attributes:
        measurements: what was measured, with the limits.
        held: the edits whose own prompt the edited model answers as they ask.
        failed_edits: the other ones.
    """

    measurements: tuple[Measurement, ...]
    held: tuple[Edit, ...] = ()
    failed_edits: tuple[Edit, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return not self.failed

    @property
    def failed(self) -> tuple[Measurement, ...]:
        """The measurements that missed their limits."""
        return tuple(item for item in self.measurements if not item.passed)

    @property
    def scores(self) -> dict[str, float]:
        """The numbers by name, as a patch records them."""
        return {item.name: item.value for item in self.measurements}

    def __str__(self) -> str:
        return "\n".join(map(str, self.measurements))


class GuardError(KEditError):
    """An edit missed a limit of its guard and was rolled back; ``report`` has all measurements."""

    def __init__(self, report: GuardReport) -> None:
        self.report = report
        failed = "; ".join(
            f"{item.name} is {item.value:.4g} and must be {'at least' if item.least else 'at most'} {item.limit:.4g}"
            for item in report.failed
        )
        facts = ""
        if report.failed_edits:
            held = f"; held: {_named(report.held)}" if report.held else "; none held"
            facts = f" Failed: {_named(report.failed_edits)}{held}."
        super().__init__(
            f"The edit was rolled back by the guard: {failed}.{facts} Change the edit or its hyper-parameters, add a regularizer, "
            "or loosen the guard."
        )


def _named(edits: Sequence[Edit]) -> str:
    """The first edits in a line, and how many more there are."""
    texts = "; ".join(f"{edit.text} → {edit.target_new}" for edit in edits[:_MOST])
    return texts + (f"; and {len(edits) - _MOST} more" if len(edits) > _MOST else "")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Limits that an edit must keep; ``None`` leaves a measurement out. Shares are of probes over all edits of a call.

    A probe succeeds where its right answer is likelier than its wrong one, or, without a wrong answer, where every token
    of the right one is the model's first choice. A measurement without probes is not measured.

    Attributes:
        cases: probes for the edits, found by edit; an edit without a case is asked by its own prompt alone.
        texts: plain text for KL and perplexity; missing: a few sentences of English, or, for the embedded model, which
            knows no English, of its own world.
        efficacy: least share of edits that succeed on their own prompt.
        paraphrase: least share of paraphrases that succeed.
        neighbour_drop: largest loss of the neighbours' share of successes.
        distracted_drop: the same, asked after the edited sentence.
        relation_drop: the same, for other relations of the edited subject.
        kl: largest mean KL(before ‖ after) per token of plain text, in nats.
        perplexity: largest ratio of the perplexity after and before.
        norm_growth: largest relative growth of an edited weight's norm over that before all edits.
    """

    cases: Sequence[EditCase] = ()
    texts: Sequence[str] | None = None
    efficacy: float | None = 1.0
    paraphrase: float | None = 0.5
    neighbour_drop: float | None = 0.2
    distracted_drop: float | None = 0.5
    relation_drop: float | None = 0.2
    kl: float | None = 0.2
    perplexity: float | None = 1.2
    norm_growth: float | None = 0.5

    def __post_init__(self) -> None:
        """Check every limit."""
        if self.texts is not None:
            given = (self.texts,) if isinstance(self.texts, str) else self.texts
            object.__setattr__(self, "texts", _all_of(given, str, "texts", "plain texts"))
        object.__setattr__(self, "cases", _all_of(self.cases, EditCase, "cases", "kedit.EditCase objects"))
        for name in self.limits():
            value = getattr(self, name)
            most = math.inf if name in ("kl", "perplexity", "norm_growth") else 1.0
            if value is not None and not (is_number(value) and 0 <= value <= most):
                expected = "a share from 0 to 1" if most == 1.0 else "a finite number of at least 0"
                raise ConfigError(f"Guard.{name} is {expected} or None, not {value!r}.")
        if self.texts == () and (self.kl is not None or self.perplexity is not None):
            raise ConfigError("The guard has no text to measure kl and perplexity on. Give texts, or set both to None.")

    @classmethod
    def limits(cls) -> list[str]:
        """The names of all limits."""
        return [item.name for item in dataclasses.fields(cls) if item.name not in ("cases", "texts")]

    def texts_for(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The plain text that ``model`` is asked to read."""
        if self.texts is not None:
            return tuple(self.texts)
        own = model_defaults(model)
        return DEFAULT_TEXTS if own is None else tuple(islice(own.texts(), own.guard_texts))

    def watch(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: Iterable[Edit]) -> GuardCheck:
        """Measure ``model`` as it is, before ``edits`` are written."""
        known = {case.edit: case for case in self.cases}
        cases = [
            dataclasses.replace(known.get(edit) or EditCase.of("", edit), id=str(number))
            for number, edit in enumerate(edits)
        ]
        texts = self.texts_for(model) if self.kl is not None or self.perplexity is not None else ()
        examiner = ProbeScorer(model, tokenizer, EvalOptions(exact=False, texts=texts), cases)
        return GuardCheck(self, examiner, cases, examiner.before(cases))


def _all_of(given: Any, kind: type, name: str, what: str) -> tuple[Any, ...]:
    """The items as a tuple; raises :class:`ConfigError` unless all are of a kind."""
    items = tuple(given) if isinstance(given, Iterable) else (given,)
    for item in items:
        if not isinstance(item, kind):
            raise ConfigError(f"Guard.{name} are {what}, and one of them is {item!r:.60}.")
    return items


@dataclass
class GuardCheck:
    """Measurements before an edit, to compare the edited model with."""

    guard: Guard
    examiner: ProbeScorer
    cases: list[EditCase]
    before: list[CaseScore]
    report: GuardReport | None = field(default=None, init=False)

    def check(self, names: Iterable[str]) -> GuardReport:
        """Measure the edited model.

        Args:
            names: the weights that were edited.

        Raises:
            GuardError: a measurement missed its limit.
        """
        after = self.examiner.score(self.cases)
        measurements = [*self._shares(after), *self._on_text(after), *self._norms(names)]
        held = [_share([score], Kind.REWRITE) == 1.0 for score in after]
        edits = [case.edit for case in self.cases]
        self.report = GuardReport(
            tuple(measurements),
            tuple(edit for edit, said in zip(edits, held, strict=True) if said),
            tuple(edit for edit, said in zip(edits, held, strict=True) if not said),
        )
        if not self.report.passed:
            raise GuardError(self.report)
        return self.report

    def _shares(self, after: Sequence[CaseScore]) -> Iterable[Measurement]:
        for name, kind in {**_GAINS, **_DROPS}.items():
            limit = getattr(self.guard, name)
            old, new = _share(self.before, kind), _share(after, kind)
            if limit is None or old is None or new is None:
                continue
            if name in _GAINS:
                yield Measurement(name, new, limit, True, f"before {old:.4g}")
            else:
                yield Measurement(name, old - new, limit, False, f"from {old:.4g} to {new:.4g}")

    def _on_text(self, after: Sequence[CaseScore]) -> Iterable[Measurement]:
        old, new = self.before[0].texts, after[0].texts
        if self.guard.kl is not None:
            # A KL that is not a number is measured as 0 by max(); perplexity tells.
            broken = not math.isfinite(new["perplexity"])
            yield Measurement(
                "kl", math.nan if broken else new["kl"], self.guard.kl, False, "nats per token of plain text"
            )
        if self.guard.perplexity is not None:
            ratio = new["perplexity"] / old["perplexity"]
            note = f"from {old['perplexity']:.4g} to {new['perplexity']:.4g}"
            yield Measurement("perplexity", ratio, self.guard.perplexity, False, note)

    def _norms(self, names: Iterable[str]) -> Iterable[Measurement]:
        arch: ModelArch = self.examiner.arch
        growths: dict[str, float] = {}
        finite = True
        for name in names:
            weight = arch.weight_of(name).stored
            finite = finite and is_finite(weight)
            original = Ledger.of(arch.model).original(name)
            if original is not None:
                growths[name] = _norm(weight) / max(_norm(original), torch.finfo(torch.float32).tiny) - 1.0
        yield Measurement("finite", float(finite), 1.0, True, "edited weights and everything measured")
        if self.guard.norm_growth is not None and growths:
            worst = max(growths, key=lambda name: growths[name])
            yield Measurement("norm_growth", growths[worst], self.guard.norm_growth, False, worst)


def _share(scores: Sequence[CaseScore], kind: Kind) -> float | None:
    """The share of the probes of a kind that succeed; NaN where a likelihood is none."""
    probes = [probe for score in scores for probe in score.probes if probe.kind is kind and probe.right is not None]
    if not probes:
        return None
    answers = [answer for probe in probes for answer in (probe.right, probe.wrong) if answer is not None]
    if not all(math.isfinite(answer.nll) for answer in answers):
        return math.nan
    return sum(_succeeds(probe) for probe in probes) / len(probes)


def _succeeds(probe: ProbeScore) -> float:
    passed = success(probe, probe)
    return (all_tokens(probe, probe) or 0.0) if passed is None else passed


def _norm(weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def from_limits(limits: Mapping[str, Any], **fields: Any) -> Guard:
    """A guard from limits by name; raises :class:`ConfigError` for a name that is none."""
    for name in limits:
        if name not in Guard.limits():
            raise ConfigError(f"The guard has no limit {name!r}. It has {', '.join(Guard.limits())}.")
    return Guard(**limits, **fields)
