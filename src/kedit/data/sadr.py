"""The SADR paper's merged cases (Wang et al. 2025, arXiv:2502.14838): CounterFact and WikiData_counterfact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kedit.data.records import Record, subject_slot, text, texts
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe


def merged(record: Record, name: str) -> EditCase:
    """Fields ``requested_rewrite`` and groups of prompts with targets: ``p-...``, ``l-...``, ``o-commonsense``, ``generation``.

    Locality probes (``l-``) have the field's targets as right answer and the edit's new target as wrong one; the
    paraphrases and aliases have the new target as right and the old one as wrong. Lists may be missing or empty.
    """
    request = record["requested_rewrite"]
    subject, new, true = (text(request[key]) for key in ("subject", "target_new", "target_true"))
    edit = Edit(subject_slot(text(request["prompt"]), subject), subject, new, true)
    probes: list[Probe] = []
    for key, kind in (("p-paraphrase", Kind.PARAPHRASE), ("p-subject_alias", Kind.ALIAS)):
        probes += [_probe(kind, prompt, target, true) for prompt, target in _paired(record, key)]
    probes += [_probe(Kind.REASONING, prompt, target, None) for prompt, target in _paired(record, "p-reasoning")]
    for key, kind in (("l-neighbor", Kind.NEIGHBOUR), ("l-relation", Kind.RELATION)):
        probes += [_probe(kind, prompt, target, new) for prompt, target in _paired(record, key)]
    question = record.get("o-commonsense") or {}
    for prompt in texts(question.get("prompts")):
        probes.append(_probe(Kind.COMMONSENSE, prompt, text(question["right"]), text(question["wrong"])))
    probes += [Probe(kind=Kind.GENERATION, prompt=prompt) for prompt in _prompts(record.get("generation"))]
    return EditCase.of(name, edit, probes)


def _paired(record: Record, key: str) -> Iterator[tuple[str, str]]:
    group = record.get(key) or {}
    prompts, targets = texts(group.get("prompts")), texts(group.get("targets"))
    if len(prompts) != len(targets):
        raise EditError(f"{key} has {len(prompts)} prompts and {len(targets)} targets")
    yield from zip(prompts, targets, strict=True)


def _probe(kind: Kind, prompt: str, right: str, wrong: str | None) -> Probe:
    return Probe(kind=kind, prompt=prompt, right=right, wrong=None if wrong == right else wrong)


def _prompts(value: Any) -> list[str]:
    return texts(value.get("prompts") if isinstance(value, dict) else value)
