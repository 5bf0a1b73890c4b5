"""Causal tracing: which activations carry a fact (ROME, arXiv:2202.05262, section 2).

The subject's embeddings are hidden under Gaussian noise, so that the model no longer knows the answer; then one activation
at one token is given back its clean value. The indirect effect is the answer's probability with it minus that without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kedit.analysis.facts import Fact, as_facts, known
from kedit.analysis.interventions import ACTIVATIONS, Change, changing, copy_rows, window_of, window_width
from kedit.analysis.results.tracing import FactTrace, TraceResult
from kedit.edit import Edit
from kedit.errors import ConfigError, EditError
from kedit.evaluation.cases import EditCase
from kedit.models import ModelArch, Site
from kedit.models.hooks import inference_state, on_output
from kedit.models.lock import holding_model
from kedit.prompts.likelihood import TOKENS_PER_FORWARD, last_logits, prompts_per_pass
from kedit.utils.progress import Progress
from kedit.utils.validation import check_number, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE = 3.0
SAMPLES = 10
KINDS = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Restoration:
    """One restoration: one kind of activation, at one token, in the window around one block."""

    kind: str
    token: int
    layer: int


@holding_model
def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Edit | EditCase | Iterable[Edit | EditCase],
    *,
    kinds: Sequence[str] = KINDS,
    window: int | None = None,
    noise: float = NOISE,
    samples: int = SAMPLES,
    seed: int = 0,
    known_only: bool = True,
    tokens: int = TOKENS_PER_FORWARD,
) -> TraceResult:
    """Trace facts: what restoring each activation at each token and block does for the right answer.

    All effects of a fact come from one batched pass (cut by the token budget): a clean prompt and, for every sample of the
    noise, a corrupted prompt and one prompt per restoration, which takes its clean value from the clean prompt beside it.
    Tokens before the subject are not restored: noise does not reach them, so their effect is zero. A fact thus costs
    1 + S (1 + K·T·L) prompts: S samples, K kinds, T tokens from the subject on, L blocks.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        facts: what to trace; the answer is ``target_true``, and without it what the model says next.
        kinds: of ``"hidden"`` (a block's output), ``"mlp"`` and ``"attention"`` (their outputs).
        window: blocks that are restored together for ``"mlp"`` and ``"attention"``, centred on the block; by default
            ROME's 10 of 48 in proportion. Hidden states are restored in one block.
        noise: standard deviation of the noise, in standard deviations of the subjects' embeddings.
        samples: draws of the noise; effects are means over them.
        seed: of the noise.
        known_only: leave out facts whose answer is not the model's first choice (ROME's rule).
        tokens: padded tokens per forward pass at most.

    Raises:
        EditError: there are no facts, one does not fit the model, or the model knows none of them.
        ConfigError: an option is out of range.
    """
    arch = ModelArch(model)
    width = window_width(window, arch.num_layers)
    _check(kinds, noise, samples, tokens, seed)
    with inference_state(model):
        asked = as_facts(arch, tokenizer, facts)
        keep = known(arch, asked) if known_only else [True] * len(asked)
        chosen = [fact for fact, knows in zip(asked, keep, strict=True) if knows]
        if not chosen:
            raise EditError(
                f"The model's first choice is another answer in all {len(asked)} facts, so there is nothing to trace. "
                "Give facts that it knows (in Python, known_only=False traces them all the same)."
            )
        scale = noise * embedding_deviation(arch, chosen)
        traces = []
        with Progress(len(chosen), "tracing", unit="fact") as progress:
            for fact in chosen:
                drawn = draw_noise(arch, fact, samples, scale, seed)
                traces.append(_trace_fact(arch, fact, kinds, width, drawn, tokens))
                progress.advance()
    skipped = tuple(fact.prompt for fact, knows in zip(asked, keep, strict=True) if not knows)
    settings = {"noise": noise, "deviation": scale, "samples": samples, "seed": seed, "window": width}
    return TraceResult(tuple(traces), tuple(kinds), arch.num_layers, settings, skipped)


def embedding_deviation(arch: ModelArch, facts: Sequence[Fact]) -> float:
    """Standard deviation of all numbers in the embeddings of the facts' subject tokens.

    What counts is what the embedding puts out, where the noise is added: Gemma scales its table by √H there.
    """
    ids = [token for fact in facts for token in fact.row.ids[fact.row.first : fact.row.subject_last + 1]]
    embed: Any = arch.model.get_input_embeddings()
    with torch.no_grad():  # run, not read: the module may scale its rows, or keep them on another device
        return float(embed(torch.tensor([ids], device=arch.input_device)).double().std(correction=0))


def draw_noise(arch: ModelArch, fact: Fact, samples: int, scale: float, seed: int) -> Tensor:
    """Noise [S, subject tokens, H] in the work dtype; the same for all facts with as many subject tokens."""
    generator = torch.Generator().manual_seed(seed)
    table: Any = arch.model.get_input_embeddings()
    shape = (samples, fact.row.subject_last + 1 - fact.row.first, int(table.weight.shape[1]))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(arch.work_dtype)


def restorations(fact: Fact, kinds: Sequence[str], num_layers: int) -> list[Restoration]:
    """Everything that is restored in a fact: kinds × tokens from the subject on × blocks."""
    tokens, layers = range(fact.row.first, fact.num_prompt), range(num_layers)
    return [Restoration(kind, token, layer) for kind in kinds for token in tokens for layer in layers]


def _trace_fact(arch: ModelArch, fact: Fact, kinds: Sequence[str], width: int, noise: Tensor, tokens: int) -> FactTrace:
    todo: list[Restoration | None] = [None, *restorations(fact, kinds, arch.num_layers)]
    rows = [(sample, spec) for spec in range(len(todo)) for sample in range(len(noise))]
    size = _rows_per_pass(arch, fact, tokens)
    scores = np.empty(len(rows))
    clean = float("nan")
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        probabilities = _run(arch, fact, width, noise[[sample for sample, _ in part]], [todo[spec] for _, spec in part])
        clean = float(probabilities[0])
        scores[start : start + size] = probabilities[1:]
    means = scores.reshape(len(todo), len(noise)).mean(1)
    effects = {}
    for i, kind in enumerate(kinds):
        effect = np.zeros((fact.num_prompt, arch.num_layers))
        count = (fact.num_prompt - fact.row.first) * arch.num_layers
        effect[fact.row.first :] = (means[1 + i * count : 1 + (i + 1) * count] - means[0]).reshape(-1, arch.num_layers)
        effects[kind] = effect
    return FactTrace(
        fact.prompt,
        fact.subject,
        fact.answer,
        fact.tokens,
        (fact.row.first, fact.row.subject_last),
        clean,
        float(means[0]),
        effects,
    )


@torch.no_grad()
def _run(
    arch: ModelArch, fact: Fact, width: int, noise: Tensor, todo: Sequence[Restoration | None]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The answer's probability in a clean prompt and in one corrupted prompt per item of ``todo``: [1 + N].

    Args:
        arch: the model.
        fact: what is asked.
        width: of the window.
        noise: [N, subject tokens, H].
        todo: what is restored in each corrupted prompt; ``None`` for nothing.
    """

    def corrupt(embedded: Tensor) -> Tensor:
        changed = embedded.clone()
        changed[1:, fact.row.first : fact.row.subject_last + 1] += noise.to(embedded.device, embedded.dtype)
        return changed

    ids = torch.tensor([fact.fed]).expand(1 + len(todo), -1)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    keep[:, fact.row.prompt_last :] = True
    with on_output(arch.model.get_input_embeddings(), corrupt), changing(arch, _changes(arch, width, todo)):
        logits = last_logits(arch, ids, torch.ones_like(ids), keep)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    labels = torch.tensor(fact.row.labels, device=wide.device).repeat(len(ids))
    picked = wide.gather(-1, labels[:, None]).view(len(ids), -1)
    return np.asarray(picked.double().sum(1).exp().cpu().numpy())


def _changes(arch: ModelArch, width: int, todo: Sequence[Restoration | None]) -> dict[Site, Change]:
    """Per site, the prompts (numbered from 1; 0 is the clean one) and tokens that get their clean value back."""
    places: dict[Site, list[tuple[int, int]]] = {}
    for row, item in enumerate(todo, start=1):
        for site in _sites(item, width, arch.num_layers):
            places.setdefault(site, []).append((row, item.token if item else 0))
    changes = {}
    for site, at in places.items():
        rows, columns = (torch.tensor(part) for part in zip(*at, strict=True))
        changes[site] = copy_rows(rows, columns, torch.zeros_like(rows))
    return changes


def _sites(item: Restoration | None, width: int, num_layers: int) -> Iterator[Site]:
    if item is not None:
        for layer in window_of(item.layer, 1 if item.kind == "hidden" else width, num_layers):
            yield Site(layer, ACTIVATIONS[item.kind])


def _rows_per_pass(arch: ModelArch, fact: Fact, tokens: int) -> int:
    """Corrupted prompts per pass, beside the clean one; one at least."""
    return max(1, prompts_per_pass(arch, len(fact.fed), len(fact.row.labels), tokens) - 1)


def _check(kinds: Sequence[str], noise: float, samples: int, tokens: int, seed: int) -> None:
    named = not isinstance(kinds, str) and isinstance(kinds, Sequence) and all(isinstance(kind, str) for kind in kinds)
    if not named or not kinds or set(kinds) - set(ACTIVATIONS) or len(set(kinds)) < len(kinds):
        raise ConfigError(f"kinds are some of {', '.join(ACTIVATIONS)}, each once, not {kinds!r}.")
    check_number("noise", noise, above=0)
    check_whole("samples", samples, 1)
    check_whole("tokens", tokens, 1)
    check_whole("seed", seed, 0)
