"""Prompts in a model's chat template, and what stands between such a prompt and its answer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kedit.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "Which?", "This"


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def in_template(
    tokenizer: PreTrainedTokenizerBase, user: str, system: str | None = None, answer: str | None = None
) -> str:
    """A user's message in the chat template, up to where the model answers; with ``answer``, that too.

    The text holds the template's special tokens, the beginning of a text among them: encode it without adding any.

    Raises:
        TokenizerError: there is no template, it fails, or it does not take these turns.
    """
    if not has_template(tokenizer):
        raise TokenizerError("The tokenizer has no chat template. Edit and ask in plain text (without chat, --chat).")
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": user})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except Exception as error:  # the template is a program, which may fail as it likes
        role = " It may take no system message." if system is not None else ""
        raise TokenizerError(
            f"The model's chat template fails ({error}).{role} Repair it in the model's folder."
        ) from error
    return str(text)


def gap(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> str:
    """The white space between a chat prompt and the model's answer, as the template writes an answer: mostly none."""
    return _gap(_Template(tokenizer), system)


def place_in_template(tokenizer: PreTrainedTokenizerBase, message: str, system: str | None = None) -> tuple[str, int]:
    """A user's message in the chat template, as :func:`in_template` gives it, and the position where the message begins in it.

    Raises:
        TokenizerError: as :func:`in_template`; or the template changes the message, so that its place is not known.
    """
    text = in_template(tokenizer, message, system)
    bare = message.strip()  # some templates trim messages
    place = text.rfind(bare)
    if place < 0:
        raise TokenizerError(
            f"The model's chat template changes the message {message!r}, so its words have no known place. Ask in plain text."
        )
    return text, place - (len(message) - len(message.lstrip()))


def carries_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether special tokens are written in a text."""
    return any(token in text for token in special_tokens(tokenizer))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens that no ordinary text holds: ``<s>``, ``<|im_start|>``, ``[INST]``; not a pad token ``!``."""
    size, known = _KNOWN.get(tokenizer, (-1, ()))
    if size != len(tokenizer):
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        known = tuple(name for name in names if len(name) > 2 and name[0] in "<[{|")
        _KNOWN[tokenizer] = len(tokenizer), known
    return known


_KNOWN: WeakKeyDictionary[Any, tuple[int, tuple[str, ...]]] = WeakKeyDictionary()


class _Template:
    """A tokenizer as a key: two with one template are the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.key = (str(tokenizer.chat_template), str(tokenizer.bos_token))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Template) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=32)
def _gap(template: _Template, system: str | None) -> str:
    prompt = in_template(template.tokenizer, _QUESTION, system)
    try:
        whole = in_template(template.tokenizer, _QUESTION, system, _ANSWER)
    except TokenizerError:  # the question could be written, so it can be edited
        return ""
    between, found, _ = whole.removeprefix(prompt).partition(_ANSWER)
    return between if found and whole.startswith(prompt) and not between.strip() else ""
