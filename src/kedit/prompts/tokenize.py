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
    ``separator`` the number of characters before it that stand between prompt and target.
    """

    string: str
    subject: tuple[int, int]
    target: int | None = None
    separator: int = 0

    @classmethod
    def fill(cls, template: str, subject: str, target: str | None = None) -> Text:
        """Put ``subject`` in the ``{}`` of ``template`` and append ``target`` after the separator it needs."""
        start = template.index(SLOT)
        prompt = template[:start] + subject + template[start + len(SLOT) :]
        span = (start, start + len(subject))
        if target is None:
            return cls(prompt, span)
        between = separator(prompt, target)
        return cls(prompt + between + target, span, len(prompt + between), len(between))


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
    the separator is a token of its own, it is the target's first, for the model has to say it too.

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
    encoded = tokenizer(
        [text.string for text in texts],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    rows = []
    for text, ids, offsets, special in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        rows.append(_row(text, ids, offsets, special))
        if limit is not None and len(rows[-1].ids) > limit:
            raise ContextLengthError(
                f"The text {_short(text.string)!r} has {len(rows[-1].ids)} tokens; the model's context window holds {limit}. "
                "Shorten the prompt or its contexts."
            )
    return rows


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


def rewrite_texts(edit: Edit, contexts: Sequence[str]) -> list[Text]:
    """The edit's prompt with its target, in every context (templates with one ``{}`` each)."""
    return [Text.fill(context.replace(SLOT, edit.prompt), edit.subject, edit.target_new) for context in contexts]
