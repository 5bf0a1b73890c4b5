"""``reveal``: tracing, attention drift and patching of some edits, together on one page."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.analysis.activation_patching import patch_activations
from kedit.analysis.attention_drift import drift
from kedit.analysis.causal_tracing import SAMPLES, trace
from kedit.analysis.edited_models import Patches, Source
from kedit.analysis.probes import probe_tokens_by_case
from kedit.analysis.results.drift import DriftResult
from kedit.analysis.results.patching import PatchingResult
from kedit.analysis.results.tracing import TraceResult
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.provenance import describe_model, environment
from kedit.models import ModelArch
from kedit.regularizers import Choice
from kedit.report.html import (
    answers_html,
    document,
    heads_html,
    in_notebook,
    maps_html,
    patching_html,
    table,
    trace_html,
)
from kedit.utils.files import write_text
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = {"trace": "Tracing", "patching": "Patching", "regularized": "With the regularizer"}
HEAD_SHARES = (6, 3)  # a sixth and a third of all heads are restored alone


@dataclass(frozen=True, eq=False)
class Reveal:
    """Tracing, attention drift and patching of some edits.

    Attributes:
        title: of the page.
        intro: a sentence about the run.
        trace: causal tracing of the edited facts; ``None`` where nothing could be traced.
        drifts: attention drift under the plain editor, and under it with a regularizer if one was given.
        patching: what exchanging activations undoes and does, under the plain editor; ``None`` where nothing could be.
        meta: what was run, on what.
        missing: why a part is not there, by its name: ``"trace"``, ``"patching"``, ``"regularized"``.
    """

    title: str
    intro: str
    trace: TraceResult | None
    drifts: tuple[DriftResult, ...]
    patching: PatchingResult | None
    meta: Mapping[str, Any]
    missing: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """All summaries, as text, and what is missing."""
        parts = [part.summary() for part in (self.trace, *self.drifts, self.patching) if part is not None]
        return "\n\n".join([*parts, *(f"{PARTS[name]}: not available. {why}" for name, why in self.missing.items())])

    def save(self, path: str | Path) -> Path:
        """Write the page: one HTML file that needs nothing else."""
        return write_text(Path(path), page(self))

    def _repr_html_(self) -> str:
        return in_notebook(self, page)


def page(result: Reveal) -> str:
    """The whole page about one edit or a run."""
    parts = [
        f"<p>{escape(result.intro)}</p>",
        "<h2>What the model says</h2>",
        answers_html(result.drifts),
        "<h2>Where the fact is kept</h2>",
        _absent(result.missing["trace"]) if result.trace is None else trace_html(result.trace),
        "<h2>Where the last token looks</h2>",
        maps_html(result.drifts),
        "<h2>Which heads moved</h2>",
        heads_html(result.drifts),
        _absent(result.missing["regularized"], "The run with the regularizer is not")
        if "regularized" in result.missing
        else "",
        "<h2>What carries the damage</h2>",
        _absent(result.missing["patching"]) if result.patching is None else patching_html(result.patching),
        "<h2>Run</h2>",
        table([], [[escape(key), escape(str(value))] for key, value in result.meta.items()]),
    ]
    return document(result.title, parts)


def _absent(reason: str, what: str = "Not") -> str:
    """Say why a part is not on the page."""
    return f"<p>{escape(what)} available: {escape(reason)}</p>"


def reveal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: EditCase | Iterable[EditCase],
    editor: Source = "rome",
    regularizer: Choice = "sadr",
    *,
    config: Mapping[str, Any] | None = None,
    regularized: Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
    traced: int = 50,
    seed: int = 0,
) -> Reveal:
    """Trace the facts, edit each case with and without a regularizer, and look at attention and what carries the damage.

    A part that these cases do not allow (the model knows none of the facts, say) is left out, and the page says why.

    Args:
        model: a causal language model; unedited again afterwards.
        tokenizer: its fast tokenizer.
        cases: one edit or many, with their probes.
        editor: a name, an editor of this model, or patches; see :func:`kedit.drift`.
        regularizer: what the plain editor is compared with; ``None`` for nothing.
        config: the editor's hyper-parameters, where it is given by name.
        regularized: patches by case id that were made with a regularizer, in the place of ``regularizer``.
        samples: draws of the noise in tracing.
        traced: facts that are traced, at most.
        seed: of the noise, and of the heads that are restored for comparison.

    Raises:
        EditError: no case has a probe that mentions the edited subject, or no case could be edited.
        ConfigError: options do not fit together.
    """
    check_whole("samples", samples, 1)
    check_whole("traced", traced, 1)
    start = time.perf_counter()
    plain = Patches(model, tokenizer, cases, editor, None, config)
    chosen = plain.cases
    probe_tokens_by_case(ModelArch(model), tokenizer, chosen)  # raises before the work where an edit has nothing to ask
    missing: dict[str, str] = {}
    traces: TraceResult | None = None
    patching: PatchingResult | None = None
    with _part_of(missing, "trace"):
        traces = trace(model, tokenizer, chosen[:traced], samples=samples, seed=seed)
    patches = plain.all()
    chosen = [case for case in chosen if case.id in patches]
    if not chosen:
        raise EditError(f"No edit succeeded. The first: {next(iter(plain.failures.values()))}")
    drifts = [drift(model, tokenizer, chosen, patches)]
    if regularized is None and regularizer is not None:
        made = Patches(model, tokenizer, chosen, editor, regularizer, config)
        regularized = made.all()
        if not regularized:
            missing["regularized"] = f"No edit succeeded. The first: {next(iter(made.failures.values()))}"
    if regularized:
        with _part_of(missing, "regularized"):
            drifts.append(drift(model, tokenizer, [case for case in chosen if case.id in regularized], regularized))
    with _part_of(missing, "patching"):
        patching = patch_activations(model, tokenizer, chosen, patches, heads=head_sets(drifts[0], seed))
    described, machine = describe_model(model), environment()
    first = patches[chosen[0].id]
    meta = {
        "model": f"{described['name'] or 'a model'}: {described['type']}, {described['num_layers']} blocks",
        "edits": len(chosen),
        "failed": len(plain.failures),
        "editor": drifts[0].label,
        "hyper-parameters": first.provenance.get("config", "–"),
        "tracing": "–" if traces is None else dict(traces.settings),
        "seconds": f"{time.perf_counter() - start:.1f}",
        "versions": ", ".join(f"{key} {machine[key]}" for key in ("kedit", "torch", "transformers") if key in machine),
    }
    return Reveal(*_words(chosen, drifts), traces, tuple(drifts), patching, meta, missing)


@contextmanager
def _part_of(missing: dict[str, str], name: str) -> Iterator[None]:
    """A part of the page: where the cases do not allow it, the reason is kept and the rest goes on."""
    try:
        yield
    except EditError as error:
        missing[name] = str(error)


def head_sets(result: DriftResult, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
    """The heads that over-attend most (a sixth and a third of all), and as many others, drawn at random."""
    ranked = [(one.layer, one.head) for one in result.heads()]
    sizes = sorted({max(1, len(ranked) // part) for part in HEAD_SHARES})
    sets = {f"the {size} heads that over-attend most": ranked[:size] for size in sizes}
    others = ranked[sizes[-1] :]
    if len(others) >= sizes[-1]:
        sets[f"{sizes[-1]} other heads at random"] = sorted(random.Random(seed).sample(others, sizes[-1]))
    return sets


def _words(cases: list[EditCase], drifts: list[DriftResult]) -> tuple[str, str]:
    """Title and first sentence of the page."""
    labels = " and ".join(result.label for result in drifts)
    first = cases[0].edit
    if len(cases) > 1:
        return (
            f"What {len(cases)} edits do inside the model",
            f"{len(cases)} edits with {labels}, each alone on the model.",
        )
    instead = f" instead of “{first.target_true}”" if first.target_true else ""
    said = f"the model was made to say “{first.target_new}”{instead}"
    return f"{first.text} → {first.target_new}", f"One edit with {labels}: {said}."
