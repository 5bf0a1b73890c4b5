"""Likelihood of continuations: many short texts in few forward passes.

Prompt and continuation are encoded in one piece (:mod:`kedit.prompts.tokenize`); rows are padded on the right, sorted by length and
packed by a token budget; the LM head runs only on the rows that are read; a text that begins another one is read there, and
what texts have in common at their beginning runs once.
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
from kedit.prompts.prefixes import PackedRunner, PrefixRunner, PrefixTree, can_share
from kedit.prompts.tokenize import Text, TokenizedPrompt, separator
from kedit.utils.packing import cut_by_length, fixed_cost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_FORWARD = 16_384
LOGITS_PER_FORWARD = 1 << 27  # numbers; half a GiB in float32
_KEPT = 4  # of so many tokens that may run at once, the keys and values of one may be kept: they take more room than it does


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
    """Where one row's answer is read: in which text, first place, and the labels."""

    source: int
    start: int
    labels: tuple[int, ...]


def score_rows(
    arch: ModelArch,
    rows: Sequence[TokenizedPrompt],
    *,
    tokens: int = TOKENS_PER_FORWARD,
    logits: int = LOGITS_PER_FORWARD,
    fixed: int | None = None,
) -> list[Answer]:
    """The likelihood of each row's continuation given its prompt.

    Where it saves time, what rows have in common at their beginning runs once, and the rest against its keys and values
    (:mod:`kedit.prompts.prefixes`).

    Args:
        arch: the model.
        rows: encoded prompts with continuations.
        tokens: padded tokens per forward pass at most (one row at least).
        logits: numbers that the head may return per forward pass.
        fixed: what a forward pass costs besides its tokens, as so many tokens; by default by the kind of device.
    """
    for row in rows:
        if not row.labels:
            raise EditError("A row without continuation cannot be scored. Encode it with a target.")
    texts, readings = _share(rows)
    fixed = fixed_cost(arch.input_device.type) if fixed is None else fixed
    places = places_per_pass(arch, logits)
    whole = PrefixTree(texts, 0)
    packed = PackedRunner.cheapest(arch, texts, _reads(texts, readings), tokens, places, fixed)
    if packed.cost(fixed, tokens) < whole.cost(fixed) and can_share(arch, packed.tree, packed=True):
        scoring = _Scoring(arch, packed.tree, readings)
        for part in scoring.packed(packed, tokens, places):
            scoring.read(packed, part)
        return scoring.answers()
    tree = PrefixTree.cheapest(texts, fixed)
    if not can_share(arch, tree, packed=False):
        tree = whole
    scoring = _Scoring(arch, tree, readings)
    for family in tree.families(tokens // _KEPT):
        runner = PrefixRunner(arch, tree)
        for level in tree.levels(family):
            for batch in scoring.batches(level, tokens, places, fixed):
                scoring.read(runner, batch)
    return scoring.answers()


def _share(rows: Sequence[TokenizedPrompt]) -> tuple[list[tuple[int, ...]], list[_Reading]]:
    """Find the texts that have to run: one that begins another one is left out and read there (attention is causal)."""
    fed = [row.ids[:-1] for row in rows]
    texts: list[tuple[int, ...]] = []
    source = [0] * len(rows)
    for number in sorted(range(len(rows)), key=lambda i: fed[i], reverse=True):
        ids = fed[number]
        if not texts or texts[-1][: len(ids)] != ids:  # what extends ids stands right before it in this order
            texts.append(ids)
        source[number] = len(texts) - 1
    return texts, [_Reading(source[i], row.prompt_last, row.labels) for i, row in enumerate(rows)]


def _reads(texts: Sequence[tuple[int, ...]], readings: Sequence[_Reading]) -> list[int]:
    """At how many places each text is read, at most."""
    reads = [0] * len(texts)
    for reading in readings:
        reads[reading.source] += len(reading.labels)
    return reads


class _Scoring:
    """Reads the labels of all rows where the texts' tokens run: one place of one text may serve several rows."""

    def __init__(self, arch: ModelArch, tree: PrefixTree, readings: Sequence[_Reading]) -> None:
        self.arch, self.tree, self.readings = arch, tree, readings
        self.nll = [[math.nan] * len(reading.labels) for reading in readings]
        self.argmax = [[0] * len(reading.labels) for reading in readings]
        # By text, by place: which label of which row is read.
        self.wanted: list[dict[int, list[tuple[int, int]]]] = [{} for _ in tree.branches]
        for number, reading in enumerate(readings):
            for i in range(len(reading.labels)):
                place = reading.start + i
                owner = tree.owner(reading.source, place)
                self.wanted[owner].setdefault(place - tree.branches[owner].start, []).append((number, i))

    def batches(self, level: Sequence[int], tokens: int, places: int, fixed: int) -> Iterator[list[int]]:
        """Texts of similar length; longest first, so that what does not fit in memory fails at once."""
        lengths = [self.tree.length(number) for number in level]
        reads = [
            len(self.wanted[number]) if self.arch.keeps_logits else n for number, n in zip(level, lengths, strict=True)
        ]
        for alike in reversed(cut_by_length(lengths, [1] * len(level), fixed)):
            batch: list[int] = []
            held = 0
            for i in reversed(alike):
                if batch and ((len(batch) + 1) * self.tree.length(batch[0]) > tokens or held + reads[i] > places):
                    yield batch
                    batch, held = [], 0
                batch.append(level[i])
                held += reads[i]
            yield batch

    def packed(self, runner: PackedRunner, tokens: int, places: int) -> Iterator[list[int]]:
        """The texts of rows that run together."""
        for rows in runner.batches(tokens):
            batch: list[int] = []
            held = 0
            for row in rows:
                width, texts = runner.widths[row], runner.rows[row]
                reads = sum(len(self.wanted[text]) for text in texts) if self.arch.keeps_logits else width
                if batch and held + reads > places:
                    yield batch
                    batch, held = [], 0
                batch += texts
                held += reads
            yield batch

    @torch.no_grad()
    def read(self, runner: PrefixRunner | PackedRunner, batch: Sequence[int]) -> None:
        """Run texts and read what is wanted of them."""
        keep = torch.zeros((len(batch), max(map(self.tree.length, batch))), dtype=torch.bool)
        number, labels, cells = [], [], []
        count = 0
        for row, text in enumerate(batch):
            for place in sorted(self.wanted[text]):
                keep[row, place] = True
                for cell in self.wanted[text][place]:
                    cells.append(cell)
                    number.append(count)
                    labels.append(self.readings[cell[0]].labels[cell[1]])
                count += 1
        logits = runner.logits(batch, keep)
        where = torch.tensor(number, dtype=torch.int64, device=logits.device)
        found = _read(logits, where, torch.tensor(labels, dtype=torch.int64, device=logits.device))
        for (answer, i), nll, argmax in zip(cells, *found, strict=True):
            self.nll[answer][i], self.argmax[answer][i] = nll, argmax

    def answers(self) -> list[Answer]:
        """The rows' answers, once every text has run."""
        return [
            Answer(sum(nll) / len(nll), reading.labels, tuple(argmax))
            for reading, nll, argmax in zip(self.readings, self.nll, self.argmax, strict=True)
        ]


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
