"""Development cases: those that the model knows, in a seeded order, with and without relations in turn."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from kedit.calibration.choice import KEPT
from kedit.errors import EditError
from kedit.evaluation import METRICS, EditCase, Kind
from kedit.evaluation.cases import check_cases
from kedit.evaluation.selection import known_cases
from kedit.utils.progress import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = (Kind.PARAPHRASE, Kind.NEIGHBOUR, Kind.DISTRACTED, Kind.RELATION)
PROBES = 5  # of each kind
MARGIN = 1.0  # nats


def development_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[EditCase],
    number: int,
    *,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> list[EditCase]:
    """So many cases, or fewer, that the unedited model knows, one per subject.

    Cases with probes of other relations and cases without alternate, so that every part of them has both. Cases that measure
    none of NS, DNS and RS are left out: any part of what is taken says what an edit harms.

    Args:
        model: unedited.
        tokenizer: its tokenizer.
        cases: to choose from.
        number: how many.
        exclude: subjects to leave out.
        seed: of the order.

    Raises:
        EditError: there are no cases, they ask nothing that must stay as it is, or the model knows none of them.
    """
    if not cases:
        raise EditError(
            "There are no cases to calibrate on. Give facts with probes, in one of the forms of docs/evaluation.md."
        )
    check_cases(cases)
    parts = [part for part in _by_relations(list(filter(_shows_harm, cases))) if part]
    if not parts:
        raise EditError(
            "The cases ask for no neighbours and no other relations with a right and a wrong answer, so nothing shows what an "
            "edit harms. Give cases with such probes (docs/evaluation.md)."
        )
    share = math.ceil(number / len(parts))
    found = _known(model, tokenizer, parts, share, exclude, seed)
    if (short := number - sum(map(len, found))) > 0 and len(parts) > 1:
        found = _known(model, tokenizer, parts, share + short, exclude, seed)
    return [case for case in chain.from_iterable(zip_longest(*found)) if case is not None][:number]


def _shows_harm(case: EditCase) -> bool:
    """Whether a case of one edit has a probe of NS, DNS or RS."""
    kinds = frozenset[Kind]().union(*(METRICS[name].kinds for name in KEPT))
    return not case.more and any(probe.kind in kinds and probe.wrong is not None for probe in case.probes)


def _by_relations(cases: Sequence[EditCase]) -> list[list[EditCase]]:
    """The cases with relations and those without."""
    parts: list[list[EditCase]] = [[], []]
    for case in cases:
        parts[any(probe.kind is Kind.RELATION for probe in case.probes)].append(case)
    return parts


def _known(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Sequence[EditCase]],
    number: int,
    exclude: Collection[str],
    seed: int,
) -> list[list[EditCase]]:
    """The cases that the model knows, of each part; raises where it knows none of any."""
    found: list[list[EditCase]] = []
    failure: EditError | None = None
    taken = set(exclude)
    for part in parts:
        try:
            known = known_cases(
                model, tokenizer, part, number, exclude=taken, kinds=KINDS, probes=PROBES, margin=MARGIN, seed=seed
            ).cases
        except EditError as error:
            failure = error
            logger.warning("%d of the cases are not used: %s", len(part), error)
            continue
        found.append(known)
        taken |= {case.edit.subject for case in known}
    if failure is not None and not found:
        raise failure
    return found
