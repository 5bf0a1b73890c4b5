"""Training rows: packed tokens, where the names are in them, and who may attend to a name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kedit.embedded.world import Sentence, World

END = "<|endoftext|>"
VOCABULARY = 1_300
FILLER_WEIGHT = 0.15  # of tokens that are no answer, in the loss: the answers are what takes long to learn


def build_tokenizer(world: World, documents: int = 6_000) -> Tokenizer:
    """A byte-level BPE of about 1,300 tokens, trained on the world's text; its only special token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world.documents(0, documents), trainer)
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. Letters: B rows, T tokens.

    Attributes:
        ids: tokens, [B, T].
        name: the number of the mention a token belongs to, 0 if none, [B, T]; numbers are unique within a row.
        last: whether it is the mention's last token, [B, T].
        weight: of a token in the loss, [B, T].
    """

    ids: Tensor
    name: Tensor
    last: Tensor
    weight: Tensor


class Rows:
    """Draws batches from the world's passages (about its first ``people``); deterministic in the seed."""

    def __init__(
        self, world: World, tokenizer: Tokenizer, *, length: int, seed: int, people: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.passages = world.passages(seed, people)
        self.rng = random.Random(f"rows {seed}")
        self.end = int(tokenizer.token_to_id(END) or 0)
        self._known: dict[tuple[Sentence, bool], list[tuple[int, int, bool, float]]] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int, bool, float]]]:
        """Endless rows; half of them begin with the end-of-text token."""
        stop = (self.end, 0, False, FILLER_WEIGHT)
        while True:
            row = [stop] if self.rng.random() < 0.5 else []
            mentions = 0
            while len(row) < self.length:
                for i, sentence in enumerate(next(self.passages)):
                    row += [(t, n and n + mentions, last, w) for t, n, last, w in self._encode(sentence, i > 0)]
                    mentions += len(sentence.mentions)
                row.append(stop)
            yield row[: self.length]

    def batches(self, size: int) -> Iterator[Batch]:
        """Endless batches of ``size`` rows."""
        rows = iter(self)
        while True:
            batch = [next(rows) for _ in range(size)]
            ids, name, last, weight = (torch.tensor([[token[i] for token in row] for row in batch]) for i in range(4))
            yield Batch(ids, name, last.bool(), weight)

    def _encode(self, sentence: Sentence, follows: bool) -> list[tuple[int, int, bool, float]]:
        """Token, number of its mention (from 1), last of the mention, weight; a sentence that follows starts with a space."""
        if (sentence, follows) in self._known:
            return self._known[sentence, follows]
        encoding = self.tokenizer.encode(" " * follows + sentence.text)
        tokens = []
        for token, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            stop -= follows
            inside = [i for i, (a, b) in enumerate(sentence.mentions, start=1) if a < stop <= b]
            number = inside[0] if inside else 0
            last = bool(number) and stop == sentence.mentions[number - 1][1]
            answer = sentence.answer is not None and sentence.answer[0] < stop <= sentence.answer[1]
            tokens.append((token, number, last, 1.0 if answer else FILLER_WEIGHT))
        self._known[sentence, follows] = tokens
        return tokens


def block_masks(batch: Batch, depth: Tensor, last_only: Tensor, num_layers: int) -> list[Tensor]:
    """Return the mask that is added to the attention scores, per block [B, 1, T, T].

    In blocks up to a row's depth, tokens outside a mention do not see it. In the blocks above they see, in the rows
    marked so, only its last token. Within a mention attention is causal as ever.

    Args:
        batch: the rows.
        depth: last block in which names are hidden, -1 for none, [B].
        last_only: rows in which only a name's last token is seen later, [B].
        num_layers: blocks of the model.
    """
    length = batch.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    within = (batch.name[:, None, :] == 0) | (batch.name[:, None, :] == batch.name[:, :, None])  # [B, query, key]
    hidden = causal & within
    late = causal & (within | batch.last[:, None, :] | ~last_only[:, None, None])
    masks = []
    for block in range(num_layers):
        allowed = torch.where((block <= depth)[:, None, None], hidden, late)
        masks.append(torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None])
    return masks
