"""The stages in order: encode, optimise the values, spread them over the layers."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kedit import locate
from kedit.arch import ModelArch, Site
from kedit.batch import Row, Text, context_limit, encode, rewrite_texts
from kedit.delta import Delta, check_finite
from kedit.edit import Edit
from kedit.editors.config import EditorConfig
from kedit.errors import EditError, KEditWarning
from kedit.ledger import Ledger
from kedit.moments import SecondMoments
from kedit.optimise import StepLog, Values, optimise
from kedit.progress import Progress
from kedit.regularizers.base import Needs, Regularizer
from kedit.runner import Prompt, Role, Runner, Wave

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBJECT_PROMPT = "{} is a"  # where the model's idea of the subject is held in place (ROME's KL term)
TOKENS_PER_WAVE = 16_384


@dataclass(frozen=True)
class Request:
    """An encoded edit: its prompt in every context, the KL prompt, the regularizers' prompts."""

    edit: Edit
    rewrite: tuple[Row, ...]
    kl: Row
    extra: tuple[Row, ...] = ()

    def prompts(self, edit: int) -> list[Prompt]:
        """The prompts of a wave in which this is edit number ``edit``."""
        rows = [Prompt(row, edit, i, Role.REWRITE) for i, row in enumerate(self.rewrite)]
        rows.append(Prompt(self.kl, edit, 0, Role.KL))
        return rows + [Prompt(row, edit, i, Role.EXTRA) for i, row in enumerate(self.extra)]

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts(0))


@dataclass(frozen=True)
class Insertion:
    """What a closed form sees of one layer.

    Attributes:
        layer: the block.
        keys: down-projection inputs at the subject's last token, per edit and context, [E, C, I]; context 0 is the
            bare prompt.
        residual: what the site's output shall change by on the bare prompt, this layer's share, [E, O].
        weight: W as it is now, [O, I].
        moments: second moments of the edited layers.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    weight: Tensor
    moments: SecondMoments


class Method(Protocol):
    """What the pipeline asks of an editor."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """Where values are optimised."""
        ...

    def share(self, config: Any, layer: int) -> float:
        """The residual is divided by this at ``layer``."""
        ...

    def solve(self, insertion: Insertion, config: Any) -> Delta:
        """The update of one layer's weight."""
        ...


@dataclass
class Timer:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def encode_edits(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], contexts: Sequence[str], needs: Needs
) -> list[Request]:
    """Encode every prompt of every edit; bad input is found here, before anything runs.

    Raises:
        EditError: an edit does not fit the tokenizer or the context window; its number is named.
    """
    limit = context_limit(arch.model)
    requests = []
    for number, edit in enumerate(edits):
        texts = rewrite_texts(edit, contexts)
        texts += [Text.fill(template, edit.subject) for template in (SUBJECT_PROMPT, *needs.prompts)]
        try:
            rows = encode(tokenizer, texts, limit=limit)
        except EditError as error:
            if len(edits) == 1:
                raise
            raise type(error)(f"Edit {number}: {error}") from error
        count = len(contexts)
        requests.append(Request(edit, tuple(rows[:count]), rows[count], tuple(rows[count + 1 :])))
    return requests


def make_waves(requests: Sequence[Request], budget: int) -> list[list[int]]:
    """Numbers of the edits that are optimised together: in order, at most ``budget`` tokens (one edit at least)."""
    waves: list[list[int]] = []
    held = 0
    for number, request in enumerate(requests):
        if waves and held + request.tokens <= budget:
            waves[-1].append(number)
            held += request.tokens
        else:
            waves.append([number])
            held = request.tokens
    return waves


def optimise_values(
    arch: ModelArch,
    sites: Sequence[Site],
    requests: Sequence[Request],
    config: EditorConfig,
    regularizers: Sequence[Regularizer],
    needs: Needs,
    *,
    budget: int = TOKENS_PER_WAVE,
) -> Values:
    """The values of all edits, wave by wave."""
    parts: list[Values] = []
    with Progress(len(requests), "optimising") as progress:
        for numbers in make_waves(requests, budget):
            prompts = [p for i, number in enumerate(numbers) for p in requests[number].prompts(i)]
            runner = Runner(arch, sites, Wave(tuple(prompts), len(numbers)), needs)
            parts.append(optimise(runner, config.objective, regularizers, numbers=numbers, progress=progress))
    known = [flag for part in parts for flag in part.known]
    for request, said in zip(requests, known, strict=True):
        if said:
            warnings.warn(
                f"The model already continues {request.edit.text!r} with {request.edit.target_new!r}; the edit changes little.",
                KEditWarning,
                stacklevel=2,
            )
    log: list[list[StepLog]] = [steps for part in parts for steps in part.log]
    return Values(torch.cat([p.delta for p in parts]), torch.cat([p.initial for p in parts]), log, known)


def spread(
    arch: ModelArch, method: Method, requests: Sequence[Request], values: Values, config: Any, moments: SecondMoments
) -> dict[str, Delta]:
    """Write the values into the layers, lowest first, each seeing the layers below it as already changed.

    The weights are changed on the way and are as before when this returns or raises.

    Returns:
        The updates by parameter name, in the work dtype.
    """
    deltas: dict[str, Delta] = {}
    site = method.sites(config)[0]
    bare = [request.rewrite[0] for request in requests]
    rows = [row for request in requests for row in request.rewrite]
    layers: tuple[int, ...] = config.layers
    with Ledger.of(arch.model).scratch([arch.weight(layer) for layer in layers[:-1]]):
        for number, layer in enumerate(layers):
            keys = locate.keys(arch, rows, layer).unflatten(0, (len(requests), -1))
            residual = values.delta[:, 0]
            if number > 0:  # what is below has changed the site's output; measure what is left to write
                residual = values.value[:, 0] - locate.outputs(arch, bare, site).to(residual.device)
            weight = arch.weight(layer)
            insertion = Insertion(layer, keys, residual / method.share(config, layer), weight.matrix, moments)
            delta = method.solve(insertion, config).to(weight.parameter.device, arch.work_dtype)
            deltas[weight.name] = check_finite(weight.name, delta)
            if layer != layers[-1]:
                overwrite(arch, {weight.name: delta})
    return deltas


@torch.no_grad()
def overwrite(arch: ModelArch, deltas: Mapping[str, Delta]) -> None:
    """Add updates to the weights inside :meth:`Ledger.scratch`, without bookkeeping."""
    for name, delta in deltas.items():
        weight = arch.weight_of(name)
        total = weight.matrix.to(arch.work_dtype) + delta.dense
        weight.parameter.copy_(total.T if weight.transposed else total)


def needs_of(regularizers: Sequence[Regularizer], sites: Sequence[Site]) -> Needs:
    """What all regularizers together want to see."""
    needs = Needs()
    for regularizer in regularizers:
        for site in sites:
            needs = needs | regularizer.needs(site)
    return needs


def describe(value: Any) -> dict[str, Any]:
    """A regularizer as JSON: its name, class and fields."""
    fields = vars(value) if dataclasses.is_dataclass(value) else {}
    plain = {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in fields.items()}
    return {"name": value.name, "class": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
