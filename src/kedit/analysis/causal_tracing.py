"""Causal tracing: which activations carry a fact (ROME, arXiv:2202.05262, section 2).

The subject's embeddings are hidden under Gaussian noise, so that the model no longer knows the answer; then one activation
at one token is given back its clean value. The indirect effect is the answer's probability with it minus that without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kedit.analysis.facts import Fact, as_facts, known
from kedit.analysis.interventions import ACTIVATIONS, window_width
from kedit.analysis.restorations import WholePrompts, restorations, runs_of
from kedit.analysis.results.tracing import FactTrace, TraceResult
from kedit.edit import Edit
from kedit.errors import ConfigError, EditError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.statistics import Floats
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.models.lock import holding_model
from kedit.prompts.likelihood import TOKENS_PER_FORWARD
from kedit.utils.progress import Progress, logger
from kedit.utils.validation import check_number, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE = 3.0
SAMPLES = 10
KINDS = ("hidden", "mlp", "attention")
_AT_LEAST, _AT_ONCE = 4, 2  # samples before an effect's interval is looked at, and between two looks
_DEVIATIONS = 1.96  # of an effect's mean, on each side of its interval


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
    precision: float | None = None,
) -> TraceResult:
    """Trace facts: what restoring each activation at each token and block does for the right answer.

    Effects are means over S samples of the noise. Tokens before the subject are not restored: noise does not reach them, so
    their effect is zero. A fact thus has S · K·T·L corrupted prompts with something restored: K kinds, T tokens from the
    subject on, L blocks. Each of them runs only the blocks and tokens that its restoration can change, many in one pass (cut
    by the token budget); a model whose first fact shows that this gives other numbers runs whole prompts.

    An interrupt (Ctrl-C) ends tracing early: the result has the facts that are done, and names the others in ``unfinished``.
    If no fact is done, ``KeyboardInterrupt`` is raised as usual.

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
        precision: stop drawing noise for an effect once its 95% interval over the samples is at most this much wide on
            each side of the mean, in probability. By default, all samples are drawn for every effect.

    Raises:
        EditError: there are no facts, one does not fit the model, or the model knows none of them.
        ConfigError: an option is out of range.
    """
    arch = ModelArch(model)
    width = window_width(window, arch.num_layers)
    _check(kinds, noise, samples, tokens, seed, precision)
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
        traces: list[FactTrace] = []
        total = samples * sum(len(restorations(fact, kinds, arch.num_layers)) for fact in chosen)
        with Progress(total, "tracing", unit="prompt") as progress:
            try:
                for fact in chosen:
                    drawn = draw_noise(arch, fact, samples, scale, seed)
                    runs = runs_of(arch, fact, kinds, width, drawn, tokens)
                    traces.append(_trace_fact(runs, kinds, precision, progress.advance))
            except KeyboardInterrupt:
                if not traces:
                    raise
                logger.warning("Interrupted: %d of %d facts are traced.", len(traces), len(chosen))
    skipped = tuple(fact.prompt for fact, knows in zip(asked, keep, strict=True) if not knows)
    settings = {"noise": noise, "deviation": scale, "samples": samples, "seed": seed, "window": width}
    if precision is not None:
        settings["precision"] = precision
    unfinished = tuple(fact.prompt for fact in chosen[len(traces) :])
    return TraceResult(tuple(traces), tuple(kinds), arch.num_layers, settings, skipped, unfinished)


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


def _trace_fact(
    runs: WholePrompts, kinds: Sequence[str], precision: float | None, done: Callable[[int], None]
) -> FactTrace:
    fact, layers, samples = runs.fact, runs.arch.num_layers, len(runs.noise)
    todo = restorations(fact, kinds, layers)
    clean, without = runs.unrestored()
    corrupted = np.exp(without)
    gains = np.full((len(todo), samples), np.nan)
    active = np.arange(len(todo))
    for drawn in _rounds(samples, precision):
        items = [(sample, todo[i]) for i in active for sample in drawn]
        found = np.exp(runs.scores(items, done)).reshape(len(active), len(drawn))
        gains[active, drawn.start : drawn.stop] = found - corrupted[drawn.start : drawn.stop]
        if precision is not None:
            seen = gains[active, : drawn.stop]
            wide = _margin(seen) > precision
            done(int((~wide).sum()) * (samples - drawn.stop))
            active = active[wide]
        if not len(active):
            break
    effects = _by_place(fact, kinds, layers, np.nanmean(gains, 1))
    margins = _by_place(fact, kinds, layers, _margin(gains))
    return FactTrace(
        fact.prompt,
        fact.subject,
        fact.answer,
        fact.tokens,
        (fact.row.first, fact.row.subject_last),
        float(np.exp(clean)),
        float(corrupted.mean()),
        effects,
        margins,
    )


def _by_place(fact: Fact, kinds: Sequence[str], layers: int, values: Floats) -> dict[str, Floats]:
    """A number per restoration as maps by kind, [T, L]; 0 before the subject, where nothing is restored."""
    maps = {}
    count = (fact.num_prompt - fact.row.first) * layers
    for i, kind in enumerate(kinds):
        maps[kind] = np.zeros((fact.num_prompt, layers))
        maps[kind][fact.row.first :] = values[i * count : (i + 1) * count].reshape(-1, layers)
    return maps


def _margin(gains: Floats) -> Floats:
    """Half the width of the 95% interval of each row's mean, [N, S] to [N], NaN entries left out; NaN with fewer than two."""
    there = (~np.isnan(gains)).sum(1)
    margin = np.full(len(gains), np.nan)
    enough = there > 1
    margin[enough] = _DEVIATIONS * np.nanstd(gains[enough], 1, ddof=1) / np.sqrt(there[enough])
    return margin


def _rounds(samples: int, precision: float | None) -> Iterator[range]:
    """Samples that run together: all of them, or so few that an effect may be known well enough after each round."""
    start = 0
    while start < samples:
        stop = samples if precision is None else min(samples, start + (_AT_ONCE if start else _AT_LEAST))
        yield range(start, stop)
        start = stop


def _check(kinds: Sequence[str], noise: float, samples: int, tokens: int, seed: int, precision: float | None) -> None:
    named = not isinstance(kinds, str) and isinstance(kinds, Sequence) and all(isinstance(kind, str) for kind in kinds)
    if not named or not kinds or set(kinds) - set(ACTIVATIONS) or len(set(kinds)) < len(kinds):
        raise ConfigError(f"kinds are some of {', '.join(ACTIVATIONS)}, each once, not {kinds!r}.")
    check_number("noise", noise, above=0)
    check_whole("samples", samples, 1)
    check_whole("tokens", tokens, 1)
    check_whole("seed", seed, 0)
    if precision is not None:
        check_number("precision", precision, above=0)
