"""Edits as the engine sees them: all their prompts, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedit.arch import ModelArch
from kedit.batch import Row, Text, context_limit, encode, rewrite_texts
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.regularizers.base import Needs
from kedit.runner import Prompt, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBJECT_PROMPT = "{} is a"  # where the model's idea of the subject is held in place (ROME's KL term)


@dataclass(frozen=True)
class Request:
    """An encoded edit: its prompt in every context, the KL prompt, the regularizers' prompts."""

    edit: Edit
    rewrite: tuple[Row, ...]
    kl: Row
    extra: tuple[Row, ...] = ()

    def prompts(self, edit: int) -> list[Prompt]:
        """The prompts of a wave in which this is edit number ``edit``."""
        until = self.kl.lookup + 1
        shared = self.rewrite[0].ids[:until] == self.kl.ids[:until]  # the bare prompt begins with the subject
        rows = [Prompt(row, edit, i, Role.REWRITE, shared and i == 0) for i, row in enumerate(self.rewrite)]
        if not shared:
            rows.append(Prompt(self.kl, edit, 0, Role.KL))
        return rows + [Prompt(row, edit, i, Role.EXTRA) for i, row in enumerate(self.extra)]

    @property
    def span(self) -> int:
        """Tokens from the subject's last token on, in the longest prompt."""
        return max(len(prompt.tokens) - prompt.row.lookup for prompt in self.prompts(0))


def encode_edits(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], contexts: Sequence[str], needs: Needs
) -> list[Request]:
    """Encode every prompt of every edit; bad input is found here, before anything runs.

    Raises:
        EditError: an edit does not fit the tokenizer or the context window; its number is named.
    """
    table: Any = arch.model.get_input_embeddings().weight
    limit, size = context_limit(arch.model), int(table.shape[0])
    requests = []
    for number, edit in enumerate(edits):
        texts = rewrite_texts(edit, contexts)
        texts += [Text.fill(template, edit.subject) for template in (SUBJECT_PROMPT, *needs.prompts)]
        try:
            rows = encode(tokenizer, texts, limit=limit)
        except EditError as error:
            if len(edits) == 1:
                raise
            raise type(error)(f"Edit {number}: {error}") from error
        if (largest := max(max(row.ids) for row in rows)) >= size:
            raise EditError(
                f"Edit {number}: the tokenizer gives token {largest}, and the model knows {size} tokens. Use the model's own "
                "tokenizer."
            )
        count = len(contexts)
        requests.append(Request(edit, tuple(rows[:count]), rows[count], tuple(rows[count + 1 :])))
    return requests
