"""Metrics as pure functions of what was measured, by name, with direction, protocol and source.

A metric turns one probe's scores (now, and of the unedited model) into one value; values are pooled over prompts or
averaged over cases, as the protocol that published it does. Others add theirs with ``METRICS.register`` or an entry
point in the group ``kedit.metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kedit.errors import ConfigError
from kedit.evaluation.cases import Kind
from kedit.evaluation.records import CaseRecord, CaseScore, ProbeScore
from kedit.evaluation.statistics import Estimate, Floats, Tally, difference, estimate
from kedit.utils.registry import Registry

PerProbe = Callable[[ProbeScore, ProbeScore], float | None]
PerCase = Callable[[CaseScore, CaseScore], float | None]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of an evaluation.

    Attributes:
        name: how it is asked for.
        label: its column in tables.
        direction: whether more or less of it is better.
        protocol: whose definition it is, in a word or two.
        source: where that is published.
        summary: what it measures, in one sentence.
        kinds: probes that it reads.
        probe: its value on a probe (now, before the edit); ``None`` where it has none there.
        case: the same for a whole case, instead of ``probe``.
        parts: names of the metrics whose harmonic mean it is, instead of ``probe``.
        pooling: ``"prompt"``: mean over all prompts; ``"case"``: mean over the cases' means.
        scale: factor for tables: 100 for shares.
    """

    name: str
    label: str
    direction: Literal["higher", "lower"]
    protocol: str
    source: str
    summary: str
    kinds: frozenset[Kind] = frozenset()
    probe: PerProbe | None = None
    case: PerCase | None = None
    parts: tuple[str, ...] = ()
    pooling: Literal["prompt", "case"] = "prompt"
    scale: float = 100.0

    def __post_init__(self) -> None:
        """Check that there is exactly one definition."""
        if sum([self.probe is not None, self.case is not None, bool(self.parts)]) != 1:
            raise ConfigError(f"The metric {self.name!r} needs exactly one of probe, case and parts.")

    def values(self, now: CaseScore, before: CaseScore) -> list[float]:
        """Its values on one case, in the table's scale."""
        if self.case is not None:
            values = [self.case(now, before)]
        else:
            assert self.probe is not None
            pairs = zip(now.probes, before.probes, strict=True)
            values = [self.probe(one, other) for one, other in pairs if one.kind in self.kinds]
        return [value * self.scale for value in values if value is not None]

    def tallies(self, records: Sequence[CaseRecord], state: Literal["before", "after"]) -> list[Tally]:
        """Its values over all cases in one state; one tally per part."""
        if self.parts:
            return [tally for part in self.parts for tally in METRICS[part].tallies(records, state)]
        values = [self.values(getattr(record, state), record.before) for record in records]
        return [Tally.of(values, by_case=self.pooling == "case")]

    def measure(self, records: Sequence[CaseRecord], weights: Floats) -> dict[str, Estimate | None]:
        """The estimate before, after, and the paired difference."""
        before, after = self.tallies(records, "before"), self.tallies(records, "after")
        return {
            "before": estimate(before, weights),
            "after": estimate(after, weights),
            "difference": difference(after, before, weights),
        }


METRICS: Registry[Metric] = Registry("metric")
_ORDER: list[str] = []  # as in tables


def success(now: ProbeScore, before: ProbeScore) -> float | None:
    """1 where the right answer is likelier than the wrong one (mean per token), else 0; a tie is 0."""
    return None if now.right is None or now.wrong is None else float(now.right.nll < now.wrong.nll)


def magnitude(now: ProbeScore, before: ProbeScore) -> float | None:
    """p(right) - p(wrong), with p = exp(-mean NLL)."""
    return None if now.right is None or now.wrong is None else now.right.probability - now.wrong.probability


def token_accuracy(now: ProbeScore, before: ProbeScore) -> float | None:
    """Share of the right answer's tokens that are the first choice, teacher-forced."""
    return None if now.right is None else now.right.accuracy


def all_tokens(now: ProbeScore, before: ProbeScore) -> float | None:
    """1 where every token of the right answer is the first choice, teacher-forced."""
    return None if now.right is None else float(now.right.accuracy == 1.0)


def exact_match(now: ProbeScore, before: ProbeScore) -> float | None:
    """1 where greedy decoding to a natural stop gives exactly the right answer."""
    return None if now.exact is None else float(now.exact)


def agreement(now: ProbeScore, before: ProbeScore) -> float | None:
    """Share of the answer's places where the first choice is what it was before the edit."""
    if now.right is None or before.right is None:
        return None
    pairs = list(zip(now.right.argmax, before.right.argmax, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


_ROME = "Meng et al. 2022, arXiv:2202.05262"
_SADR = "Wang et al. 2025, arXiv:2502.14838"
_EASYEDIT = "Wang et al. 2023, arXiv:2308.07269"
_WILD = "Yang et al. 2025, arXiv:2502.11177"


def _add(name: str, label: str, protocol: str, source: str, summary: str, **fields: Any) -> None:
    given: dict[str, Any] = {"direction": "higher", **fields}
    METRICS.register(name, Metric(name=name, label=label, protocol=protocol, source=source, summary=summary, **given))
    _ORDER.append(name)


_PAIRS = (
    ("e", Kind.REWRITE, "the edit's own prompt"),
    ("p", Kind.PARAPHRASE, "paraphrases"),
    ("n", Kind.NEIGHBOUR, "neighbours"),
    ("r", Kind.RELATION, "other relations of the subject"),
    ("dn", Kind.DISTRACTED, "neighbours after the edited sentence"),
)
for _short, _kind_, _what in _PAIRS:
    _one: frozenset[Kind] = frozenset({_kind_})
    _text = f"Share of prompts ({_what}) on which the right answer is likelier than the wrong one."
    _add(f"{_short}s", f"{_short.upper()}S", "SADR", _SADR, _text, kinds=_one, probe=success)
    _text = f"Mean of p(right) - p(wrong) on {_what}."
    _add(f"{_short}m", f"{_short.upper()}M", "SADR", _SADR, _text, kinds=_one, probe=magnitude)
    if _short in ("e", "p", "n"):
        _text = f"Success on {_what}, mean over the cases' means."
        _fields = {"kinds": _one, "probe": success, "pooling": "case"}
        _add(f"counterfact_{_short}s", f"{_short.upper()}S (CF)", "CounterFact", _ROME, _text, **_fields)
_add(
    "score", "Score", "SADR", _SADR, "Harmonic mean of ES, PS, NS, RS and DNS.", parts=("es", "ps", "ns", "rs", "dns")
)  # fmt: skip
_add(
    "counterfact_score", "Score (CF)", "CounterFact", _ROME, "Harmonic mean of CounterFact's ES, PS and NS.",
    parts=("counterfact_es", "counterfact_ps", "counterfact_ns"),
)  # fmt: skip
_add(
    "alias_success", "Alias", "SADR", _SADR, "Success on other names of the subject.",
    kinds=frozenset({Kind.ALIAS}), probe=success,
)  # fmt: skip
_add(
    "commonsense", "Commonsense", "SADR", _SADR, "Share of common-sense questions with the right answer likelier.",
    kinds=frozenset({Kind.COMMONSENSE}), probe=success,
)  # fmt: skip

_ASKED = (
    ("rewrite", "Rewrite", frozenset({Kind.REWRITE}), "the edit's own prompt"),
    ("paraphrase", "Paraphrase", frozenset({Kind.PARAPHRASE}), "paraphrases"),
    ("portability", "Portability", frozenset({Kind.REASONING, Kind.ALIAS}), "what follows from the edit"),
)
for _name, _label, _kinds, _what in _ASKED:
    _add(
        f"{_name}_acc", f"{_label} acc.", "EasyEdit, teacher-forced", _EASYEDIT,
        f"Share of the right answer's tokens that are the first choice on {_what}, given the tokens before.",
        kinds=_kinds, probe=token_accuracy, pooling="case",
    )  # fmt: skip
    _add(
        f"{_name}_all", f"{_label} all tokens", "ROME, teacher-forced", _ROME,
        f"Share of prompts ({_what}) on which every token of the right answer is the first choice.",
        kinds=_kinds, probe=all_tokens,
    )  # fmt: skip
    _add(
        f"{_name}_exact", f"{_label} exact", "WILD, autoregressive", _WILD,
        f"Share of prompts ({_what}) on which greedy decoding to a natural stop gives exactly the right answer.",
        kinds=_kinds, probe=exact_match,
    )  # fmt: skip
_add(
    "locality", "Locality", "EasyEdit, teacher-forced", _EASYEDIT,
    "Share of answer tokens of facts that must stay on which the first choice is the unedited model's.",
    kinds=frozenset({Kind.NEIGHBOUR, Kind.RELATION}), probe=agreement, pooling="case",
)  # fmt: skip
_add(
    "fluency", "Fluency", "ROME (GE)", _ROME, "Weighted entropy of the 2- and 3-grams of generated text, in bits × 100.",
    kinds=frozenset({Kind.GENERATION}), probe=lambda now, before: now.entropy, pooling="case",
)  # fmt: skip
_add(
    "reference_score", "Reference", "ROME (there RS)", _ROME,
    "tf-idf cosine between a case's generated texts, joined, and its texts about the new target, joined.",
    kinds=frozenset({Kind.GENERATION}), case=lambda now, before: now.reference, pooling="case",
)  # fmt: skip
_add(
    "perplexity", "Perplexity", "kedit", "exp of the mean NLL per token", "Perplexity on plain text.",
    direction="lower", case=lambda now, before: now.texts.get("perplexity"), pooling="case", scale=1.0,
)  # fmt: skip
_add(
    "kl_drift", "KL drift", "kedit", "mean over tokens of KL(before ‖ after)",
    "How far the next-token distributions on plain text moved, in nats per token.",
    direction="lower", case=lambda now, before: now.texts.get("kl"), pooling="case", scale=1.0,
)  # fmt: skip
_add(
    "attention_drift", "Attention drift", "SADR's penalty without γ and mask", _SADR,
    "KL(before ‖ after) of the last token's attention rows, summed over heads and blocks, where the subject is in context.",
    direction="lower", kinds=frozenset({Kind.REWRITE, Kind.RELATION, Kind.DISTRACTED}),
    probe=lambda now, before: now.attention.get("drift"), scale=1.0,
)  # fmt: skip
_add(
    "attention_gain", "Attention gain", "SADR's analysis", _SADR,
    "Change of the last token's mean attention to the edited subject's last token.",
    direction="lower", kinds=frozenset({Kind.REWRITE, Kind.RELATION, Kind.DISTRACTED}),
    probe=lambda now, before: now.attention["subject"] - before.attention["subject"] if now.attention else None,
)  # fmt: skip


class Running:
    """Means over the finished cases, for a progress bar."""

    def __init__(self, names: Sequence[str] = ("es", "ps", "ns", "rs", "dns")) -> None:
        self.sums = dict.fromkeys(names, 0.0)
        self.counts = dict.fromkeys(names, 0)

    def add(self, record: CaseRecord) -> None:
        """Count a finished case."""
        for name in self.sums:
            values = METRICS[name].values(record.after, record.before)
            self.sums[name] += sum(values)
            self.counts[name] += len(values)

    def means(self) -> dict[str, str]:
        """By label: the mean so far, of the metrics that have values."""
        return {METRICS[n].label: f"{total / self.counts[n]:.1f}" for n, total in self.sums.items() if self.counts[n]}


def chosen(names: Sequence[str] | None = None) -> list[Metric]:
    """Metrics by name, in that order; all of them, in the order of this file, without names."""
    known = [name for name in METRICS.names() if name not in _ORDER]
    return [METRICS[name] for name in (names if names is not None else [*_ORDER, *known])]
