"""MQuAKE (Zhong et al. 2023, arXiv:2305.14795): multi-hop questions over one or several edits."""

from __future__ import annotations

from kedit.data.records import Record, text, texts
from kedit.edit import Edit
from kedit.evaluation.cases import EditCase, Kind, Probe


def mquake(record: Record, name: str) -> EditCase:
    """Fields ``requested_rewrite`` (a list), ``questions``, ``new_answer``, ``new_answer_alias``, ``new_single_hops``.

    A case writes all of its rewrites together. The multi-hop questions ask for the new answer against the old one;
    hops that no rewrite touches must keep their answer and count as relations of the subject where they are about it.
    """
    rewrites = []
    for request in record["requested_rewrite"]:
        fields = (text(request[key]) for key in ("prompt", "subject", "target_new", "target_true"))
        rewrites.append(Edit(*fields))
    new, old = text(record["new_answer"]), texts(record.get("answer"))
    wrong = next((answer for answer in old if answer != new), None)
    accept = tuple(texts(record.get("new_answer_alias")))
    questions = texts(record["questions"])
    probes = [Probe(kind=Kind.REASONING, prompt=q, right=new, wrong=wrong, accept=accept) for q in questions]
    asked = {text(request["question"]) for request in record["requested_rewrite"] if request.get("question")}
    for request in record["requested_rewrite"][:1]:
        for question in texts(request.get("question")):
            target, true = text(request["target_new"]), text(request["target_true"])
            probes.append(Probe(kind=Kind.PARAPHRASE, prompt=question, right=target, wrong=true))
    for hop in record.get("new_single_hops", ()):
        if hop["question"] not in asked:
            aliases = tuple(texts(hop.get("answer_alias")))
            answer = text(hop["answer"])
            probes.append(Probe(kind=Kind.NEIGHBOUR, prompt=text(hop["question"]), right=answer, accept=aliases))
    return EditCase.of(str(record.get("case_id", name)), rewrites[0], probes, more=tuple(rewrites[1:]))
