"""Edits as the engine sees them: all their prompts, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING

from kedit.edit import SLOT, Edit
from kedit.errors import EditError
from kedit.models import ModelArch
from kedit.prompts.tokenize import (
    Text,
    TokenizedPrompt,
    check_known,
    context_limit,
    edit_text,
    encode,
    rewrite_texts,
    vocabulary_size,
)
from kedit.regularizers.base import Needs
from kedit.utils.warning import warn_user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SUBJECT_PROMPT = "{} is a"  # where the model's idea of the subject is held in place (ROME's KL term)
SPARE = "William Shakespeare"  # in place of another subject that is the edited one


class Role(IntEnum):
    """The reason why a prompt runs."""

    REWRITE = 0  # the edit's prompt with its target, in one context
    KL = 1  # "{subject} is a", read at the subject's last token
    EXTRA = 2  # a regularizer's own prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt of a wave.

    ``tokens`` is what the model is fed: the last token of a target, and what follows the subject in the KL prompt,
    predict nothing that is read. ``reads`` are the positions whose logits are wanted.
    """

    row: TokenizedPrompt
    edit: int
    context: int
    role: Role
    fact: int = 0  # of several facts of one subject
    subject: bool = False  # a rewrite prompt that begins as the KL prompt does is read in its place too

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the model is fed."""
        if self.role is Role.KL:
            return self.row.ids[: self.row.subject_last + 1]
        return self.row.ids[:-1] if self.row.labels else self.row.ids

    @property
    def last(self) -> int:
        """Position at which regularizers read: the last token of the prompt."""
        return self.row.subject_last if self.role is Role.KL else self.row.prompt_last

    @property
    def reads(self) -> list[int]:
        """Positions whose logits are wanted, ascending."""
        count = 1 if self.role is Role.KL else max(1, len(self.row.labels))
        positions = list(range(self.last, self.last + count))
        return [self.row.subject_last, *positions] if self.subject and self.row.subject_last < self.last else positions


@dataclass(frozen=True)
class Request:
    """An encoded edit: its prompt in every context, the KL prompt, the regularizers' prompts.

    Several facts of one subject are one request: they have the same key, so one value has to say all of them.

    Attributes:
        edits: the facts, all of one subject.
        rewrite: the first fact's prompt in every context, then the next one's.
        kl: the KL prompt.
        extra: the regularizers' prompts about the subject.
        neighbours: their prompts about other subjects, of the first fact, then of the next one.
        held: the prompts at whose keys the closed form shall change nothing.
        alone: where there are any, the subject alone in every context.
    """

    edits: tuple[Edit, ...]
    rewrite: tuple[TokenizedPrompt, ...]
    kl: TokenizedPrompt
    extra: tuple[TokenizedPrompt, ...] = ()
    neighbours: tuple[TokenizedPrompt, ...] = ()
    held: tuple[TokenizedPrompt, ...] = ()
    alone: tuple[TokenizedPrompt, ...] = ()

    @property
    def edit(self) -> Edit:
        """The first fact."""
        return self.edits[0]

    @property
    def num_contexts(self) -> int:
        """C; the bare prompt of each fact is its context 0."""
        return len(self.rewrite) // len(self.edits)

    @property
    def bare(self) -> tuple[TokenizedPrompt, ...]:
        """The bare prompt of every fact."""
        return self.rewrite[:: self.num_contexts]

    def prompts(self, edit: int) -> list[Prompt]:
        """The prompts of a wave in which this is edit number ``edit``."""
        until = self.kl.subject_last + 1
        shared = self.rewrite[0].ids[:until] == self.kl.ids[:until]  # the bare prompt begins with the subject
        rows = [
            Prompt(row, edit, context, Role.REWRITE, fact, subject=shared and i == 0)
            for i, row in enumerate(self.rewrite)
            for fact, context in [divmod(i, self.num_contexts)]
        ]
        if not shared:
            rows.append(Prompt(self.kl, edit, 0, Role.KL))
        rows += [Prompt(row, edit, i, Role.EXTRA) for i, row in enumerate(self.extra)]
        each = len(self.neighbours) // len(self.edits)
        first = len(self.extra)
        return rows + [
            Prompt(row, edit, first + i % each, Role.EXTRA, i // each) for i, row in enumerate(self.neighbours)
        ]

    @property
    def span(self) -> int:
        """Tokens from the subject's last token on, in the longest prompt."""
        return max(len(prompt.tokens) - prompt.row.subject_last for prompt in self.prompts(0))


def encode_edits(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], contexts: Sequence[str], needs: Needs
) -> list[Request]:
    """Encode every prompt of every edit; bad input is found here, before anything runs.

    Raises:
        EditError: an edit does not fit the tokenizer or the context window; its number is named.
    """
    limit, size = context_limit(arch.model), vocabulary_size(arch.model)
    requests = []
    for number, edit in enumerate(edits):
        texts = rewrite_texts(edit, contexts, tokenizer)
        texts += [Text.fill(SUBJECT_PROMPT, edit.subject), *_further_texts(edit, needs)]
        held_prompts = needs.held if says_before_subject(edit) else ()
        if needs.held:
            texts += [edit_text(replace(edit, prompt=prompt), None, tokenizer=tokenizer) for prompt in held_prompts]
            texts += [edit_text(replace(edit, prompt=SLOT), None, context, tokenizer) for context in contexts]
        texts.append(edit_text(edit, None, tokenizer=tokenizer))
        try:
            rows = encode(tokenizer, texts, limit=limit)
            check_known([token for row in rows for token in row.ids], size)
        except EditError as error:
            if len(edits) == 1:
                raise
            raise type(error)(f"Edit {number}: {error}") from error
        count = len(contexts)
        _warn_of_joint(edit, rows[0], rows[-1])
        further = iter(rows[count + 1 : -1])
        sizes = (len(needs.prompts), len(needs.neighbours), len(held_prompts))
        extra, neighbours, held = (tuple(islice(further, size)) for size in sizes)
        requests.append(Request((edit,), tuple(rows[:count]), rows[count], extra, neighbours, held, tuple(further)))
    return requests


def says_before_subject(edit: Edit) -> bool:
    """Whether the prompt says something before its subject, two words at least: only there can the subject's key know of it."""
    return len(edit.prompt.partition(SLOT)[0].split()) > 1


def _further_texts(edit: Edit, needs: Needs) -> list[Text]:
    """The regularizers' prompts for an edit; those about other subjects with its target."""
    sentence = Text.fill(edit.prompt, SLOT, edit.target_new).string.rstrip()
    sentence += "" if sentence[-1] in ".!?" else "."
    others = [SPARE if other.casefold() == edit.subject.casefold() else other for other in needs.neighbours]
    return [
        *(Text.fill(prompt, edit.subject) for prompt in needs.prompts),
        *(
            Text.fill(f"{sentence} {edit.prompt.replace(SLOT, other)}", edit.subject, edit.target_new)
            for other in others
        ),
    ]


def _warn_of_joint(edit: Edit, whole: TokenizedPrompt, alone: TokenizedPrompt) -> None:
    """Warn where the prompt, typed alone, has other tokens than before its target."""
    before = whole.ids[: whole.target]
    if alone.ids != before:
        reason = "It ends with a space: leave that out" if edit.text[-1:].isspace() else "Write its end in another way"
        warn_user(
            f"The prompt {edit.text!r} has other tokens when it stands alone than before its target {edit.target_new!r}, so the "
            f"edit may not hold for the prompt as it is typed. {reason}."
        )


def join_subjects(requests: Sequence[Request]) -> list[Request]:
    """Make one request of all that are about the same subject, in the order in which the subjects first appear.

    A fact that is asked for twice counts once.
    """
    by_subject: dict[str, list[Request]] = {}
    for request in requests:
        alike = by_subject.setdefault(request.edit.subject, [])
        if all((request.edit.question, request.edit.target_new) != (e.edit.question, e.edit.target_new) for e in alike):
            alike.append(request)
    return [_joined(alike) for alike in by_subject.values()]


def _joined(requests: Sequence[Request]) -> Request:
    """One request of those of one subject."""
    first = next((request for request in requests if request.held), requests[0])
    return replace(
        first,
        edits=tuple(edit for request in requests for edit in request.edits),
        rewrite=tuple(row for request in requests for row in request.rewrite),
        neighbours=tuple(row for request in requests for row in request.neighbours),
    )
