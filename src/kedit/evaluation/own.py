"""Probes for an edit of the user's own: what the model says before the edit counts as right where nothing should change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kedit.evaluation.cases import EditCase, Kind, Probe
from kedit.evaluation.probing import WATCHED, probe_text
from kedit.models import ModelArch
from kedit.prompts.decode import continue_rows
from kedit.prompts.tokenize import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    form: dict[str, Any] = {"in_chat": edit.in_chat, "system": edit.system}
    said = greedy(arch.model, tokenizer, [text for _, text in asked], _LENGTH, **form)
    words = list(map(_first_word, said))
    old, target = words[0], _first_word(edit.target_new)
    if old and edit.target_true is None and old.casefold() != target.casefold():
        edit = replace(edit, target_true=old)
    probes = [
        Probe(kind=kind, prompt=text, right=word, wrong=edit.target_new, **form)
        for (kind, text), word in zip(asked[1:], words[1:], strict=True)
        if word and word.casefold() != target.casefold() and text != edit.text
    ]
    kept = [probe for probe in case.probes if probe.kind is not Kind.REWRITE]
    return EditCase.of(case.id, edit, [*kept, *probes], more=case.more, references=case.references)


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    length: int,
    *,
    in_chat: bool = False,
    system: str | None = None,
) -> list[str]:
    """What a model says to prompts, or to a user's messages in its chat template, in at most ``length`` tokens each."""
    probes = [Probe(kind=Kind.REWRITE, prompt=text, right="?", in_chat=in_chat, system=system) for text in prompts]
    rows = encode(tokenizer, [probe_text(tokenizer, probe, probe.right) for probe in probes])
    answers = continue_rows(ModelArch(model), tokenizer, [row.ids[: row.target] for row in rows], length)
    return [text + ("" if ended else " …") for text, ended in answers]


def _first_word(text: str) -> str:
    word = re.search(r"\w+", text)
    return word[0] if word else ""
