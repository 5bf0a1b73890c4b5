"""Corrupted prompts with activations restored: whole, or only what a restoration can change.

A restoration at one token of one block changes nothing below that block and nothing at earlier tokens. So one pass keeps, of the
clean run, what is restored, and of the corrupted runs the hidden states that enter each block and all keys and values;
every restoration then runs the blocks from its own on, over the tokens from its own on. The model's own forward does the
work, as in :mod:`kedit.values.cached_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kedit.analysis.facts import Fact
from kedit.analysis.interventions import ACTIVATIONS, Change, changing, copy_rows, put_values, window_of
from kedit.evaluation.statistics import Floats
from kedit.models import ModelArch, Site
from kedit.models.compat import cache_argument, cache_name, forward_parameters
from kedit.models.hooks import by_prompt, on_input, on_output
from kedit.prompts.likelihood import last_logits, places_per_pass, prompts_per_pass
from kedit.prompts.prefixes import CANNOT_RUN, PrefixLayer, tolerance
from kedit.prompts.tokenize import pad
from kedit.utils.packing import cut_by_length, fixed_cost
from kedit.utils.progress import logger
from kedit.values.cached_forward import noting_tuples, passing_through


@dataclass(frozen=True)
class Restoration:
    """One restoration: one kind of activation, at one token, in the window around one block."""

    kind: str
    token: int
    layer: int

    def sites(self, width: int, num_layers: int) -> list[Site]:
        """What gets its clean value back."""
        window = window_of(self.layer, 1 if self.kind == "hidden" else width, num_layers)
        return [Site(layer, ACTIVATIONS[self.kind]) for layer in window]


def restorations(fact: Fact, kinds: Sequence[str], num_layers: int) -> list[Restoration]:
    """Everything that is restored in a fact: kinds × tokens from the subject on × blocks."""
    tokens, layers = range(fact.row.first, fact.num_prompt), range(num_layers)
    return [Restoration(kind, token, layer) for kind in kinds for token in tokens for layer in layers]


Item = tuple[int, Restoration]
"""A sample of the noise, and what is restored in it."""


class WholePrompts:
    """Runs every corrupted prompt whole, beside a clean one that gives it its values.

    Args:
        arch: the model.
        fact: what is asked.
        width: of the window.
        noise: [S, subject tokens, H].
        tokens: padded tokens per forward pass at most.
    """

    def __init__(self, arch: ModelArch, fact: Fact, width: int, noise: Tensor, tokens: int) -> None:
        self.arch, self.fact, self.width, self.noise, self.tokens = arch, fact, width, noise, tokens
        # Beside the clean prompt.
        self.size = max(1, prompts_per_pass(arch, len(fact.fed), len(fact.row.labels), tokens) - 1)

    def unrestored(self) -> tuple[float, Floats]:
        """Log-probability of the answer in the clean prompt, and in every corrupted one [S]."""
        clean, scores = float("nan"), []
        for start in range(0, len(self.noise), self.size):
            samples = range(len(self.noise))[start : start + self.size]
            found = self._run([(sample, None) for sample in samples])
            clean = float(found[0])
            scores.append(found[1:])
        return clean, np.concatenate(scores)

    def scores(self, items: Sequence[Item], done: Callable[[int], None]) -> Floats:
        """Log-probability of the answer in a corrupted prompt per item, [N]; ``done`` is told how many are."""
        scores = []
        for start in range(0, len(items), self.size):
            part = items[start : start + self.size]
            scores.append(self._run(part)[1:])
            done(len(part))
        return np.concatenate(scores) if scores else np.zeros(0)

    @torch.no_grad()
    def _run(self, items: Sequence[tuple[int, Restoration | None]]) -> Floats:
        arch, fact = self.arch, self.fact
        ids = torch.tensor([fact.fed]).expand(1 + len(items), -1)
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        keep[:, fact.row.prompt_last :] = True
        noise = self.noise[[sample for sample, _ in items]]
        with corrupting(arch, fact, noise), changing(arch, self._changes(items)):
            logits = last_logits(arch, ids, torch.ones_like(ids), keep)
        return log_probabilities(logits, fact)

    def _changes(self, items: Sequence[tuple[int, Restoration | None]]) -> dict[Site, Change]:
        """Per site, the prompts (numbered from 1; 0 is the clean one) and tokens that get their clean value back."""
        places: dict[Site, list[tuple[int, int]]] = {}
        for row, (_, item) in enumerate(items, start=1):
            for site in item.sites(self.width, self.arch.num_layers) if item else ():
                places.setdefault(site, []).append((row, item.token if item else 0))
        changes = {}
        for site, at in places.items():
            rows, columns = (torch.tensor(part) for part in zip(*at, strict=True))
            changes[site] = copy_rows(rows, columns, torch.zeros_like(rows))
        return changes


class SharedRuns(WholePrompts):
    """Runs of every corrupted prompt only what its restoration can change; see the module's text."""

    def __init__(self, arch: ModelArch, fact: Fact, width: int, noise: Tensor, tokens: int) -> None:
        super().__init__(arch, fact, width, noise, tokens)
        self._entering: list[list[Tensor]] = [[] for _ in range(arch.num_layers)]  # [S, T, H] by block, in parts
        self._stored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(arch.num_layers)]  # [S·T, heads, D]
        self._clean: dict[Site, Tensor] = {}  # [T, H]
        self._tuples: set[int] = set()
        parts = [self._record(range(len(noise))[i : i + self.size]) for i in range(0, len(noise), self.size)]
        self._unrestored = float(parts[0][0]), np.concatenate([part[1:] for part in parts])
        self._hidden = [torch.cat(each) for each in self._entering]
        self._keys = [(torch.cat([k for k, _ in each]), torch.cat([v for _, v in each])) for each in self._stored]

    def unrestored(self) -> tuple[float, Floats]:
        """Log-probability of the answer in the clean prompt, and in every corrupted one [S]."""
        return self._unrestored

    def scores(self, items: Sequence[Item], done: Callable[[int], None]) -> Floats:
        """Log-probability of the answer in a corrupted prompt per item, [N]; ``done`` is told how many are."""
        scores = np.empty(len(items))
        groups: dict[int, list[int]] = {}
        for number, (sample, item) in enumerate(items):
            start = self._start(item)
            if start is None:  # nothing that is read depends on it
                scores[number] = self._unrestored[1][sample]
                done(1)
            else:
                groups.setdefault(start, []).append(number)
        for start, numbers in self._merged(groups, items):
            for batch in self._batches([items[number] for number in numbers]):
                chosen = [numbers[i] for i in batch]
                scores[chosen] = self._run_from(start, [items[number] for number in chosen])
                done(len(chosen))
        return scores

    def _start(self, item: Restoration) -> int | None:
        """The lowest block that a restoration changes; ``None`` where no token that is read can tell."""
        last = self.arch.num_layers - 1
        lowest = item.sites(self.width, self.arch.num_layers)[0].layer
        if lowest == last and item.token < self.fact.row.prompt_last:
            return None  # what is above the last block's attention stays at its token
        return lowest + 1 if item.kind == "hidden" and lowest < last else lowest

    def _merged(self, groups: Mapping[int, list[int]], items: Sequence[Item]) -> Iterator[tuple[int, list[int]]]:
        """Groups by start block, put together where a pass less is worth the blocks that some items run in vain."""
        starts = sorted(groups)
        fixed = fixed_cost(self.arch.input_device.type)
        tokens = [sum(len(self.fact.fed) - items[number][1].token for number in groups[start]) for start in starts]
        best: list[tuple[int, int]] = [(0, 0)]  # cost of the first i groups, and where the last one begins
        for i in range(len(starts)):
            costs = [
                (best[j][0] + (self.arch.num_layers - starts[j]) * (fixed + sum(tokens[j : i + 1])), j)
                for j in range(i + 1)
            ]
            best.append(min(costs))
        end = len(starts)
        while end:
            first = best[end][1]
            yield starts[first], [number for start in starts[first:end] for number in groups[start]]
            end = first

    def _batches(self, items: Sequence[Item]) -> Iterator[list[int]]:
        """Items of similar length that run together."""
        lengths = [len(self.fact.fed) - item.token for _, item in items]
        reads = len(self.fact.row.labels)
        for alike in cut_by_length(lengths, [1] * len(items), fixed_cost(self.arch.input_device.type)):
            longest = lengths[alike[-1]]
            size = max(
                1,
                min(
                    self.tokens // longest, places_per_pass(self.arch) // (reads if self.arch.keeps_logits else longest)
                ),
            )
            for first in range(0, len(alike), size):
                yield alike[first : first + size]

    @torch.no_grad()
    def _record(self, samples: range) -> Floats:
        """Run the clean prompt and some corrupted ones and keep what restorations need."""
        arch, fact = self.arch, self.fact
        ids = torch.tensor([fact.fed]).expand(1 + len(samples), -1)
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        keep[:, fact.row.prompt_last :] = True
        corrupted = torch.ones(ids.shape, dtype=torch.bool)
        corrupted[0] = False
        layers = [PrefixLayer(None, torch.zeros(len(ids), 0), corrupted) for _ in range(arch.num_layers)]

        def enter(layer: int, hidden: Tensor) -> None:
            self._entering[layer].append(hidden[1:].clone())

        def read(site: Site, output: Tensor) -> None:
            self._clean[site] = by_prompt(output, len(ids))[0].clone()

        with ExitStack() as stack:
            stack.enter_context(corrupting(arch, fact, self.noise[samples.start : samples.stop]))
            for layer in range(arch.num_layers):
                stack.enter_context(on_input(arch.block(layer), partial(enter, layer)))
                stack.enter_context(noting_tuples(arch, layer, self._tuples))
                for kind in ACTIVATIONS.values():
                    site = Site(layer, kind)
                    stack.enter_context(on_output(arch.site(site), partial(read, site)))
            device = arch.input_device
            logits = arch.logits(
                keep.to(device),
                input_ids=ids.to(device),
                attention_mask=torch.ones_like(ids).to(device),
                use_cache=True,
                **cache_argument(arch.model, Cache(layers=list(layers))),
            )
        for stored, kept in zip(self._stored, layers, strict=True):
            assert kept.seen is not None
            stored.append(kept.seen)
        return log_probabilities(logits, fact)

    @torch.no_grad()
    def _run_from(self, start: int, items: Sequence[Item]) -> Floats:
        """Run the blocks from ``start`` on, over the tokens from each restored one on."""
        arch, fact = self.arch, self.fact
        length = len(fact.fed)
        ids, mask = pad([fact.fed[item.token :] for _, item in items])
        skip = torch.tensor([item.token for _, item in items])
        sample = torch.tensor([sample for sample, _ in items])
        prefix = int(skip.max())
        column = torch.arange(prefix)[None] - (prefix - skip[:, None])
        before = (sample[:, None] * length + column).clamp(min=0)
        position = (skip[:, None] + torch.arange(ids.shape[1])).clamp(max=length - 1)
        layers = [
            PrefixLayer(self._keys[layer] if layer >= start else None, before, None) for layer in range(arch.num_layers)
        ]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.cat([(column >= 0).long(), mask], 1),
            "use_cache": True,
            **cache_argument(arch.model, Cache(layers=list(layers))),
        }
        if "position_ids" in forward_parameters(arch.model):
            inputs["position_ids"] = position
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (_, item) in enumerate(items):
            keep[row, fact.row.prompt_last - item.token : length - item.token] = True
        changes = self._restored(start, items)
        below = [(row, item) for row, (_, item) in enumerate(items) if item.kind == "hidden" and item.layer < start]

        def enter(_hidden: Tensor) -> Tensor:
            hidden = self._hidden[start]
            entering = hidden[sample.to(hidden.device)[:, None], position.to(hidden.device)]
            if below:
                rows = torch.tensor([row for row, _ in below], device=hidden.device)
                clean = [self._clean[Site(item.layer, "block")][item.token].to(hidden.device) for _, item in below]
                entering[rows, 0] = torch.stack(clean)
            return entering

        with ExitStack() as stack:
            for layer in range(start):
                stack.enter_context(passing_through(arch.block(layer), as_tuple=layer in self._tuples))
            stack.enter_context(on_input(arch.block(start), enter))
            stack.enter_context(changing(arch, changes))
            device = arch.input_device
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
            logits = arch.logits(keep.to(device), **moved)
        return log_probabilities(logits, fact)

    def _restored(self, start: int, items: Sequence[Item]) -> dict[Site, Change]:
        """The clean values of each site that runs; the restored token is the first one of its prompt."""
        places: dict[Site, list[tuple[int, int]]] = {}
        for row, (_, item) in enumerate(items):
            if item.kind != "hidden" or item.layer >= start:
                for site in item.sites(self.width, self.arch.num_layers):
                    places.setdefault(site, []).append((row, item.token))
        changes = {}
        for site, at in places.items():
            rows, tokens = (torch.tensor(part) for part in zip(*at, strict=True))
            clean = self._clean[site]
            changes[site] = put_values(rows, torch.zeros_like(rows), clean[tokens.to(clean.device)])
        return changes


def corrupting(arch: ModelArch, fact: Fact, noise: Tensor) -> Any:
    """Inside, the subject's embeddings of all prompts but the first one carry noise [P - 1, subject tokens, H]."""

    def corrupt(embedded: Tensor) -> Tensor:
        changed = embedded.clone()
        changed[1:, fact.row.first : fact.row.subject_last + 1] += noise.to(embedded.device, embedded.dtype)
        return changed

    embeddings: Any = arch.model.get_input_embeddings()
    return on_output(embeddings, corrupt)


def log_probabilities(logits: Tensor, fact: Fact) -> Floats:
    """Log-probability of the whole answer, [P], from the logits [P · R, V] at the places that predict it."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = torch.tensor(fact.row.labels, device=wide.device).repeat(len(wide) // len(fact.row.labels))
    picked = wide.gather(-1, labels[:, None])[:, 0] - wide.logsumexp(-1)
    return np.asarray(picked.double().view(-1, len(fact.row.labels)).sum(1).cpu().numpy())


_VERDICTS: WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def runs_of(arch: ModelArch, fact: Fact, kinds: Sequence[str], width: int, noise: Tensor, tokens: int) -> WholePrompts:
    """The fastest way that gives the scores of whole prompts, by a check of the model on a few restorations."""
    key = (arch.dtype, getattr(arch.config, "_attn_implementation", None))
    verdicts = _VERDICTS.setdefault(arch.model, {})
    reason = ""
    if verdicts.get(key, True) and cache_name(arch.model) is not None and not arch.compiled:
        try:
            shared = SharedRuns(arch, fact, width, noise, tokens)
            if key not in verdicts:
                reason = _difference(shared, WholePrompts(arch, fact, width, noise, tokens), kinds)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            if verdicts.get(key):
                raise
            reason = f"{type(error).__name__}: {error}"
        verdicts[key] = not reason
        if not reason:
            return shared
        logger.warning(
            "This %s traces with whole prompts: running only what a restoration changes failed its check (%s).",
            arch.model_type,
            reason,
        )
    return WholePrompts(arch, fact, width, noise, tokens)


def _difference(shared: SharedRuns, whole: WholePrompts, kinds: Sequence[str]) -> str:
    """How the scores of some restorations differ; empty where they do not."""
    last, fact = shared.arch.num_layers - 1, shared.fact
    tokens = sorted({fact.row.first, fact.row.subject_last, fact.row.prompt_last})
    layers = sorted({0, last // 2, last})
    items = [(0, Restoration(kind, token, layer)) for kind in kinds for token in tokens for layer in layers]
    one, other = (np.append(runs.scores(items, lambda _: None), runs.unrestored()[1]) for runs in (shared, whole))
    size = float(np.abs(one - other).max())
    return "" if size <= 10 * tolerance(shared.arch.dtype) else f"log-probabilities differ by {size:.1e}"
