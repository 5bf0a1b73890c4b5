"""Context templates: short texts that stand before a prompt, so that an edit does not hang on one wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kedit.edit import SLOT
from kedit.errors import ConfigError, NonFiniteError, TokenizerError
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.models.lock import holding_model
from kedit.prompts.chat import carries_special_tokens, in_template
from kedit.prompts.tokenize import Text, check_known, encode, pad, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BARE = SLOT
_SEEDS = ("The", "Therefore", "Because", "I", "You")  # EasyEdit's, for tokenizers that mark no beginning of a text


def check_contexts(contexts: Sequence[str]) -> tuple[str, ...]:
    """Return ``contexts`` as a tuple; raise :class:`ConfigError` unless each has one ``{}`` and the first is ``"{}"``."""
    if isinstance(contexts, str) or not all(isinstance(context, str) for context in contexts):
        raise ConfigError(
            f"contexts is a list of templates, each a text with one '{{}}', or 'mixed'; found {contexts!r}."
        )
    templates = tuple(contexts)
    if not templates or templates[0] != BARE:
        raise ConfigError(f"The first context must be '{{}}', the bare prompt; found {templates[:1]}.")
    for context in templates:
        if context.count(SLOT) != 1:
            raise ConfigError(f"A context holds exactly one '{{}}', the place of the prompt; found {context!r}.")
    return templates


@holding_model
def generate_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    top_k: int = 5,
    chat: bool = False,
) -> tuple[str, ...]:
    """``"{}"`` and texts sampled from the model, each ended by a full stop and followed by ``{}``.

    The model continues its beginning-of-text token, or one of five plain words where the tokenizer has none. With ``chat``, every
    second one stands in the model's chat template as a user's message, the first of them without a sampled text, so that an edit
    holds in plain text and in a chat.

    Args:
        model: what samples.
        tokenizer: its tokenizer.
        lengths: (tokens, how many), for example ``[(5, 10), (10, 10)]``.
        seed: of the sampling; the same seed gives the same contexts, and no other random state is touched.
        top_k: candidates per token.
        chat: whether some of the contexts are chats.

    Raises:
        TokenizerError: ``chat``, and the tokenizer has no chat template that could be used.
    """
    if chat:
        _in_chat(tokenizer, BARE)  # fails now, before anything is sampled
    device = ModelArch(model).input_device
    generator = torch.Generator().manual_seed(seed)
    contexts = [BARE]
    for length, count in lengths:
        starts = _starts(tokenizer, count)
        check_known([token for row in starts for token in row], vocabulary_size(model))
        rows = _sample(model, starts, length, top_k, generator, device)
        for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
            contexts.append(_as_template(text))
    if chat:
        first = _in_chat(tokenizer, BARE)
        contexts[1::2] = [first, *(_in_chat(tokenizer, context) for context in contexts[3::2])]
    return tuple(dict.fromkeys(contexts))


def _in_chat(tokenizer: PreTrainedTokenizerBase, context: str) -> str:
    """A context as a user's message in the chat template, up to where the model answers."""
    template = in_template(tokenizer, context)
    if template.count(SLOT) != 1 or not carries_special_tokens(tokenizer, template):
        raise TokenizerError(
            "The model's chat template has no special tokens, or braces of its own, so it cannot be a context. Leave contexts out."
        )
    return template


def _starts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    if tokenizer.bos_token_id is not None:
        return [[tokenizer.bos_token_id]] * count
    texts = [Text(word, (0, len(word))) for word in _SEEDS]
    seeds = [row.ids for row in encode(tokenizer, texts)]  # without the EOS that some tokenizers add
    return [list(seeds[i % len(seeds)]) for i in range(count)]


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    starts: list[list[int]],
    length: int,
    top_k: int,
    generator: torch.Generator,
    device: torch.device,
) -> list[list[int]]:
    """Continue each start by ``length`` tokens. Short texts: each step runs the whole text again, without a cache."""
    rows = [list(start) for start in starts]
    with inference_state(model):
        for _ in range(length):
            ids, mask = pad(rows)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            last = logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])].float().cpu()
            if not torch.isfinite(last).all():
                raise NonFiniteError(
                    "The model's logits are NaN or infinite, so no contexts can be sampled. Check its weights."
                )
            best = last.topk(min(top_k, last.shape[-1]))
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            for row, token in zip(rows, best.indices.gather(1, drawn).flatten().tolist(), strict=True):
                row.append(token)
    return rows


def _as_template(text: str) -> str:
    clean = " ".join(text.replace("{", " ").replace("}", " ").split())
    if not clean:
        return BARE
    return f"{clean} {SLOT}" if clean[-1] in ".!?" else f"{clean}. {SLOT}"
