"""Patching: which activations carry the damage of an edit (arXiv:2502.14838, the contaminating substitution and its reverse).

``restore``: in the edited model, one kind of activation at the last token takes its original value; what comes back shows how
much of the damage went through it. ``contaminate``: in the original model it takes the edited model's value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kedit.analysis.checks import as_kind
from kedit.analysis.edited_models import CHUNK, Patches, Source
from kedit.analysis.interventions import (
    ACTIVATIONS,
    LABELS,
    Change,
    changing,
    put_values,
    reading,
    window_of,
    window_width,
)
from kedit.analysis.probes import ProbeTokens, Questions, probe_tokens
from kedit.analysis.results.patching import CONTAMINATE, RESTORE, Condition, PatchingResult
from kedit.capture import capture_attention, substitute_attention
from kedit.errors import ConfigError, EditError
from kedit.evaluation.cases import EditCase, Kind
from kedit.evaluation.statistics import Floats
from kedit.models import ModelArch, Site
from kedit.models.hooks import inference_state
from kedit.models.lock import holding_model
from kedit.prompts.likelihood import TOKENS_PER_FORWARD, prompts_per_pass
from kedit.prompts.tokenize import pad
from kedit.regularizers import Choice
from kedit.utils.progress import Progress
from kedit.utils.validation import check_whole, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Heads = Sequence[tuple[int, int]]


@holding_model
def patch_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: EditCase | Iterable[EditCase],
    editor: Source = "rome",
    regularizer: Choice = None,
    *,
    config: Mapping[str, Any] | None = None,
    activations: Sequence[str] = tuple(LABELS),
    directions: Sequence[str] = (RESTORE, CONTAMINATE),
    window: int | None = None,
    heads: Mapping[str, Heads] | None = None,
    kind: Kind | str = Kind.DISTRACTED,
    chunk: int = CHUNK,
    tokens: int = TOKENS_PER_FORWARD,
) -> PatchingResult:
    """Exchange activations between the original and the edited model at the last token; the model is unedited afterwards.

    With an answer of several tokens, "the last token" is every token that predicts one of them. Each case costs three passes
    of its probes to read both models, and one prompt per probe, condition and direction.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        cases: edits with their probes.
        editor: a name, an editor of this model, one patch for all cases, or a patch per case id.
        regularizer: as in :meth:`kedit.Editor.apply`.
        config: the editor's hyper-parameters, where it is given by name.
        activations: of ``"weights"`` (attention weights), ``"attention"`` and ``"mlp"`` (their outputs), ``"hidden"`` (a
            block's output); each in every window of blocks, and in all blocks at once.
        directions: ``"restore"``, ``"contaminate"`` or both.
        window: blocks per window; by default ROME's 10 of 48 in proportion.
        heads: named sets of (block, head): the attention weights of these heads alone are exchanged.
        kind: kind of the probes.
        chunk: cases whose values are optimised together.
        tokens: padded tokens per forward pass at most.

    Raises:
        EditError: no probe of this kind mentions the edited subject, or no case could be edited.
        ConfigError: an option is out of range.
    """
    asked_kind = as_kind(kind)
    check_whole("chunk", chunk, 1)
    check_whole("tokens", tokens, 1)
    arch = ModelArch(model)
    width = window_width(window, arch.num_layers)
    conditions = _conditions(arch, activations, directions, width, {} if heads is None else heads)
    patches = Patches(model, tokenizer, cases, editor, regularizer, config)
    asked = {
        case.id: [probe for probe in probe_tokens(arch, tokenizer, case, [asked_kind]) if probe.wrong is not None]
        for case in patches.cases
    }
    if not any(asked.values()):
        raise EditError(
            f"Nothing could be patched: No probe of kind {asked_kind} has a wrong answer and mentions the subject."
        )
    scored: list[tuple[ProbeTokens, Floats]] = []
    with inference_state(model), Progress(len(asked), "patching", unit="case") as progress:
        for part in patches.chunks(chunk):
            for case, patch in part:
                if probes := asked[case.id]:
                    exchange = _Exchange(arch, Questions.of(probes), tokens)
                    scores = exchange.run(patches, patch, conditions)
                    scored += [(probe, scores[:, i]) for i, probe in enumerate(probes)]
                progress.advance()
    if not scored:
        raise EditError(f"Nothing could be patched: {next(iter(patches.failures.values()))}")
    return PatchingResult(
        label=patches.label,
        kind=asked_kind,
        window=width,
        num_layers=arch.num_layers,
        conditions=(Condition.original(), Condition.edited(), *conditions),
        cases=tuple(probe.case for probe, _ in scored),
        probabilities=np.stack([scores for _, scores in scored], 1),
        failures=dict(patches.failures),
    )


def _conditions(
    arch: ModelArch, activations: Sequence[str], directions: Sequence[str], width: int, heads: Mapping[str, Heads]
) -> list[Condition]:
    if isinstance(activations, str) or set(activations) - set(LABELS):
        raise ConfigError(f"activations are some of {', '.join(LABELS)}, not {activations!r}.")
    if isinstance(directions, str) or not directions or set(directions) - {RESTORE, CONTAMINATE}:
        raise ConfigError(f"directions are {RESTORE!r} and {CONTAMINATE!r}, not {directions!r}.")
    every = tuple(range(arch.num_layers))
    _check_heads(arch, heads)
    made = []
    for direction in directions:
        for activation in activations:
            made.append(Condition(direction, activation, every, None))
            made += [
                Condition(direction, activation, tuple(window_of(layer, width, arch.num_layers)), layer)
                for layer in range(arch.num_layers)
            ]
        for name, chosen in heads.items():
            layers = tuple(sorted({layer for layer, _ in chosen}))
            made.append(Condition(direction, "weights", layers, None, name, tuple(chosen)))
    return made


def _check_heads(arch: ModelArch, heads: Mapping[str, Heads]) -> None:
    if not isinstance(heads, Mapping):
        raise ConfigError(f"heads are named sets, {{name: [(block, head), ...]}}, not {heads!r}.")
    numbers = _head_numbers(arch) if heads else {}
    for name, chosen in heads.items():
        for pair in chosen:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_whole, pair)):
                raise ConfigError(f"The heads {name!r} hold {pair!r}, which is no pair (block, head) of whole numbers.")
            layer, head = arch.check_layer(pair[0]), pair[1]
            number = numbers.get(layer, 0)
            if not 0 <= head < number:
                raise ConfigError(
                    f"The heads {name!r} name head {head} of block {layer}, which has {number} heads (from 0)."
                )


@torch.no_grad()
def _head_numbers(arch: ModelArch) -> dict[int, int]:
    """Heads of every block that has attention, as one short pass shows: configurations name them differently."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=arch.input_device)
    with inference_state(arch.model), capture_attention(arch.model, torch.tensor([[1]]), detach=True) as capture:
        arch.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return {layer: int(rows.shape[1]) for layer, rows in capture.rows.items()}


@dataclass(frozen=True)
class _Stored:
    """Activations of one state of the model at the positions: rows by block [N, A, R, T], outputs by site [N, R, H]."""

    rows: dict[int, Tensor]
    outputs: dict[Site, Tensor]
    scores: Floats  # [1, probes, 2]


class _Exchange:
    """One case: reads both models and runs each with the other's activations."""

    def __init__(self, arch: ModelArch, questions: Questions, tokens: int) -> None:
        self.arch = arch
        self.questions = questions
        self.positions = questions.positions
        self.ids, self.mask = pad(questions.inputs)
        together = prompts_per_pass(arch, self.ids.shape[1], self.positions.shape[1], tokens)
        self.size = max(1, together // len(self.ids))  # conditions per pass

    def run(self, patches: Patches, patch: Any, conditions: Sequence[Condition]) -> Floats:
        """Probabilities of the right and the wrong answer: [2 + conditions, probes, 2]."""
        wanted = sorted({site for one in conditions for site in _sites(one)}, key=lambda site: (site.layer, site.kind))
        original = self._read(wanted)
        results: dict[int, Floats] = {}
        with patches.edited(patch):
            changed = self._read(wanted)
            self._patched(conditions, RESTORE, original, results)
        self._patched(conditions, CONTAMINATE, changed, results)
        return np.concatenate([original.scores, changed.scores, *(results[i] for i in range(len(conditions)))])

    @torch.no_grad()
    def _read(self, sites: list[Site]) -> _Stored:
        model = self.arch.model
        with (
            capture_attention(model, self.positions, detach=True) as capture,
            reading(self.arch, sites, self.positions) as outputs,
        ):
            scores = self.questions.score(self.arch, self.ids, self.mask, 1)
            rows = {layer: own.cpu() for layer, own in capture.rows.items()}
        return _Stored(rows, outputs, scores)

    def _patched(
        self, conditions: Sequence[Condition], direction: str, stored: _Stored, results: dict[int, Floats]
    ) -> None:
        """The conditions of one direction, in the model as it is, with activations from ``stored``."""
        chosen = [i for i, one in enumerate(conditions) if one.direction == direction]
        for start in range(0, len(chosen), self.size):
            part = chosen[start : start + self.size]
            scores = self._run([conditions[i] for i in part], stored)
            results.update({i: scores[place : place + 1] for place, i in enumerate(part)})

    @torch.no_grad()
    def _run(self, conditions: Sequence[Condition], stored: _Stored) -> Floats:
        """All inputs under each condition, in one pass: [C, probes, 2]; prompt c·N + n is input n under condition c."""
        count = len(conditions)
        with ExitStack() as stack:
            rows, where = self._weights(conditions, stored)
            if rows:
                positions = self.positions.repeat(count, 1)
                stack.enter_context(substitute_attention(self.arch.model, positions, rows, where=where))
            stack.enter_context(changing(self.arch, dict(self._outputs(conditions, stored))))
            ids, mask = self.ids.repeat(count, 1), self.mask.repeat(count, 1)
            return self.questions.score(self.arch, ids, mask, count)

    def _weights(self, conditions: Sequence[Condition], stored: _Stored) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        rows, where = {}, {}
        for layer, own in stored.rows.items():
            heads = torch.zeros(len(conditions), own.shape[1], dtype=torch.bool)
            for c, one in enumerate(conditions):
                if one.activation == "weights" and layer in one.layers:
                    heads[c, one.heads_of(layer, own.shape[1])] = True
            if heads.any():
                rows[layer] = own.repeat(len(conditions), 1, 1, 1)
                where[layer] = heads.repeat_interleave(len(own), 0)
        return rows, where

    def _outputs(self, conditions: Sequence[Condition], stored: _Stored) -> Iterator[tuple[Site, Change]]:
        number, place = (self.positions >= 0).nonzero(as_tuple=True)
        for site, values in stored.outputs.items():
            hit = torch.tensor([c for c, one in enumerate(conditions) if site in _sites(one)], dtype=torch.int64)
            if len(hit):
                rows = (hit[:, None] * len(self.ids) + number).flatten()
                columns = self.positions[number, place].repeat(len(hit))
                yield site, put_values(rows, columns, values[number, place].repeat(len(hit), 1))


def _sites(condition: Condition) -> list[Site]:
    """The sites whose outputs a condition exchanges; none for attention weights."""
    if condition.activation not in ACTIVATIONS:
        return []
    return [Site(layer, ACTIVATIONS[condition.activation]) for layer in condition.layers]
