"""Time edits in half precision against float32: ``python -m benchmarks.bench_half --model DIR --data FILE --corpus FILE``.

ROME, with and without SADR, on CounterFact cases that the model answers correctly, one thread. Every edit is made in both dtypes,
one after the other; then the probes of the case are scored on both edited models. Nothing is reported where ES or the
edits' norms differ by more than what ``--most`` allows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from benchmarks.pairs import RESULTS

import kedit
from kedit.data import load_cases
from kedit.evaluation import EditCase, Kind
from kedit.evaluation.modes import edited
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import environment

SHORT = {Kind.REWRITE: "ES", Kind.PARAPHRASE: "PS", Kind.NEIGHBOUR: "NS", Kind.DISTRACTED: "DNS"}


def known_cases(model, tokenizer, path: Path, number: int, neighbours: int) -> list[EditCase]:
    """The first cases whose true object the model prefers, with some of their neighbours."""
    chosen: list[EditCase] = []
    for case in load_cases(path).cases:
        first = [probe for probe in case.probes if probe.kind is Kind.NEIGHBOUR][:neighbours]
        probes = [probe for probe in case.probes if probe.kind in (Kind.REWRITE, Kind.PARAPHRASE)] + first
        case = EditCase.of(case.id, case.edit, probes)
        score = ProbeScorer(model, tokenizer, EvalOptions(exact=False), [case]).score([case])[0].probes[0]
        if score.right is not None and score.wrong is not None and score.wrong.nll < score.right.nll - 1:
            chosen.append(case)
        if len(chosen) == number:
            return chosen
    raise SystemExit(f"Only {len(chosen)} cases of {path} are known to the model; {number} are wanted.")


def main() -> None:
    """Make the edits, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="text for the second moments")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--most", type=float, default=0.1, help="largest relative difference of an edit's norm")
    parser.add_argument("--out", type=Path, default=RESULTS / "half_precision")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    cases = known_cases(model, tokenizer, args.data, args.cases, args.neighbours)
    scorer = ProbeScorer(model, tokenizer, EvalOptions(exact=False), cases)
    plain = kedit.ROME(model, tokenizer)
    moments = kedit.second_moments(model, tokenizer, plain.config.layers, args.corpus)
    shared = {"moments": moments, "contexts": plain.contexts}
    editors = {dtype: kedit.ROME(model, tokenizer, compute_dtype=dtype, **shared) for dtype in (None, "bfloat16")}
    lines = [
        "# Edits in half precision",
        "",
        f"ROME on {len(cases)} CounterFact cases that {Path(args.model).name} answers correctly, {args.neighbours} neighbours",
        'each. Every edit is made in both dtypes in turn: float32, and `compute_dtype="bfloat16"`. Seconds are of a whole edit,',
        "copying the model included; medians, and the median of the pairs' ratios (all in brackets). CPU time leaves out",
        "what other programs took.",
        "",
        ", ".join(f"{key}: {value}" for key, value in environment().items()),
        "",
        "| | float32, s | bfloat16, s | ratio | CPU ratio | ES | PS | NS | DNS | difference of norms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, regularizer in (("ROME", None), ("ROME + SADR", "sadr")):
        seconds: dict[str | None, list[float]] = defaultdict(list)
        cpu: dict[str | None, list[float]] = defaultdict(list)
        norms: dict[str | None, list[float]] = defaultdict(list)
        hits: dict[tuple[str | None, Kind], list[bool]] = defaultdict(list)
        for number, case in enumerate(cases):
            for dtype in sorted(editors, key=str, reverse=bool(number % 2)):
                start = time.perf_counter(), time.process_time()
                [patch] = editors[dtype].propose(case.edit, regularizer)
                seconds[dtype].append(time.perf_counter() - start[0])
                cpu[dtype].append(time.process_time() - start[1])
                norms[dtype].append(sum(float(delta.dense.norm()) for delta in patch.deltas.values()))
                with edited(model, patch):
                    score = scorer.score([case])[0]
                for probe in score.probes:
                    if probe.right is not None and probe.wrong is not None:
                        hits[dtype, probe.kind].append(probe.right.nll < probe.wrong.nll)
            print(name, number, {str(dtype): round(each[-1], 2) for dtype, each in seconds.items()}, flush=True)
        ratios = [one / other for one, other in zip(seconds[None], seconds["bfloat16"], strict=True)]
        difference = statistics.median(abs(a - b) / a for a, b in zip(norms[None], norms["bfloat16"], strict=True))
        if difference > args.most:
            raise SystemExit(f"{name}: the norms of the edits differ by {difference:.0%}; nothing is reported.")
        shares = [
            " → ".join(f"{100 * sum(hits[dtype, kind]) / len(hits[dtype, kind]):.1f}" for dtype in (None, "bfloat16"))
            for kind in SHORT
        ]
        cells = [
            name,
            *(f"{statistics.median(each):.1f}" for each in (seconds[None], seconds["bfloat16"])),
            f"{statistics.median(ratios):.1f}x ({', '.join(f'{ratio:.1f}' for ratio in ratios)})",
            f"{statistics.median(one / other for one, other in zip(cpu[None], cpu['bfloat16'], strict=True)):.1f}x",
            *shares,
            f"{difference:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        text = "\n".join(lines) + "\n"
        args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
