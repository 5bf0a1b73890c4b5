"""Probes for an edit of the user's own: what the model says before the edit counts as right where nothing should change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kedit.evaluation.cases import EditCase, Kind, Probe
from kedit.evaluation.probing import WATCHED, probe_text
from kedit.models import ModelArch
from kedit.prompts.decode import continue_rows
from kedit.prompts.tokenize import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RELATION = "{} is a"
RELATION_IN_CHAT = "What do you know about {}?"
_LENGTH = 8  # tokens in which the first word of an answer ends


def with_own_probes(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, case: EditCase, neighbours: Sequence[str] = ()
) -> EditCase:
    """Add what the model itself says: the old target, another relation of the subject, and answers about other subjects.

    A case with probes that mention its subject, beside the edit's own prompt, stays as it is.

    Args:
        arch: the model before the edit.
        tokenizer: its tokenizer.
        case: the edit, perhaps with probes.
        neighbours: prompts about other subjects, each up to its answer.

    Returns:
        The case, with a probe where the model says a word and that is not the new target.
    """
    edit = case.edit
    watched = any(probe.kind in WATCHED and probe.kind is not Kind.REWRITE for probe in case.probes)
    if watched and not neighbours:
        return case
    other = (RELATION_IN_CHAT if edit.in_chat else RELATION).replace("{}", edit.subject)
    asked = [(Kind.REWRITE, edit.text), (Kind.RELATION, other), *((Kind.NEIGHBOUR, text) for text in neighbours)]
    blank = [Probe(kind=kind, prompt=text, right="?", in_chat=edit.in_chat, system=edit.system) for kind, text in asked]
    rows = encode(tokenizer, [probe_text(tokenizer, probe, probe.right) for probe in blank])
    answers = continue_rows(arch, tokenizer, [row.ids[: row.target] for row in rows], _LENGTH)
    words = [_first_word(text) for text, _ in answers]
    old, target = words[0], _first_word(edit.target_new)
    if old and edit.target_true is None and old.casefold() != target.casefold():
        edit = replace(edit, target_true=old)
    probes = [
        replace(probe, right=word, wrong=edit.target_new)
        for probe, word in zip(blank[1:], words[1:], strict=True)
        if word and word.casefold() != target.casefold() and probe.prompt != edit.text
    ]
    kept = [probe for probe in case.probes if probe.kind is not Kind.REWRITE]
    return EditCase.of(case.id, edit, [*kept, *probes], more=case.more, references=case.references)


def _first_word(text: str) -> str:
    word = re.search(r"\w+", text)
    return word[0] if word else ""
