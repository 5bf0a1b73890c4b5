"""Facts in tokens, as tracing takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase
from kedit.models import ModelArch
from kedit.prompts.likelihood import last_logits, score_rows
from kedit.prompts.tokenize import TokenizedPrompt, context_limit, edit_text, encode, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_PASS = 256


@dataclass(frozen=True)
class Fact:
    """A prompt, its subject and the answer that the model should give.

    Attributes:
        prompt: the text before the answer.
        subject: the subject's text.
        answer: the answer's text.
        row: prompt and answer as tokens; ``row.first`` and ``row.subject_last`` are the subject's first and last token.
        tokens: the prompt's tokens as text.
    """

    prompt: str
    subject: str
    answer: str
    row: TokenizedPrompt
    tokens: tuple[str, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the answer's last token."""
        return self.row.ids[:-1]

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return self.row.target


def as_facts(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, facts: Edit | EditCase | Iterable[Edit | EditCase]
) -> list[Fact]:
    """Facts in tokens: the answer is ``target_true``, and without it what the model itself says next (one token).

    Raises:
        EditError: there are none, one of them is neither an edit nor a case, or does not fit the model.
    """
    edits = _edits(facts)
    texts = [edit_text(edit, edit.target_true, tokenizer=tokenizer) for edit in edits]
    rows = encode(tokenizer, texts, limit=context_limit(arch.model))
    unknown = [i for i, edit in enumerate(edits) if edit.target_true is None]
    for i, token in zip(unknown, next_tokens(arch, [rows[i].ids for i in unknown]), strict=True):
        rows[i] = replace(rows[i], ids=(*rows[i].ids, token))
    chosen = []
    for edit, row in zip(edits, rows, strict=True):
        tokens = tuple(str(tokenizer.decode([token])) for token in row.ids[: row.target])
        answer = edit.target_true or str(tokenizer.decode(list(row.labels))).strip()
        chosen.append(Fact(edit.text, edit.subject, answer, row, tokens))
    return chosen


def known(arch: ModelArch, facts: Sequence[Fact]) -> list[bool]:
    """Tell whether every token of a fact's answer is the model's first choice."""
    return [answer.accuracy == 1.0 for answer in score_rows(arch, [fact.row for fact in facts])]


@torch.no_grad()
def next_tokens(arch: ModelArch, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The model's first choice after each prompt."""
    tokens: list[int] = []
    for start in range(0, len(prompts), ROWS_PER_PASS):
        part = prompts[start : start + ROWS_PER_PASS]
        ids, mask = pad(part)
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        keep[torch.arange(len(part)), torch.tensor([len(prompt) - 1 for prompt in part])] = True
        tokens += last_logits(arch, ids, mask, keep).argmax(-1).tolist()
    return tokens


def _edits(facts: Edit | EditCase | Iterable[Edit | EditCase]) -> list[Edit]:
    if not isinstance(facts, Edit | EditCase | Iterable):
        raise EditError(f"Expected kedit.Edit or kedit.EditCase objects, found {type(facts).__name__}.")
    items = [facts] if isinstance(facts, Edit | EditCase) else list(facts)
    if not items:
        raise EditError("There is nothing to trace: the list of facts is empty.")
    for item in items:
        if not isinstance(item, Edit | EditCase):
            raise EditError(f"Expected kedit.Edit or kedit.EditCase objects, found {type(item).__name__}.")
    return [item.edit if isinstance(item, EditCase) else item for item in items]
