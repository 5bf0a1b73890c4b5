"""Time SADR edits against plain ones: ``python -m benchmarks.bench_sadr_cost --model DIR --data FILE --corpus FILE``.

ROME on CounterFact cases that the model answers correctly, one thread. Every edit is made with SADR as it ends by itself; in turn
with it the first ``--timed`` cases without a regularizer, the first ``--gammas`` with a fixed γ, the first ``--full`` with SADR to
its last step, where the probes of the case are scored after both SADR edits. The table is written anew after every case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from benchmarks.bench_half import SHORT
from benchmarks.bench_sequential_real import subjects_in
from benchmarks.pairs import RESULTS

import kedit
from kedit.bench.suite import fewer
from kedit.bench.table import cell
from kedit.data import load_cases
from kedit.evaluation import EditCase, Kind
from kedit.evaluation.modes import edited
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import environment
from kedit.evaluation.selection import known_cases
from kedit.evaluation.statistics import Tally, case_weights, difference, estimate
from kedit.values import adaptive_weights

PLAIN, SADR, FULL = "no regularizer", "SADR", "SADR to its last step"


@contextmanager
def never_ending(asked: bool) -> Iterator[None]:
    """If asked, no edit ends before its last step because of its penalty."""
    with mock.patch.multiple(adaptive_weights, PATIENCE=10_000, SHARE=10_000) if asked else nullcontext():
        yield


@dataclass(frozen=True)
class Made:
    """One edit: seconds, CPU seconds, steps, and the drift of its value relative to the value that first said the target."""

    seconds: float
    cpu: float
    steps: int
    drift: float | None


def make(
    editor: kedit.ROME, case: EditCase, regularizer: object, *, full: bool = False
) -> tuple[Made, kedit.EditPatch]:
    """Make an edit, and take it back."""
    start = time.perf_counter(), time.process_time()
    with never_ending(full):
        result = editor.apply(case.edit, regularizer=regularizer)
    taken = time.perf_counter() - start[0], time.process_time() - start[1]
    log = result.log[0]
    said = [row["sadr_raw"] for row in log if "sadr_raw" in row and row["nll"] <= editor.config.stop_loss]
    drift = min(said) / said[0] if said and "weight" in log[-1] else None
    result.revert()
    return Made(*taken, len(log), drift), result.patch


def hits(scorer: ProbeScorer, model, patch: kedit.EditPatch, case: EditCase) -> dict[Kind, list[float]]:
    """Per kind of probe, whether the edited model prefers the object that it should."""
    found: dict[Kind, list[float]] = defaultdict(list)
    with edited(model, patch):
        score = scorer.score([case])[0]
    for probe in score.probes:
        if probe.right is not None and probe.wrong is not None:
            found[probe.kind].append(float(probe.right.nll < probe.wrong.nll))
    return found


def table(names: list[str], made: dict[str, list[Made]], found: dict[str, list[dict[Kind, list[float]]]]) -> list[str]:
    """The rows of time and of quality."""
    lines = []
    if made[PLAIN]:
        lines += ["| | steps | seconds | ratio to a plain edit | CPU ratio | drift left |", "|---|---|---|---|---|---|"]
    for name in names:
        edits = made[name]
        pairs = list(zip(edits, made[PLAIN], strict=False))
        ratios = [one.seconds / plain.seconds for one, plain in pairs]
        cpu = [one.cpu / plain.cpu for one, plain in pairs]
        drifts = [one.drift for one in edits if one.drift is not None]
        if not pairs:  # not timed
            continue
        cells = [
            name,
            f"{statistics.median(one.steps for one in edits):.0f} ({', '.join(str(one.steps) for one in edits)})",
            f"{statistics.median(one.seconds for one in edits):.1f}",
            f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            f"{statistics.median(cpu):.2f}; of all CPU time {sum(a.cpu for a, _ in pairs) / sum(b.cpu for _, b in pairs):.2f}",
            f"{statistics.mean(drifts):.0%}" if drifts else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(found[FULL]) < 2:  # no intervals yet
        return lines
    weights = case_weights(len(found[SADR]))
    lines += ["", f"| {len(found[SADR])} cases | {' | '.join(SHORT.values())} | steps | drift left |", "|" + 7 * "---|"]
    tallies = {
        name: {kind: Tally.of([[100 * hit for hit in case[kind]] for case in found[name]]) for kind in SHORT}
        for name in (SADR, FULL)
    }
    for name, own in tallies.items():
        edits = made[name][: len(found[SADR])]
        drifts = [one.drift for one in edits if one.drift is not None]
        cells = [cell(estimate([own[kind]], weights)) for kind in SHORT]
        cells += [
            f"{statistics.mean(one.steps for one in edits):.0f}",
            f"{statistics.mean(drifts):.0%}" if drifts else "–",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    paired = [difference([tallies[SADR][kind]], [tallies[FULL][kind]], weights) for kind in SHORT]
    lines.append(f"| difference | {' | '.join(cell(value, '+') for value in paired)} | | |")
    return lines


def main() -> None:
    """Make the edits, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="text for the second moments")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="files whose subjects are left out")
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--gammas", type=int, default=5, help="cases that are also edited with this γ")
    parser.add_argument("--timed", type=int, default=24, help="cases that are also edited without a regularizer")
    parser.add_argument("--full", type=int, default=24, help="cases that are also edited to the last step, and scored")
    parser.add_argument("--dtype", default="bfloat16", help="compute_dtype")
    parser.add_argument("--out", type=Path, default=RESULTS / "sadr_cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    excluded = subjects_in(args.exclude)
    cases = known_cases(model, tokenizer, load_cases(args.data).cases, args.cases, exclude=excluded, probes=4).cases
    plain = kedit.ROME(model, tokenizer)
    moments = kedit.second_moments(model, tokenizer, plain.config.layers, args.corpus, compute_dtype=args.dtype)
    contexts = fewer(plain.contexts, args.contexts)
    shared = {"moments": moments, "contexts": contexts, "compute_dtype": args.dtype}
    editor = kedit.ROME(model, tokenizer, **shared)
    fixed = f"SADR, γ = {args.gamma:g}"
    runs = {PLAIN: None, SADR: "sadr", FULL: "sadr", fixed: kedit.SADR(gamma=args.gamma)}
    made: dict[str, list[Made]] = defaultdict(list)
    found: dict[str, list[dict[Kind, list[float]]]] = defaultdict(list)
    make(editor, cases[0], "sadr")  # warms up, and checks the model
    for number, case in enumerate(cases):
        most = {PLAIN: args.timed, fixed: args.gammas, FULL: args.full}
        names = [name for name in runs if number < most.get(name, args.cases)]
        scorer = ProbeScorer(model, tokenizer, EvalOptions(exact=False), [case])
        for name in names if number % 2 else reversed(names):
            one, patch = make(editor, case, runs[name], full=name == FULL)
            made[name].append(one)
            if name in (SADR, FULL) and number < args.full:
                found[name].append(hits(scorer, model, patch, case))
        print(number, {name: (made[name][-1].steps, round(made[name][-1].cpu, 1)) for name in names}, flush=True)
        lines = [
            "# What SADR adds to the cost of an edit",
            "",
            f"ROME on {len(made[SADR])} CounterFact cases that {Path(args.model).name} answers correctly, up to 4",
            f"neighbours each, {len(contexts)} contexts, passes in {args.dtype}, one thread; every case is edited in all ways in",
            "turn. SADR has no γ unless one is given. Drift left: that of the value that is written, relative to that of the",
            "value that first said the target. Ratios are medians of the pairs (all in brackets); CPU time leaves out what",
            "other programs took. 95% bootstrap intervals by case; differences are paired.",
            "",
            ", ".join(f"{key}: {value}" for key, value in environment().items()),
            "",
            *table([name for name in runs if made[name]], made, found),
        ]
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
