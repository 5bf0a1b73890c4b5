"""Texts that begin alike, run without repeating what they share.

The texts form a tree: each one begins with tokens of another one and branches off from it, and only what follows runs. The model's
own forward does the work, in one of two ways. :class:`PackedRunner` puts many texts side by side in one row, with the position of
each token and a mask that shows it the tokens of its own text alone: one pass, without padding. :class:`PrefixRunner` runs
parents first and hands out their keys and values, right-aligned, as batches that are padded on the left have them; this also
works where a model takes no such mask, or measures distances by what stands between (ALiBi, sliding windows).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kedit.models import ModelArch
from kedit.models.compat import cache_argument, cache_name, forward_parameters
from kedit.prompts.tokenize import pad
from kedit.utils.packing import cut_by_length
from kedit.utils.progress import logger

LEAST = (4, 6, 8, 12, 16)  # tokens that a text must share with another one, or it runs whole: what is tried
WIDTHS = (64, 128, 256, 512)  # tokens of rows that texts are packed into; attention looks at all pairs of them
DEEPEST = 3  # how often a text may branch off from one that branches off itself
# What a model raises that cannot be run in another way than whole.
CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(dtype: torch.dtype) -> float:
    """By how much the logits of two ways to run a model may differ, relative to the largest."""
    return _TOLERANCE.get(dtype, 1e-2)


def disagreement(whole: Tensor, shared: Tensor, dtype: torch.dtype) -> str:
    """How the logits of two ways to run a model of ``dtype`` differ; empty where they do not by more than :func:`tolerance`."""
    size = float((whole - shared).abs().max() / whole.abs().max().clamp(min=1e-30))
    return "" if size <= tolerance(dtype) else f"its logits differ by {size:.1e} relative"


@dataclass(frozen=True)
class Branch:
    """A text of a tree: its first ``start`` tokens are those of the text ``parent`` (by number), the rest runs.

    ``depth`` is the number of texts before it on the way from the root.
    """

    ids: tuple[int, ...]
    parent: int
    start: int
    depth: int


class PrefixTree:
    """Texts with what they share.

    Args:
        texts: token rows, sorted either way, none of which begins another one.
        deepest: of the branches; 0 for texts that all run whole.
        least: tokens that a text must share with another one, or it runs whole.
        shared: how many tokens each text shares with the one before, if that is known.
    """

    def __init__(
        self,
        texts: Sequence[tuple[int, ...]],
        deepest: int = DEEPEST,
        least: int = LEAST[0],
        shared: Sequence[int] | None = None,
    ) -> None:
        shared = _shared_with_previous(texts) if shared is None else shared
        self.branches: list[Branch] = []
        self.parents: set[int] = set()
        for number, ids in enumerate(texts):
            # Of all texts before it, the previous one shares most, in this order; what it shares may be an ancestor's.
            parent = number - 1
            start = shared[number]
            while start and (self.branches[parent].start >= start or self.branches[parent].depth >= deepest):
                start, parent = min(start, self.branches[parent].start), self.branches[parent].parent
            if start < least:
                start, parent = 0, -1
            else:
                self.parents.add(parent)
            depth = self.branches[parent].depth + 1 if start else 0
            self.branches.append(Branch(ids, parent, start, depth))

    @classmethod
    def cheapest(cls, texts: Sequence[tuple[int, ...]], fixed: int) -> PrefixTree:
        """The tree for :class:`PrefixRunner`: as deep as it pays, where a pass costs ``fixed`` tokens besides its own."""
        shared = _shared_with_previous(texts)
        options = [(deepest, least) for deepest in range(1, DEEPEST + 1) for least in LEAST if least <= max(shared)]
        trees = [cls(texts, deepest, least, shared) for deepest, least in [(0, LEAST[0]), *options]]
        return min(trees, key=lambda tree: tree.cost(fixed))

    @property
    def shares(self) -> bool:
        """Whether there is any branch."""
        return bool(self.parents)

    def cost(self, fixed: int) -> int:
        """Tokens that run, padding and what the forward passes cost included."""
        total = 0
        for level in self.levels(range(len(self.branches))):
            lengths = [self.length(number) for number in level]
            for batch in cut_by_length(lengths, [1] * len(level), fixed):
                total += fixed + len(batch) * max(lengths[i] for i in batch)
        return total

    def length(self, number: int) -> int:
        """How many tokens of a text run."""
        return len(self.branches[number].ids) - self.branches[number].start

    def owner(self, number: int, place: int) -> int:
        """The text that runs the token at ``place`` of a text."""
        while place < self.branches[number].start:
            number = self.branches[number].parent
        return number

    def path(self, number: int) -> list[int]:
        """A text and those that it branches off from, root first."""
        path = [number]
        while self.branches[path[-1]].start:
            path.append(self.branches[path[-1]].parent)
        return path[::-1]

    def levels(self, numbers: Sequence[int]) -> list[list[int]]:
        """Texts by depth: each level needs only those above it."""
        levels: list[list[int]] = [[] for _ in range(DEEPEST + 1)]
        for number in numbers:
            levels[self.branches[number].depth].append(number)
        return [level for level in levels if level]

    def families(self, tokens: int) -> Iterator[list[int]]:
        """Texts that run one after the other, with their roots: so many that about ``tokens`` tokens have to be kept for others."""
        family: list[int] = []
        kept = 0
        for number, branch in enumerate(self.branches):
            if not branch.start and kept > tokens:
                yield family
                family, kept = [], 0
            family.append(number)
            kept += self.length(number) if number in self.parents else 0
        if family:
            yield family


def _shared_with_previous(texts: Sequence[tuple[int, ...]]) -> list[int]:
    """How many tokens each text begins with that the one before it begins with too; 0 for the first."""
    shared = [0]
    for one, other in pairwise(texts):
        pairs = zip(one, other, strict=False)
        shared.append(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))))
    return shared


class PrefixLayer(DynamicLayer):
    """One block's stored keys and values in front of those of the running tokens, of which some are kept.

    Args:
        stored: keys and values of tokens, [N, heads, D] each.
        before: which of them stand before each text, right-aligned, [P, prefix].
        kept: [P, W] bool, the running tokens whose keys and values are put in ``seen``, text by text.
    """

    def __init__(self, stored: tuple[Tensor, Tensor] | None, before: Tensor, kept: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored = stored
        self.before = before
        self.kept = kept
        self.seen: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values [P, heads, prefix + W, D] that the running tokens see."""
        new = (key_states, value_states)
        if self.kept is not None:
            kept = self.kept.to(key_states.device)
            self.seen = (key_states.transpose(1, 2)[kept], value_states.transpose(1, 2)[kept])
        if self.stored is None:
            return new
        before = self.before.to(key_states.device)
        keys, values = (
            torch.cat([old[before].transpose(1, 2), fresh], -2) for old, fresh in zip(self.stored, new, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        """How many tokens stand before the running ones."""
        return self.before.shape[1]


class PrefixRunner:
    """Runs the texts of a tree, parents before the texts that branch off from them.

    What is kept of a text (the keys and values of the tokens that it runs) stays until the runner goes.
    """

    def __init__(self, arch: ModelArch, tree: PrefixTree) -> None:
        self.arch, self.tree = arch, tree
        self._stored: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # [N, heads, D] by block
        self._places: dict[int, list[int]] = {}  # of a parent's tokens among those stored
        self._count = 0

    def logits(self, numbers: Sequence[int], keep: Tensor) -> Tensor:
        """Logits [N, V] of texts of one level at the marked ones [P, W] of the tokens that run, text by text."""
        tree, arch = self.tree, self.arch
        branches = [tree.branches[number] for number in numbers]
        ids, mask = pad([branch.ids[branch.start :] for branch in branches])
        starts = torch.tensor([branch.start for branch in branches])
        prefix = int(starts.max())
        parents = [number in tree.parents for number in numbers]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        layers: list[PrefixLayer] = []
        if prefix or any(parents):
            there = torch.arange(prefix)[None] >= prefix - starts[:, None]
            before = torch.zeros(there.shape, dtype=torch.int64)
            if prefix:
                before[there] = torch.tensor([at for b in branches for at in self._places[b.parent][: b.start]])
            kept = mask.bool() & torch.tensor(parents)[:, None] if any(parents) else None
            layers = [
                PrefixLayer(self._all(layer) if prefix else None, before, kept) for layer in range(arch.num_layers)
            ]
            inputs["attention_mask"] = torch.cat([there.long(), mask], 1)
            if "position_ids" in forward_parameters(arch.model):
                last = torch.tensor([len(branch.ids) - 1 for branch in branches])
                inputs["position_ids"] = (starts[:, None] + torch.arange(ids.shape[1])).minimum(last[:, None])
            inputs |= {"use_cache": True, **cache_argument(arch.model, Cache(layers=list(layers)))}
        device = arch.input_device
        on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        logits = arch.logits(keep.to(device), **on_device)
        self._keep(numbers, layers)
        return logits

    def _all(self, layer: int) -> tuple[Tensor, Tensor]:
        """Everything that is stored of a block."""
        parts = self._stored[layer]
        if len(parts) > 1:
            keys, values = zip(*parts, strict=True)
            parts[:] = [(torch.cat(keys), torch.cat(values))]
        return parts[0]

    def _keep(self, numbers: Sequence[int], layers: Sequence[PrefixLayer]) -> None:
        for number in numbers:
            if number in self.tree.parents:
                branch = self.tree.branches[number]
                own = range(self._count, self._count + self.tree.length(number))
                before = self._places[branch.parent][: branch.start] if branch.start else []
                self._places[number] = [*before, *own]
                self._count += len(own)
        for number, layer in enumerate(layers):
            if layer.kept is not None:
                assert layer.seen is not None
                self._stored[number].append(layer.seen)


class PackedRunner:
    """Runs many texts side by side in rows: each token sees its own text alone, and stands where it stands there.

    Args:
        arch: the model.
        texts: token rows, sorted either way, none of which begins another one.
        reads: at how many places each is read.
        tokens: of a row at most, if a text is not longer.
        places: read in a row at most.
    """

    def __init__(
        self,
        arch: ModelArch,
        texts: Sequence[tuple[int, ...]],
        reads: Sequence[int],
        tokens: int = WIDTHS[-1],
        places: int = WIDTHS[-1],
    ) -> None:
        self.arch = arch
        shared = _shared_with_previous(texts)
        self.rows: list[list[int]] = []
        width = read = 0
        for number, ids in enumerate(texts):
            more = len(ids) - shared[number]
            full = width + more > tokens or read + reads[number] > places
            if full or not number or (2 * width > tokens and shared[number] < LEAST[0]):
                self.rows.append([])
                shared[number] = width = read = 0
                more = len(ids)
            self.rows[-1].append(number)
            width, read = width + more, read + reads[number]
        self.tree = PrefixTree(texts, len(texts), 1, shared)
        self.widths = [sum(map(self.tree.length, row)) for row in self.rows]
        self._row_of = {number: row for row, numbers in enumerate(self.rows) for number in numbers}

    @classmethod
    def cheapest(
        cls,
        arch: ModelArch,
        texts: Sequence[tuple[int, ...]],
        reads: Sequence[int],
        tokens: int,
        places: int,
        fixed: int,
    ) -> PackedRunner:
        """The texts in rows of the width that costs least; arguments as of :meth:`cost` and of the class."""
        runners = [cls(arch, texts, reads, min(width, tokens), places) for width in WIDTHS]
        return min(runners, key=lambda runner: runner.cost(fixed, tokens))

    def cost(self, fixed: int, tokens: int) -> float:
        """Tokens that run in passes of at most ``tokens``, padding and what passes cost (``fixed``) included.

        A token that looks at a row of N costs N / 6H more: 4HN on top of about 24H² operations per block.
        """
        total = 0.0
        for batch in self.batches(tokens):
            width = max(self.widths[row] for row in batch)
            total += fixed + len(batch) * width * (1 + width / (6 * self.arch.hidden))
        return total

    def batches(self, tokens: int) -> Iterator[list[int]]:
        """Rows that run together, widest first."""
        batch: list[int] = []
        for row in sorted(range(len(self.rows)), key=lambda row: -self.widths[row]):
            if batch and (len(batch) + 1) * self.widths[batch[0]] > tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def logits(self, numbers: Sequence[int], keep: Tensor) -> Tensor:
        """Logits [N, V] of whole rows of texts at the marked ones [P, W] of the tokens that run, text by text."""
        tree, arch = self.tree, self.arch
        rows = list(dict.fromkeys(self._row_of[number] for number in numbers))
        width = max(self.widths[row] for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        position = torch.zeros_like(ids)
        seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
        marked = torch.zeros(ids.shape, dtype=torch.bool)
        columns: dict[int, list[int]] = {}  # of each text's tokens in its row
        place = dict(zip(numbers, range(len(numbers)), strict=True))
        for at, row in enumerate(rows):
            end = 0
            for number in self.rows[row]:
                branch, length = tree.branches[number], tree.length(number)
                own = slice(end, end + length)
                before = columns[branch.parent][: branch.start] if branch.start else []
                columns[number] = [*before, *range(end, end + length)]
                ids[at, own] = torch.tensor(branch.ids[branch.start :])
                position[at, own] = torch.arange(branch.start, len(branch.ids))
                seen[at, own, before] = True
                seen[at, own, own] = torch.ones(length, length, dtype=torch.bool).tril()
                marked[at, own] = keep[place[number], :length]
                end += length
        device = arch.input_device
        dtype = arch.model.dtype
        hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype)
        mask = torch.where(seen, torch.zeros((), dtype=dtype), hidden)[:, None]
        return arch.logits(
            marked.to(device),
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=position.to(device),
            use_cache=False,
        )


_PASSED: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[float, float]]] = WeakKeyDictionary()


def can_share(arch: ModelArch, tree: PrefixTree, *, packed: bool) -> bool:
    """Whether the model gives the same logits when texts do not repeat what they share.

    It cannot where it lacks the arguments for it, or keeps a recurrent state. Else the text that branches off last and the
    longest one are run both ways. The verdict holds for this model, its dtype, its attention and texts that are no longer;
    longer ones are checked again, and shorter ones of a model that failed: its attention may reach so far.
    """
    model = arch.model
    able = "position_ids" in forward_parameters(model) if packed else cache_name(model) is not None
    if not tree.shares or not able or arch.compiled or arch.hybrid:
        return False
    numbers = range(len(tree.branches))
    deepest = max(numbers, key=lambda i: (tree.branches[i].depth, len(tree.branches[i].ids)))
    longest = max(numbers, key=lambda i: len(tree.branches[i].ids))
    length = len(tree.branches[longest].ids)
    verdicts = _PASSED.setdefault(model, {})
    key = (packed, arch.dtype, getattr(arch.config, "_attn_implementation", None))
    passed, failed = verdicts.get(key, (0, float("inf")))
    if passed < length < failed:
        texts = sorted({tree.branches[number].ids for number in (*tree.path(deepest)[-3:], longest)}, reverse=True)
        if _agrees(arch, texts, packed=packed):
            passed = length
        else:
            failed = length
        verdicts[key] = passed, failed
    return length <= passed


@torch.no_grad()
def _agrees(arch: ModelArch, texts: Sequence[tuple[int, ...]], *, packed: bool) -> bool:
    """Whether the logits after each text are those of whole texts."""
    logits = []
    reason = ""
    try:
        for sharing in (False, True):
            tree = PrefixTree(texts, DEEPEST if sharing else 0, 1)
            runner: PrefixRunner | PackedRunner = PrefixRunner(arch, tree)
            groups = [[number] for number in range(len(texts))]
            if sharing and packed:
                runner = PackedRunner(arch, texts, [1] * len(texts))
                tree, groups = runner.tree, runner.rows
            rows = []
            for numbers in groups:
                lengths = [tree.length(number) for number in numbers]
                keep = torch.zeros((len(numbers), max(lengths)), dtype=torch.bool)
                keep[torch.arange(len(numbers)), torch.tensor(lengths) - 1] = True
                rows.append(runner.logits(numbers, keep))
            logits.append(torch.cat(rows).double())
    except torch.OutOfMemoryError:
        raise
    except CANNOT_RUN as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = disagreement(logits[0], logits[1], arch.dtype)
    if reason and packed:
        logger.info("This %s takes no packed texts (%s).", arch.model_type, reason)
    elif reason:
        logger.warning(
            "This %s runs every probe as a whole text: going on from stored keys and values failed its check (%s).",
            arch.model_type,
            reason,
        )
    return not reason
