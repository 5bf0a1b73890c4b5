"""KnowEdit (Zhang et al. 2024, arXiv:2401.01286): zsRE, WikiData_counterfact, WikiData_recent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kedit.data.records import Record, subject_slot, text, texts
from kedit.edit import Edit
from kedit.evaluation.cases import EditCase, Kind, Probe

PORTABILITY = {
    "Reasoning": Kind.REASONING,
    "Logical_Generalization": Kind.REASONING,
    "Subject_Aliasing": Kind.ALIAS,
}
LOCALITY = {"Relation_Specificity": Kind.RELATION, "Forgetfulness": Kind.RELATION, "Neighborhood": Kind.NEIGHBOUR}


def knowedit(record: Record, name: str) -> EditCase:
    """Fields ``prompt``, ``subject``, ``target_new``, ``ground_truth``, ``rephrase_prompt``, ``locality``, ``portability``.

    Answers may be a text, a list of accepted texts, or a list of lists; the first is right and the others accepted.
    """
    subject, new = text(record["subject"]), text(record["target_new"])
    true = next((answer for answer in texts(record.get("ground_truth")) if answer != new), None)
    edit = Edit(subject_slot(text(record["prompt"]), subject), subject, new, true)
    rephrased = texts(record.get("rephrase_prompt", record.get("rephrase")))
    probes = [Probe(kind=Kind.PARAPHRASE, prompt=p, right=new, wrong=true) for p in rephrased]
    for group, kind, wrong in (("portability", PORTABILITY, None), ("locality", LOCALITY, new)):
        probes += _probes(record.get(group) or {}, kind, wrong)
    return EditCase.of(str(record.get("case_id", name)), edit, probes)


def _probes(groups: dict[str, Any], kinds: dict[str, Kind], wrong: str | None) -> Iterator[Probe]:
    for group, items in groups.items():
        kind = kinds.get(group)
        if kind is None:
            raise ValueError(f"unknown group {group!r}; known are {', '.join(kinds)}")
        for item in items:
            answers = texts(item["ground_truth"])
            if answers:  # some test queries have no answer
                other = wrong if wrong not in answers else None
                yield Probe(
                    kind=kind, prompt=text(item["prompt"]), right=answers[0], wrong=other, accept=tuple(answers[1:])
                )
