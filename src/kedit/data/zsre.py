"""zsRE in MEND's form (Mitchell et al. 2022, arXiv:2110.11309)."""

from __future__ import annotations

from kedit.data.records import Record, subject_slot, text, texts
from kedit.edit import Edit
from kedit.evaluation.cases import EditCase, Kind, Probe

LOCALITY_PREFIX = "nq question: "


def mend(record: Record, name: str) -> EditCase:
    """Fields ``src``, ``subject``, ``alt`` (the new answer), ``answers``, ``rephrase``, ``loc``, ``loc_ans``.

    The neighbour is MEND's question from Natural Questions; it has a right answer and no wrong one, so it counts for
    locality (agreement with the unedited model), not for NS.
    """
    subject, new = text(record["subject"]), text(record["alt"])
    answers = texts(record.get("answers"))
    true = next((answer for answer in answers if answer != new), None)
    edit = Edit(subject_slot(text(record["src"]), subject), subject, new, true)
    probes = [Probe(kind=Kind.PARAPHRASE, prompt=p, right=new, wrong=true) for p in texts(record.get("rephrase"))]
    for prompt in texts(record.get("loc")):
        question = prompt.removeprefix(LOCALITY_PREFIX)
        question = question if question.endswith("?") else f"{question}?"
        probes.append(Probe(kind=Kind.NEIGHBOUR, prompt=question, right=text(record["loc_ans"])))
    return EditCase.of(str(record.get("case_id", name)), edit, probes)
