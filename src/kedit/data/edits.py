"""Edits as people write them, a row each: kedit's own fields, ROME's requests, EasyEdit's names; and known facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedit.data.records import Record, subject_slot, text, texts
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe

_IDS = ("id", "case_id", "known_id")
_OLD_TARGETS = ("target_true", "ground_truth")
_PARAPHRASES = ("paraphrase", "paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt")
_NEIGHBOURS = ("locality_prompt", "locality_ground_truth")
_FORM = ("chat", "in_chat", "system", "space")
FIELDS = frozenset(
    {"prompt", "subject", "target_new", "notes", *_FORM, *_IDS, *_OLD_TARGETS, *_PARAPHRASES, *_NEIGHBOURS}
)


def edits(record: Record, name: str) -> EditCase:
    """A row with ``prompt``, ``subject``, ``target_new``; everything else may be missing.

    The old target is ``target_true`` or ``ground_truth``, paraphrases are in ``rephrase_prompt`` or a field of like name, a
    neighbour in ``locality_prompt`` with ``locality_ground_truth``. Targets are texts, or ROME's ``{"str": ...}``. With ``chat``
    true, prompts are messages in a chat, with the system message ``system``; ``space`` is the edit's. Other fields become
    :attr:`Edit.notes <kedit.Edit>`.
    """
    return _case(record, name, text(_given(record, "prompt")))


def flat(record: Record, name: str) -> EditCase:
    """EasyEdit's rows: as :func:`edits`, and the subject's first mention in the prompt is its place."""
    return _case(record, name, subject_slot(text(_given(record, "prompt")), text(_given(record, "subject"))))


def known(record: Record, name: str) -> EditCase:
    """Facts for tracing, as in ROME's ``known_1000.json``: ``prompt``, ``subject`` and the answer in ``attribute``.

    There is no new target: the fact itself stands in its place, so that tracing and the unedited model can be asked for it.
    """
    subject, answer = text(record["subject"]), text(record["attribute"])
    others = _others(record, {"prompt", "subject", "attribute", *_IDS})
    fact = Edit(subject_slot(text(record["prompt"]), subject), subject, answer, answer, notes=others)
    return EditCase.of(_id(record, name), fact, [Probe(kind=Kind.REWRITE, prompt=fact.text, right=answer)])


def _case(record: Record, name: str, prompt: str) -> EditCase:
    new = text(_given(record, "target_new"))
    true = next((answer for key in _OLD_TARGETS for answer in texts(_content(record.get(key))) if answer != new), None)
    given = record.get("notes")
    notes = {**(given if isinstance(given, Mapping) else {}), **_others(record, FIELDS)}
    if given and not isinstance(given, Mapping):
        notes["notes"] = given
    edit = Edit(prompt, text(_given(record, "subject")), new, true, notes=notes, **_form(record))
    asked: dict[str, Any] = {"in_chat": edit.in_chat, "system": edit.system}
    paraphrases = [paraphrase for key in _PARAPHRASES for paraphrase in texts(record.get(key))]
    probes = [
        Probe(kind=Kind.PARAPHRASE, prompt=paraphrase.replace("{}", edit.subject), right=new, wrong=true, **asked)
        for paraphrase in dict.fromkeys(paraphrases)
    ]
    neighbours, answers = (texts(record.get(key)) for key in _NEIGHBOURS)
    if len(neighbours) != len(answers):
        raise EditError(
            f"{len(neighbours)} locality_prompt and {len(answers)} locality_ground_truth: each prompt needs its answer"
        )
    for neighbour, answer in zip(neighbours, answers, strict=True):
        wrong = new if new != answer else None
        probes.append(Probe(kind=Kind.NEIGHBOUR, prompt=neighbour, right=answer, wrong=wrong, **asked))
    return EditCase.of(_id(record, name), edit, probes)


def _given(record: Record, key: str) -> Any:
    if record.get(key) in (None, ""):
        raise KeyError(key)
    return record[key]


def _form(record: Record) -> dict[str, Any]:
    """The form in which the prompt is asked: in a chat or not, with a space before the target or not."""
    form: dict[str, Any] = {}
    for key in _FORM:
        value = record.get(key)
        if value in (None, ""):
            continue
        if key != "system" and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if key != "system" and not isinstance(value, bool):
            raise EditError(f"{key} is true or false, not {value!r}")
        form["in_chat" if key == "chat" else key] = value
    return form


def _id(record: Record, name: str) -> str:
    return next((str(record[key]) for key in _IDS if record.get(key) not in (None, "")), name)


def _others(record: Record, known_fields: Sequence[str] | set[str] | frozenset[str]) -> dict[str, Any]:
    """The fields that are not known and not empty."""
    return {str(key): value for key, value in record.items() if key not in known_fields and value not in (None, "")}


def _content(value: Any) -> Any:
    """A target as texts: ROME's ``{"str": ...}`` gives its text."""
    return value.get("str") if isinstance(value, Mapping) else value
