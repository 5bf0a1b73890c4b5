"""Attention drift and patching on a pretrained model: ``python -m benchmarks.reveal_real --model DIR --data FILE --results DIR``.

Edits of held-out facts that the model knows, each alone, with and without a regularizer; neighbours are asked after the edited
sentence (DNS). Writes ``reveal.md`` and its figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.bench_sequential_real import subjects_in
from benchmarks.quality import drift_table, interval, made_with, table

import kedit
from kedit.analysis.activation_patching import patch_activations
from kedit.analysis.edited_models import Patches
from kedit.analysis.interventions import LABELS
from kedit.analysis.results.patching import CONTAMINATE, EDITED, ORIGINAL, RESTORE, PatchingResult
from kedit.bench.suite import Suite
from kedit.data import load_cases
from kedit.evaluation import known_cases, split_by_subject
from kedit.evaluation.cases import EditCase, Kind, distracted
from kedit.report import figures
from kedit.report.overview import head_sets

PROBES = 2  # neighbours per fact


def chosen(model: object, tokenizer: object, data: Path, exclude: Sequence[Path], number: int) -> list[EditCase]:
    """Held-out facts that the model knows, with their neighbours after the edited sentence."""
    _, held_out = split_by_subject(load_cases(data).cases)
    known = known_cases(model, tokenizer, held_out, number, probes=PROBES, exclude=subjects_in(exclude)).cases
    cases = []
    for case in known:
        beside = [distracted(case.edit, probe) for probe in case.probes if probe.kind is Kind.NEIGHBOUR]
        own = [probe for probe in case.probes if probe.kind is Kind.REWRITE]
        cases.append(EditCase(id=case.id, edit=case.edit, probes=(*own, *beside)))
    return cases


def exchanges(patching: PatchingResult) -> str:
    """What restoring activations of the original model brings back, and what those of the edited one take, at the last token."""
    rows = [
        [words, *(interval(patching.share(patching.find(way, name)), ".0f", 100) for way in (RESTORE, CONTAMINATE))]
        for name, words in LABELS.items()
    ]
    lost = f"DNS {interval(patching.score(ORIGINAL), '.1f')} before, {interval(patching.score(EDITED), '.1f')} after the edits.\n\n"
    return lost + table(
        ["exchanged at the last token, in all blocks", "restored: % of the loss", "contaminated: %"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="cases with neighbours")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="files whose subjects are left out")
    parser.add_argument("--moments-corpus", type=Path, help="text for the second moments")
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--regularizers", nargs="+", default=["neighbours", "relation_keys"])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kedit.load(args.model)
    cases = chosen(model, tokenizer, args.data, args.exclude, args.cases)
    config = {"compute_dtype": args.compute_dtype}
    suite = Suite(model, tokenizer, args.results, corpus=args.moments_corpus, contexts=args.contexts, config=config)
    editor = suite.editor(args.editor)
    suite.prepare([editor])
    plain = Patches(model, tokenizer, cases, editor, None).all()
    print("edited", flush=True)
    regularized = Patches(model, tokenizer, cases, editor, args.regularizers).all()
    print("edited with", args.regularizers, flush=True)
    one, other = (kedit.drift(model, tokenizer, cases, patches) for patches in (plain, regularized))
    print(one.summary(), other.summary(), sep="\n\n", flush=True)
    patching = patch_activations(model, tokenizer, cases, plain, heads=head_sets(one))
    drawn = {
        "drift": figures.drift_maps([one, other]),
        "correlation": figures.correlation_plot(one),
        "patching": figures.patching_bars(patching),
        "windows": figures.patching_windows(patching),
    }
    for name, figure in drawn.items():
        figures.save(figure, args.results / f"reveal_{name}.png")
    title = " + ".join(args.regularizers)
    parts = [
        f"# What edits do inside {Path(args.model).name}\n",
        f"{len(cases)} held-out edits of facts that the model knows, each alone, with {args.editor} and with {args.editor} + "
        f"{title}; {len(one.of('distracted_neighbour'))} neighbours after the edited sentence. {made_with()}. "
        "In brackets: 95% bootstrap intervals by edit.\n",
        "## Attention drift\n",
        drift_table(one),
        "![Drift by head](reveal_drift.png)\n\n![Drift against damage](reveal_correlation.png)\n",
        f"```\n{one.summary()}\n\n{other.summary()}\n```\n",
        "## Patching\n",
        exchanges(patching),
        "![Exchanges in all blocks](reveal_patching.png)\n\n![Exchanges block by block](reveal_windows.png)\n",
        f"```\n{patching.summary()}\n```\n",
    ]
    (args.results / "reveal.md").write_text("\n".join(parts), encoding="utf-8")
    print(args.results / "reveal.md")


if __name__ == "__main__":
    main()
