"""CounterFact (Meng et al. 2022, arXiv:2202.05262), as published."""

from __future__ import annotations

from kedit.data.records import Record, text, texts
from kedit.edit import Edit
from kedit.evaluation.cases import EditCase, Kind, Probe


def original(record: Record, name: str) -> EditCase:
    """Published schema: ``requested_rewrite`` with ``paraphrase_prompts``, ``neighborhood_prompts``, ``generation_prompts``.

    Neighbours share the old target, so that is right for them and the new one wrong. ``attribute_prompts`` (subjects
    that have the new target already) enter none of the published tables and are not probed. The references of the published
    reference score are in a file of their own, which the records do not name: cases come without.
    """
    request = record["requested_rewrite"]
    new, true = text(request["target_new"]), text(request["target_true"])
    edit = Edit(text(request["prompt"]), text(request["subject"]), new, true)
    probes = [Probe(kind=Kind.PARAPHRASE, prompt=p, right=new, wrong=true) for p in texts(record["paraphrase_prompts"])]
    neighbours = texts(record["neighborhood_prompts"])
    probes += [Probe(kind=Kind.NEIGHBOUR, prompt=p, right=true, wrong=new) for p in neighbours]
    probes += [Probe(kind=Kind.GENERATION, prompt=p) for p in texts(record.get("generation_prompts"))]
    return EditCase.of(str(record.get("case_id", name)), edit, probes)
