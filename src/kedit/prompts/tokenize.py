"""Texts to tokens, once: where the subject ends and where the target stands comes from character offsets.

Axis letters are those of ``docs/notation.md``. Every text is encoded in one piece and never again, so the tokens
that are trained on are the tokens that the model will see.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.edit import SLOT, Edit
from kedit.errors import ContextLengthError, EditError, TokenizerError
from kedit.prompts.chat import carries_special_tokens, gap, has_template, place_in_template, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUOTES = frozenset("\"'")
_DASHES = frozenset("-–—")
_OPENING = frozenset("([{<“‘«/_@#$£€\\「『【《〈（")
_CLOSING = frozenset(")]}>,.;:!?%”’»-–—/_'」』】》〉）、。，；：！？")
# Scripts that are written without spaces between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "IDEOGRAPHIC", "FULLWIDTH")


def separator(prompt: str, target: str) -> str:
    """The text that belongs between a prompt and its continuation: one space or nothing.

    Rule: nothing where the prompt ends or the target begins with white space; where the prompt ends with an opening
    mark (a bracket, a slash, a currency sign, a straight quotation mark that stands after a space or after an opening
    mark, a dash that does not stand after a space); where the target begins with a closing mark (but not a number:
    "-5", ".5"; nor a quotation: "'Dune'"); or where the last character of the prompt and the first of the target are
    both of a script written without spaces. Else one space.
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    if _closes(target) or _opens(prompt) or (_unspaced(prompt[-1]) and _unspaced(target[0])):
        return ""
    return " "


def _opens(prompt: str) -> bool:
    """Return whether the last character of the prompt belongs to what follows."""
    last, before = prompt[-1], prompt[-2:-1]
    after_space = not before or before.isspace()
    if last in _QUOTES:
        return after_space or before in _OPENING
    if last in _DASHES:
        return not after_space
    return last in _OPENING


def _closes(target: str) -> bool:
    """Return whether the first character of the target belongs to what stands before it."""
    first, second = target[0], target[1:2]
    if first in ".-–" and second.isdigit():
        return False
    if first == "'" and target[-1] == "'":
        return False
    return first in _CLOSING


def _unspaced(char: str) -> bool:
    return unicodedata.name(char, "").startswith(_UNSPACED)


@dataclass(frozen=True)
class Text:
    """A text to encode, with the places that matter as character positions.

    ``subject`` is the half-open span of the subject; ``target`` the position where the target begins, or ``None``;
    ``separator`` the number of characters before it that stand between prompt and target. ``complete``: all special tokens are
    written in it, so the tokenizer adds none.
    """

    string: str
    subject: tuple[int, int]
    target: int | None = None
    separator: int = 0
    complete: bool = False

    @classmethod
    def fill(
        cls,
        template: str,
        subject: str,
        target: str | None = None,
        *,
        between: str | None = None,
        complete: bool = False,
    ) -> Text:
        """Put ``subject`` in the ``{}`` of ``template`` and append ``target`` after ``between`` (default: as it needs)."""
        start = template.index(SLOT)
        prompt = template[:start] + subject + template[start + len(SLOT) :]
        span = (start, start + len(subject))
        if target is None:
            return cls(prompt, span, complete=complete)
        if between is None:
            between = separator(prompt, target)
        return cls(prompt + between + target, span, len(prompt + between), len(between), complete)


@dataclass(frozen=True)
class TokenizedPrompt:
    """One encoded text.

    Attributes:
        ids: its tokens.
        subject_last: position of the subject's last token.
        target: position of the target's first token; ``len(ids)`` without a target.
        first: position of the subject's first token: a character of several bytes may be several tokens.
    """

    ids: tuple[int, ...]
    subject_last: int
    target: int
    first: int

    @property
    def prompt_last(self) -> int:
        """Position of the last token before the target, which predicts the target's first token."""
        return self.target - 1

    @property
    def labels(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.ids[self.target :]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], *, limit: int | None = None
) -> list[TokenizedPrompt]:
    """Encode ``texts``, each once and whole, and find their places by offsets.

    The subject's last token is the last token that covers a character of the subject, also where it reaches past
    the subject's end. The target's tokens are those from the first that covers a character of the target on; where
    the separator is a token of its own, it is the target's first, for the model has to say it too. A text that is complete, or
    that begins with the token for the beginning of a text, gets no special tokens.

    Args:
        tokenizer: a fast tokenizer (one that knows offsets).
        texts: what to encode.
        limit: longest row that the model can take, in tokens.

    Raises:
        TokenizerError: the tokenizer has no offsets.
        ContextLengthError: a row is longer than ``limit``.
        EditError: no token covers the subject or the target, or one token covers the end of the one and the beginning
            of the other.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} does not report character offsets, which kedit needs to find the subject's "
            "tokens. Load a fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    if not texts:
        return []
    start = tokenizer.bos_token
    complete = [text.complete or (start is not None and text.string.startswith(start)) for text in texts]
    rows: dict[int, TokenizedPrompt] = {}
    for as_it_is in sorted(set(complete)):
        numbers = [number for number, one in enumerate(complete) if one == as_it_is]
        encoded = tokenizer(
            [texts[number].string for number in numbers],
            add_special_tokens=not as_it_is,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        fields = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        for number, ids, offsets, special in zip(numbers, *fields, strict=True):
            rows[number] = _row(texts[number], ids, offsets, special)
            if limit is not None and len(rows[number].ids) > limit:
                raise ContextLengthError(
                    f"The text {_short(texts[number].string)!r} has {len(rows[number].ids)} tokens; the model's context window "
                    f"holds {limit}. Shorten the prompt or its contexts."
                )
    return [rows[number] for number in range(len(texts))]


def _row(text: Text, ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> TokenizedPrompt:
    end = len(ids)
    while end > 0 and special[end - 1]:  # a closing token (EOS) would end the text before the target's continuation
        end -= 1
    start, stop = text.subject
    lookup = [i for i in range(end) if not special[i] and offsets[i][0] < stop and offsets[i][1] > start]
    if not lookup:
        raise EditError(f"No token covers the subject in {_short(text.string)!r}. Check the subject's characters.")
    target = end
    if text.target is not None:
        covered = [i for i in range(end) if not special[i] and offsets[i][1] > text.target]
        if not covered:
            raise EditError(f"No token covers the target in {_short(text.string)!r}. Check the target's characters.")
        target = covered[0]
        while (
            text.separator
            and target > 0
            and not special[target - 1]
            and offsets[target - 1][0] >= text.target - text.separator
        ):
            target -= 1
    if target == 0:
        raise EditError(
            f"The target in {_short(text.string)!r} begins in the text's first token, which nothing precedes to predict it. "
            "Put words before it."
        )
    if lookup[-1] >= target:
        raise EditError(
            f"One token covers both the subject's end and the target's beginning in {_short(text.string)!r}, so nothing stands "
            "between the fact's key and its value. Put words between them."
        )
    return TokenizedPrompt(tuple(ids[:end]), lookup[-1], target, lookup[0])


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def pad(rows: Sequence[Sequence[int]], *, width: int = 0, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right, to ``width`` or the longest: ids [P, T] and mask [P, T], both int64.

    The filling token is never attended to, so any valid id serves; tokenizers without a pad token need none.
    """
    width = max(width, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask


def context_limit(model: Any) -> int | None:
    """The longest row the model can take, or ``None`` where its config states none."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(limit) if limit else None


def vocabulary_size(model: Any) -> int:
    """Return how many tokens the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_known(tokens: Sequence[int], size: int) -> None:
    """Raise ``EditError`` where a token is not one of the ``size`` that the model knows."""
    if (largest := max(tokens, default=0)) >= size:
        raise EditError(
            f"The tokenizer gives token {largest}, and the model knows {size} tokens. Use the model's own tokenizer."
        )


def rewrite_texts(edit: Edit, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None) -> list[Text]:
    """The edit's prompt with its target, in every context (templates with one ``{}`` each); see :func:`edit_text`."""
    return [edit_text(edit, edit.target_new, context, tokenizer) for context in contexts]


def edit_text(
    edit: Edit, target: str | None, context: str = SLOT, tokenizer: PreTrainedTokenizerBase | None = None
) -> Text:
    """The edit's prompt in a context, with ``target`` after it.

    A plain prompt stands in the context's ``{}``. A context that carries special tokens is a chat: the prompt is the user's message
    there, and what stands between the chat and an answer is taken from the chat template. A prompt that carries special tokens
    itself takes no context. The message of a chat edit stands in the context, inside the user's turn; where the context is a chat,
    the message stands alone, as plain text: so in every list of contexts that mixes both, each edit is in both forms.

    Args:
        edit: whose prompt.
        target: what follows it; ``None``: nothing.
        context: the template.
        tokenizer: with the chat template; needed for a chat edit and for contexts or prompts with special tokens.

    Raises:
        TokenizerError: the edit is one of a chat, and there is no chat template, or it cannot be used.
    """
    forced = None if edit.space is None else " " * edit.space
    if tokenizer is None:
        if edit.in_chat:
            raise TokenizerError("The prompt of a chat edit needs the tokenizer's chat template. Give the tokenizer.")
        return Text.fill(context.replace(SLOT, edit.prompt), edit.subject, target, between=forced)
    in_chat = carries_special_tokens(tokenizer, context)
    if edit.in_chat and not in_chat:
        message = context.replace(SLOT, edit.prompt)
        start = message.index(SLOT)
        string, place = place_in_template(tokenizer, message.replace(SLOT, edit.subject), edit.system)
        span = (place + start, place + start + len(edit.subject))
        if target is None:
            return Text(string, span, complete=True)
        between = gap(tokenizer, edit.system) if forced is None else forced
        return Text(string + between + target, span, len(string + between), len(between), complete=True)
    if edit.in_chat:
        return Text.fill(edit.prompt, edit.subject, target, between=forced)
    if carries_special_tokens(tokenizer, edit.prompt):
        ends = edit.prompt.rstrip().endswith(special_tokens(tokenizer))
        return Text.fill(edit.prompt, edit.subject, target, between="" if forced is None and ends else forced)
    if in_chat:
        between = (gap(tokenizer) if has_template(tokenizer) else "") if forced is None else forced
        return Text.fill(context.replace(SLOT, edit.prompt), edit.subject, target, between=between, complete=True)
    return Text.fill(context.replace(SLOT, edit.prompt), edit.subject, target, between=forced)
