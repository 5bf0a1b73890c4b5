"""``reveal``: tracing, attention drift and patching of some edits, together on one page."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.analysis.drifted import DriftResult
from kedit.analysis.drifting import drift
from kedit.analysis.editing import Patches, Source
from kedit.analysis.patched import PatchingResult
from kedit.analysis.patching import patch_activations
from kedit.analysis.traced import TraceResult
from kedit.analysis.tracing import SAMPLES, trace
from kedit.errors import ConfigError, EditError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.environment import describe_model, environment
from kedit.regularizers import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_SHARES = (6, 3)  # a sixth and a third of all heads are restored alone


@dataclass(frozen=True, eq=False)
class Reveal:
    """What some edits do inside a model.

    Attributes:
        title: of the page.
        intro: a sentence about the run.
        trace: causal tracing of the edited facts.
        drifts: attention drift under the plain editor, and under it with a regularizer if one was given.
        patching: what exchanging activations undoes and does, under the plain editor.
        meta: what was run, on what.
    """

    title: str
    intro: str
    trace: TraceResult
    drifts: tuple[DriftResult, ...]
    patching: PatchingResult
    meta: Mapping[str, Any]

    def summary(self) -> str:
        """All summaries, as text."""
        drifts = [result.summary() for result in self.drifts]
        return "\n\n".join([self.trace.summary(), *drifts, self.patching.summary()])

    def save(self, path: str | Path) -> Path:
        """Write the page: one HTML file that needs nothing else."""
        from kedit.analysis.page import page

        target = Path(path)
        text = page(self)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        from kedit.analysis.page import in_notebook, page

        return in_notebook(self, page)


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
        EditError: a case has no probe that mentions the edited subject, or no case could be edited.
        ConfigError: options do not fit together.
    """
    if samples < 1 or traced < 1:
        raise ConfigError(f"samples and traced must be at least 1, not {samples} and {traced}.")
    start = time.perf_counter()
    plain = Patches(model, tokenizer, cases, editor, None, config)
    chosen = plain.cases
    patches = plain.all()
    chosen = [case for case in chosen if case.id in patches]
    if not chosen:
        raise EditError(f"No edit succeeded. The first: {next(iter(plain.failures.values()))}")
    drifts = [drift(model, tokenizer, chosen, patches)]
    if regularized is None and regularizer is not None:
        made = Patches(model, tokenizer, chosen, editor, regularizer, config)
        regularized = made.all()
    if regularized is not None:
        drifts.append(drift(model, tokenizer, [case for case in chosen if case.id in regularized], regularized))
    patching = patch_activations(model, tokenizer, chosen, patches, heads=head_sets(drifts[0], seed))
    traces = trace(model, tokenizer, chosen[:traced], samples=samples, seed=seed)
    described, machine = describe_model(model), environment()
    first = patches[chosen[0].id]
    meta = {
        "model": f"{described['name'] or 'a model'}: {described['type']}, {described['num_layers']} blocks",
        "edits": len(chosen),
        "failed": len(plain.failures),
        "editor": drifts[0].label,
        "hyper-parameters": first.provenance.get("config", "–"),
        "tracing": dict(traces.settings),
        "seconds": f"{time.perf_counter() - start:.1f}",
        "versions": ", ".join(f"{key} {machine[key]}" for key in ("kedit", "torch", "transformers") if key in machine),
    }
    return Reveal(*_words(chosen, drifts), traces, tuple(drifts), patching, meta)


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
