"""Likelihood of continuations: many short texts in few forward passes.

Prompt and continuation are encoded in one piece (:mod:`kedit.prompts.tokenize`); rows are padded on the right, sorted by length and
packed by a token budget; the LM head runs only on the rows that are read; a text that begins another one is read there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit.errors import EditError
from kedit.models import ModelArch
from kedit.prompts.chat import gap, place_in_template
from kedit.prompts.tokenize import Text, TokenizedPrompt, pad, separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_FORWARD = 16_384
LOGITS_PER_FORWARD = 1 << 27  # numbers; half a GiB in float32


@dataclass(frozen=True)
class Answer:
    """A continuation under the model, teacher-forced.

    Attributes:
        nll: mean negative log-likelihood per token, in nats.
        labels: the continuation's tokens.
        argmax: the token that the model prefers at each of their places.
    """

    nll: float
    labels: tuple[int, ...]
    argmax: tuple[int, ...]

    @property
    def probability(self) -> float:
        """exp(-nll): the geometric mean of the token probabilities, as the published magnitudes use it."""
        return math.exp(-self.nll)

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are the model's first choice."""
        hits = sum(a == b for a, b in zip(self.labels, self.argmax, strict=True))
        return hits / len(self.labels)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    message: str,
    continuation: str | None,
    subject: tuple[int, int] | None = None,
    system: str | None = None,
) -> Text:
    """A user's message in the chat template and an answer, as :func:`pair_text` of a plain prompt; ``None``: no answer."""
    string, place = place_in_template(tokenizer, message, system)
    start, stop = subject or (0, len(message))
    span = (place + start, place + stop)
    if continuation is None:
        return Text(string, span, complete=True)
    between = gap(tokenizer, system)
    return Text(string + between + continuation, span, len(string + between), len(between), complete=True)


def pair_text(prompt: str, continuation: str, subject: tuple[int, int] | None = None) -> Text:
    """A prompt and its continuation as one text; ``subject`` is a span of the prompt, all of it by default."""
    between = separator(prompt, continuation)
    joint = prompt + between
    return Text(joint + continuation, subject or (0, len(prompt)), len(joint), len(between))


@dataclass(frozen=True)
class _Reading:
    """The place at which one row's answer is read: forward row, first position, and the labels."""

    source: int
    start: int
    labels: tuple[int, ...]


def score_rows(
    arch: ModelArch,
    rows: Sequence[TokenizedPrompt],
    *,
    tokens: int = TOKENS_PER_FORWARD,
    logits: int = LOGITS_PER_FORWARD,
) -> list[Answer]:
    """The likelihood of each row's continuation given its prompt.

    Args:
        arch: the model.
        rows: encoded prompts with continuations.
        tokens: padded tokens per forward pass at most (one row at least).
        logits: numbers that the head may return per forward pass.
    """
    for row in rows:
        if not row.labels:
            raise EditError("A row without continuation cannot be scored. Encode it with a target.")
    inputs, readings = _share(rows)
    answers: list[Answer | None] = [None] * len(rows)
    by_source: list[list[int]] = [[] for _ in inputs]
    for number, reading in enumerate(readings):
        by_source[reading.source].append(number)
    reads = [sum(len(readings[number].labels) for number in numbers) for numbers in by_source]
    if not arch.keeps_logits:
        reads = [len(ids) for ids in inputs]
    for batch in _pack([len(ids) for ids in inputs], reads, tokens, places_per_pass(arch, logits)):
        numbers = [number for source in batch for number in by_source[source]]
        place = {source: i for i, source in enumerate(batch)}
        scored = _forward(arch, [inputs[source] for source in batch], [readings[n] for n in numbers], place)
        for number, answer in zip(numbers, scored, strict=True):
            answers[number] = answer
    return [answer for answer in answers if answer is not None]


def _share(rows: Sequence[TokenizedPrompt]) -> tuple[list[tuple[int, ...]], list[_Reading]]:
    """Find the texts that have to run: one that begins another one is left out and read there (attention is causal)."""
    fed = [row.ids[:-1] for row in rows]
    inputs: list[tuple[int, ...]] = []
    source = [0] * len(rows)
    for number in sorted(range(len(rows)), key=lambda i: fed[i], reverse=True):
        ids = fed[number]
        if not inputs or inputs[-1][: len(ids)] != ids:  # what extends ids stands right before it in this order
            inputs.append(ids)
        source[number] = len(inputs) - 1
    return inputs, [_Reading(source[i], row.prompt_last, row.labels) for i, row in enumerate(rows)]


def _pack(lengths: Sequence[int], reads: Sequence[int], tokens: int, places: int) -> Iterator[list[int]]:
    """Batches of rows of similar length; longest first, so that what does not fit in memory fails at once."""
    batch: list[int] = []
    held = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = batch and ((len(batch) + 1) * lengths[batch[0]] > tokens or held + reads[number] > places)
        if full:
            yield batch
            batch, held = [], 0
        batch.append(number)
        held += reads[number]
    if batch:
        yield batch


@torch.no_grad()
def _forward(
    arch: ModelArch, inputs: Sequence[tuple[int, ...]], readings: Sequence[_Reading], place: dict[int, int]
) -> list[Answer]:
    ids, mask = pad(inputs)
    row = torch.tensor([place[r.source] for r in readings for _ in r.labels])
    column = torch.tensor([r.start + i for r in readings for i in range(len(r.labels))])
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    keep[row, column] = True
    number = (keep.flatten().cumsum(0) - 1).view(ids.shape)[row, column]
    logits = last_logits(arch, ids, mask, keep)
    labels = torch.tensor([label for r in readings for label in r.labels], device=logits.device)
    nll, argmax = _read(logits, number.to(logits.device), labels)
    answers, start = [], 0
    for reading in readings:
        stop = start + len(reading.labels)
        answers.append(Answer(sum(nll[start:stop]) / (stop - start), reading.labels, tuple(argmax[start:stop])))
        start = stop
    return answers


def places_per_pass(arch: ModelArch, logits: int = LOGITS_PER_FORWARD) -> int:
    """At how many places the head may be read in one forward pass."""
    return max(1, logits // int(arch.model.get_output_embeddings().weight.shape[0]))


def prompts_per_pass(arch: ModelArch, length: int, read: int, tokens: int = TOKENS_PER_FORWARD) -> int:
    """Return how many prompts run in one forward pass: of ``length`` tokens each, with logits at ``read`` of them."""
    return max(1, min(tokens // length, places_per_pass(arch) // (read if arch.keeps_logits else length)))


def last_logits(arch: ModelArch, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Logits [N, V] at the marked places of a right-padded batch, row by row."""
    device = arch.input_device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    return arch.logits(keep.to(device), **inputs)


def _read(logits: Tensor, number: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """NLL of the labels and the first choice, at rows ``number`` of the logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1)
    nll = normaliser[number] - wide[number, labels]
    nlls: list[float] = nll.double().tolist()
    choices: list[int] = wide.argmax(-1)[number].tolist()
    return nlls, choices
