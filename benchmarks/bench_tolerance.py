"""Second moments of less text: ``python -m benchmarks.bench_tolerance --model DIR --data FILE --corpus FILE``.

Five blocks in one pass in bfloat16, one thread: of all tokens, and with each tolerance, which stops earlier. ROME edits of
CounterFact cases that the model answers correctly are then solved with each of these moments, of one optimised value.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from benchmarks.bench_half import SHORT
from benchmarks.bench_sadr_cost import hits
from benchmarks.pairs import RESULTS
from torch.nn.functional import cosine_similarity

import kedit
from kedit.bench.suite import fewer
from kedit.bench.table import cell
from kedit.data import load_cases
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import environment
from kedit.evaluation.selection import known_cases
from kedit.evaluation.statistics import Tally, case_weights, difference, estimate

LAYERS = (4, 5, 6, 7, 8)


def main() -> None:
    """Estimate, edit, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "moments_tolerance.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    moments, taken = {}, {}
    for tolerance in (None, *args.tolerances):
        start = time.perf_counter(), time.process_time()
        options = {"cache": False, "compute_dtype": "bfloat16", "tolerance": tolerance}
        moments[tolerance] = kedit.second_moments(model, tokenizer, LAYERS, args.corpus, **options)
        taken[tolerance] = time.perf_counter() - start[0], time.process_time() - start[1]
        print(tolerance, moments[tolerance][5].tokens, taken[tolerance], flush=True)
    cases = known_cases(model, tokenizer, load_cases(args.data).cases, args.cases, probes=4).cases
    sampled = kedit.ROME(model, tokenizer, moments=moments[None]).contexts
    contexts = fewer(sampled, args.contexts)
    editor = kedit.ROME(model, tokenizer, moments=moments[None], contexts=contexts, compute_dtype="bfloat16")
    optimise = editor.engine.optimize
    found, cosines, norms = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, case in enumerate(cases):
        scorer = ProbeScorer(model, tokenizer, EvalOptions(exact=False), [case])
        kept: list[object] = []

        def once(*given: object, kept: list[object] = kept) -> object:
            if not kept:
                kept.append(optimise(*given))
            return kept[0]

        with mock.patch.object(editor.engine, "optimize", once):  # values do not depend on the moments
            updates = {}
            for tolerance, given in moments.items():
                editor.moments = given
                [patch] = editor.propose(case.edit)
                [delta] = patch.deltas.values()
                updates[tolerance] = delta.dense.flatten()
                found[tolerance].append(hits(scorer, model, patch, case))
        for tolerance, update in updates.items():
            cosines[tolerance].append(float(cosine_similarity(update, updates[None], dim=0)))
            norms[tolerance].append(float(update.norm() / updates[None].norm()))
        print(number, {key: round(values[-1], 3) for key, values in cosines.items()}, flush=True)
        weights = case_weights(number + 1)
        tallies = {
            tolerance: {kind: Tally.of([[100 * hit for hit in one[kind]] for one in each]) for kind in SHORT}
            for tolerance, each in found.items()
        }
        lines = [
            "# Second moments of less text",
            "",
            f"Blocks {LAYERS[0]} to {LAYERS[-1]} of {Path(args.model).name} in one pass in bfloat16, one thread; then ROME edits",
            f"of {number + 1} CounterFact cases that it answers correctly, up to 4 neighbours each. Every value is optimised",
            "once and written with each of the moments. Cosine and norm are those of the update, relative to the one with all",
            "tokens (medians). 95% bootstrap intervals by case; the differences from all tokens are paired.",
            "",
            ", ".join(f"{key}: {value}" for key, value in environment().items()),
            "",
            f"| tolerance | tokens | seconds | CPU seconds | cosine | norm | {' | '.join(SHORT.values())} |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for tolerance, own in tallies.items():
            cells = [
                "none" if tolerance is None else f"{tolerance:g}",
                f"{moments[tolerance][5].tokens:,}",
                *(f"{seconds:.0f}" for seconds in taken[tolerance]),
                *(f"{float(torch.tensor(values[tolerance]).median()):.2f}" for values in (cosines, norms)),
                *(cell(estimate([own[kind]], weights)) for kind in SHORT),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for tolerance in args.tolerances:
            paired = [difference([tallies[tolerance][kind]], [tallies[None][kind]], weights) for kind in SHORT]
            lines.append(f"| {tolerance:g} − none | | | | | | {' | '.join(cell(value, '+') for value in paired)} |")
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
