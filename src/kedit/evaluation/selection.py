"""Which cases an experiment takes: facts that the unedited model knows, divided into development and held-out by subject."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe, check_cases
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.models.lock import holding_model
from kedit.utils.progress import Progress
from kedit.utils.validation import check_number, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVELOPMENT = 1 / 3  # share of the subjects on which hyper-parameters may be chosen
MARGIN = 1.0  # nats per token
_BESIDE = (Kind.PARAPHRASE, Kind.NEIGHBOUR, Kind.RELATION)  # one of them, or the case shows no side effect
_ASKED_AT_ONCE = 16


@dataclass(frozen=True)
class KnownCases:
    """Cases whose fact the unedited model knows.

    Attributes:
        cases: the cases, in a seeded order.
        asked: how many facts the model was asked for until there were enough.
        known: how many of those it knows.
    """

    cases: list[EditCase]
    asked: int
    known: int

    def __str__(self) -> str:
        share = f" ({100 * self.known / self.asked:.0f}%)" if self.asked else ""
        return f"of {self.asked} facts asked, the unedited model knows {self.known}{share}; {len(self.cases)} are taken"


@holding_model
def known_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Iterable[EditCase],
    number: int | None = None,
    *,
    exclude: Collection[str] = (),
    kinds: Collection[Kind] | None = None,
    probes: int | None = None,
    margin: float = MARGIN,
    seed: int = 0,
) -> KnownCases:
    """Take cases whose fact the unedited model knows: its true object has a higher likelihood than the new one.

    Cases without paraphrase, neighbour and relation probes show no side effect and are left out, as are further cases of a
    subject that is taken already. The first n cases are the same for every ``number`` of at least n.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer.
        cases: to choose from.
        number: how many are wanted at most; ``None``: all.
        exclude: subjects that are left out (upper and lower case count alike).
        kinds: the kinds of probes that are kept, beside the edit's own prompt; ``None``: all.
        probes: so many probes of each kind at most, the first ones; ``None``: all.
        margin: by how much the mean NLL per token of the true object must be below that of the new one, in nats.
        seed: of the order in which cases are taken.

    Raises:
        EditError: the model knows none of the facts, or no case says which object is true; a case does not fit the model.
        ConfigError: a number is out of range.
    """
    check_number("margin", margin, least=0)
    for name, value in (("number", number), ("probes", probes)):
        if value is not None:
            check_whole(name, value, 1)
    chosen = [case for case in check_cases(cases) if any(probe.kind in _BESIDE for probe in case.probes)]
    if not any(_rewrite(case).wrong for case in chosen):
        raise EditError(
            "No case has both a true object (target_true) and a paraphrase, neighbour or relation probe, so nothing can be "
            "measured beside the edit. Give cases in one of the forms of docs/evaluation.md."
        )
    random.Random(seed).shuffle(chosen)
    taken: list[EditCase] = []
    subjects = {_same(subject) for subject in exclude}
    asked = known = 0
    wanted = len(chosen) if number is None else number
    with Progress(wanted, "asking what the model knows", unit="case") as progress:
        for case, knows in _asked(model, tokenizer, _once(chosen, subjects), margin):
            asked += 1
            known += knows
            if knows:
                taken.append(_with_few(case, kinds, probes))
                progress.advance()
            if len(taken) == wanted:
                break
    if not taken:
        raise EditError(
            f"The model knows none of the {asked} facts that it was asked for: it never prefers the true object by {margin:g} "
            "nats per token. Give facts that it knows."
        )
    return KnownCases(taken, asked, known)


def split_by_subject(
    cases: Iterable[EditCase], development: float = DEVELOPMENT
) -> tuple[list[EditCase], list[EditCase]]:
    """Divide cases into development and held-out: by a hash of the subject, so that a subject is always on the same side.

    The side depends on nothing else: neither on the file, nor on the number or order of the cases. What one command chooses on
    development cases is not measured on them by another.

    Args:
        cases: to divide.
        development: share of all subjects that are for development, from 0 to 1.

    Returns:
        The development cases and the held-out ones, each in the given order.
    """
    check_number("development", development, least=0)
    sides: tuple[list[EditCase], list[EditCase]] = [], []
    for case in cases:
        number = int.from_bytes(hashlib.sha256(_same(case.edit.subject).encode()).digest()[:8], "big")
        sides[number >= development * 2**64].append(case)
    return sides


def _same(subject: str) -> str:
    return " ".join(subject.casefold().split())


def _rewrite(case: EditCase) -> Probe:
    return next(probe for probe in case.probes if probe.kind is Kind.REWRITE)


def _once(cases: Sequence[EditCase], subjects: set[str]) -> Iterator[EditCase]:
    """The cases whose subject is new and whose true object is said."""
    for case in cases:
        if _rewrite(case).wrong is not None and _same(case.edit.subject) not in subjects:
            subjects.add(_same(case.edit.subject))
            yield case


def _asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Iterator[EditCase], margin: float
) -> Iterator[tuple[EditCase, bool]]:
    """Each case, and whether the model knows its fact."""
    while group := list(islice(cases, _ASKED_AT_ONCE)):
        bare = [replace(case, probes=(_rewrite(case),), more=()) for case in group]
        scores = ProbeScorer(model, tokenizer, EvalOptions(exact=False), bare).score(bare)
        for case, score in zip(group, scores, strict=True):
            new, true = score.probes[0].right, score.probes[0].wrong
            yield case, new is not None and true is not None and true.nll + margin < new.nll


def _with_few(case: EditCase, kinds: Collection[Kind] | None, probes: int | None) -> EditCase:
    """The case with so many probes of each of these kinds."""
    seen: dict[Kind, int] = {}
    few = []
    for probe in case.probes:
        seen[probe.kind] = seen.get(probe.kind, 0) + 1
        wanted = kinds is None or probe.kind in (Kind.REWRITE, *kinds)
        if wanted and (probes is None or seen[probe.kind] <= probes):
            few.append(probe)
    return replace(case, probes=tuple(few))
