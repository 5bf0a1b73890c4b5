"""Free continuation: greedy, to see what a model really says, and sampled, to see whether it still writes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.models import ModelArch
from kedit.models.compat import cache_argument, cache_name, cache_of, forward_parameters
from kedit.prompts.likelihood import last_logits
from kedit.prompts.tokenize import context_limit, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOPS = ".!?;\n"


def says(text: str, answers: Sequence[str], *, ended: bool) -> bool:
    """Return whether a greedy continuation is exactly one of the answers, up to its first natural stop.

    A natural stop is the end of the text (``ended``), or one of ``. ! ? ;`` or a line break right after the answer;
    case and runs of white space do not count.
    """
    said = _normal(text)
    for answer in answers:
        wanted = _normal(answer)
        if said.startswith(wanted):
            rest = said[len(wanted) :]
            if (not rest and ended) or rest[:1] in tuple(STOPS):
                return True
    return False


def _normal(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.strip().casefold().split("\n"))
    return "\n".join(lines)


@torch.no_grad()
def continue_rows(
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    length: int | Sequence[int],
    *,
    top_k: int | None = None,
    seed: int = 0,
    tokens: int = 16_384,
) -> list[tuple[str, bool]]:
    """Continue each prompt by at most ``length`` tokens: (text, whether it came to an end of its own).

    A prompt goes on as far as it would alone, to the end of its own context window, whichever others are given with it.

    Args:
        arch: the model.
        tokenizer: its tokenizer.
        prompts: token rows.
        length: new tokens at most, of all prompts or of each.
        top_k: sample among so many candidates; greedy without.
        seed: of the sampling; a prompt's draws depend on the seed and the prompt alone.
        tokens: padded tokens per forward pass at most.
    """
    continuations: list[tuple[str, bool]] = [("", False)] * len(prompts)
    wanted = [length] * len(prompts) if isinstance(length, int) else list(length)
    limit = context_limit(arch.model)
    rooms = [n if limit is None else max(0, min(n, limit - len(ids))) for n, ids in zip(wanted, prompts, strict=True)]
    for batch in _batches([len(ids) for ids in prompts], rooms, limit, tokens):
        decoding = _Decoding(arch, tokenizer, [prompts[i] for i in batch], top_k, seed)
        rows = decoding.run([rooms[i] for i in batch])
        for i, (ids, ended) in zip(batch, rows, strict=True):
            continuations[i] = (str(tokenizer.decode(ids, skip_special_tokens=True)), ended)
    return continuations


def _batches(lengths: Sequence[int], rooms: Sequence[int], limit: int | None, tokens: int) -> Iterator[list[int]]:
    """Prompts that are continued together, longest first; none is carried past ``limit`` by a longer one's padding."""
    batch: list[int] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            width = lengths[batch[0]] + max(room, rooms[i])
            if (len(batch) + 1) * width > tokens or (limit is not None and width > limit):
                yield batch
                batch, room = [], 0
        batch.append(i)
        room = max(room, rooms[i])
    if batch:
        yield batch


class _Decoding:
    """One batch: left-padded, with a key/value cache, positions given; models without a cache run every text whole."""

    def __init__(
        self,
        arch: ModelArch,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[tuple[int, ...]],
        top_k: int | None,
        seed: int,
    ) -> None:
        self.arch = arch
        self.ends = _end_tokens(arch, tokenizer)
        self.top_k = top_k
        width = max(len(ids) for ids in prompts)
        self.ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
        self.mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        self.generators = [torch.Generator().manual_seed(_seed_of(seed, ids)) for ids in prompts] if top_k else []
        self.positions = "position_ids" in forward_parameters(arch.model)
        self.cached = cache_name(arch.model) is not None
        self.rows = [list(ids) for ids in prompts]

    def run(self, rooms: Sequence[int]) -> list[tuple[list[int], bool]]:
        count = len(self.ids)
        written: list[list[int]] = [[] for _ in range(count)]
        ended = [False] * count
        fed, cache = self.ids, None
        for step in range(max(rooms)):
            logits, cache = self._forward(fed, cache)
            choice = self._choose(logits)
            for i, token in enumerate(choice):
                if not ended[i] and step < rooms[i]:
                    ended[i] = token in self.ends
                    if not ended[i]:
                        written[i].append(token)
            if all(end or step >= room - 1 for end, room in zip(ended, rooms, strict=True)):
                break
            self.rows = [[*row, token] for row, token in zip(self.rows, choice, strict=True)]
            fed = torch.tensor(choice)[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(count, 1)], 1)
        return list(zip(written, ended, strict=True))

    def _forward(self, fed: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if not self.cached:
            ids, mask = pad(self.rows)
            keep = torch.zeros(ids.shape, dtype=torch.bool)
            keep[torch.arange(len(ids)), mask.sum(1) - 1] = True
            return last_logits(self.arch, ids, mask, keep).float().cpu(), None
        device = self.arch.input_device
        inputs: dict[str, Any] = {"input_ids": fed.to(device), "attention_mask": self.mask.to(device)}
        if self.positions:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :].to(device)
        if self.arch.keeps_logits:
            inputs["logits_to_keep"] = 1
        output = self.arch.model(**inputs, **cache_argument(self.arch.model, cache), use_cache=True)
        return output.logits[:, -1].float().cpu(), cache_of(output)

    def _choose(self, logits: Tensor) -> list[int]:
        if self.top_k is None:
            greedy: list[int] = logits.argmax(-1).tolist()
            return greedy
        best = logits.topk(min(self.top_k, logits.shape[-1]))
        drawn = [
            int(torch.multinomial(row.softmax(-1), 1, generator=generator))
            for row, generator in zip(best.values, self.generators, strict=True)
        ]
        return [int(best.indices[i, j]) for i, j in enumerate(drawn)]


def _end_tokens(arch: ModelArch, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    given = getattr(getattr(arch.model, "generation_config", None), "eos_token_id", None)
    ids = {given} if isinstance(given, int) else set(given or ())
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def _seed_of(seed: int, ids: Sequence[int]) -> int:
    return zlib.crc32(" ".join(map(str, (seed, *ids))).encode())
