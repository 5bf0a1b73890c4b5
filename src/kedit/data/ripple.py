"""RippleEdits (Cohen et al. 2023, arXiv:2307.12976)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kedit.data.records import Record, text
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe

GROUPS = {
    "Relation_Specificity": Kind.RELATION,
    "Forgetfulness": Kind.RELATION,
    "Logical_Generalization": Kind.REASONING,
    "Compositionality_I": Kind.REASONING,
    "Compositionality_II": Kind.REASONING,
    "Subject_Aliasing": Kind.ALIAS,
}

# How the benchmark words its facts, by what stands around the subject; the first that fits is taken.
_AROUND = (
    (r"The name of the (?:country|ethnic group|religion) which ", r" is associated with is"),
    (r"The name of the sports team which ", r" is a member of is"),
    (r"The name of the league which ", r" plays in is"),
    (r"The name of the continent which ", r" is part of is"),
    (r"The name of the country which ", r" is the capital of is"),
    (r"The name of the anthem that is most likely to be performed in ", r" is"),
    (r"The name of the award ", r" won is"),
    (r"The number of children ", r" has is"),
    (r"The name of the position held by ", r" is"),
    (r"The name of the currency in ", r" is"),
    (
        r"The name of the (?:country of citizenship|alma mater|field of work|head of government|head of state) of ",
        r" is",
    ),
    (r"The (?:place|date) of (?:birth|death|burial) of ", r" is"),
    (r"The names? of the [\w ]+? of ", r" (?:is|are)"),
    (r"The [\w ]+? of ", r" is"),
    (r"", r" (?:is followed by|follows)"),
)
_FORMS = [re.compile(f"(?P<head>{head})(?P<subject>.+?)(?P<tail>{tail}) (?P<target>.+?)\\.?") for head, tail in _AROUND]


def ripple(record: Record, name: str) -> EditCase:
    """Fields ``edit`` (a whole sentence, ``original_fact`` or ``previous_fact``) and six groups of test queries.

    The file names neither subject nor target; both are read off the sentence, whose wordings are known. Queries
    whose answers are empty are left out. ``condition_queries`` (what the model must know before) are not checked.
    """
    edit_record = record["edit"]
    head, subject, tail, new = _parts(text(edit_record["prompt"]))
    earlier = edit_record.get("original_fact") or edit_record.get("previous_fact")
    true = _parts(text(earlier["prompt"]))[3] if earlier else None
    edit = Edit(f"{head}{{}}{tail}", subject, new, true if true != new else None)
    probes = [probe for group, kind in GROUPS.items() for probe in _probes(record.get(group) or [], kind, new)]
    return EditCase.of(str(record.get("case_id", name)), edit, probes)


def _parts(sentence: str) -> tuple[str, str, str, str]:
    for form in _FORMS:
        match = form.fullmatch(sentence)
        if match:
            head, subject, tail, target = match.group("head", "subject", "tail", "target")
            return head, subject, tail, target
    raise EditError(f"the fact {sentence!r} has none of the benchmark's wordings")


def _probes(tests: list[Record], kind: Kind, new: str) -> Iterator[Probe]:
    for test in tests:
        for query in test["test_queries"]:
            answers = [answer for answer in query["answers"] if str(answer.get("value", "")).strip()]
            if not answers:
                continue
            accepted = [name for answer in answers for name in (answer["value"], *answer.get("aliases", ()))]
            right, others = text(accepted[0]), tuple(str(name) for name in accepted[1:] if str(name).strip())
            wrong = new if kind is Kind.RELATION and new not in (right, *others) else None
            yield Probe(kind=kind, prompt=text(query["prompt"]), right=right, wrong=wrong, accept=others)
