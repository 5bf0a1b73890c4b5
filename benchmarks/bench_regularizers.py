"""Compare regularizers on a pretrained model: ``python -m benchmarks.bench_regularizers --model DIR ...``.

Single ROME edits of facts that the model knows: CounterFact records (``--facts``, for PS, NS and DNS) and the SADR paper's merged
records (``--relations``, for RS), half of the cases each. Subjects of ``--exclude`` files are left out, so that what was chosen
on them is not measured on them. Every run can be interrupted; started again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from benchmarks.pairs import RESULTS

import kedit
from kedit.data import load_cases
from kedit.evaluation import EditCase, EvalReport, Kind, evaluate
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import environment
from kedit.evaluation.statistics import Estimate
from kedit.regularizers import Relations

RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (None, {}),
    "sadr": ("sadr", {}),
    "relations": ("relations", {}),
    "relations-strong": (Relations(gamma=1.0), {}),
    "relations+sadr": (["relations", "sadr"], {}),
}
KINDS = (Kind.REWRITE, Kind.PARAPHRASE, Kind.NEIGHBOUR, Kind.RELATION)
METRICS = ("es", "ps", "ns", "dns", "rs")


def known_cases(
    model, tokenizer, path: Path, number: int, needed: Kind, excluded: set[str], probes: int
) -> list[EditCase]:
    """So many cases, in a seeded order, whose true object the model prefers by one nat, with some probes of each kind."""
    cases = [case for case in load_cases(path).cases if any(probe.kind is needed for probe in case.probes)]
    random.Random(0).shuffle(cases)
    chosen: list[EditCase] = []
    for case in cases:
        if case.edit.subject in excluded:
            continue
        few = [probe for kind in KINDS for probe in [p for p in case.probes if p.kind is kind][:probes]]
        case = EditCase.of(f"{path.stem}-{case.id}", case.edit, few)
        rewrite = ProbeScorer(model, tokenizer, EvalOptions(exact=False), [case]).score([case])[0].probes[0]
        if rewrite.right and rewrite.wrong and rewrite.wrong.nll < rewrite.right.nll - 1:
            chosen.append(case)
            excluded.add(case.edit.subject)
        if len(chosen) == number:
            break
    return chosen


def cell(value: Estimate | None, sign: str = "") -> str:
    """An estimate with its interval."""
    return "–" if value is None else f"{value.value:{sign}.1f} [{value.low:{sign}.1f}, {value.high:{sign}.1f}]"


def main() -> None:
    """Evaluate each run, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--relations", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="text for the second moments")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="files whose subjects are left out")
    parser.add_argument("--cases", type=int, default=100, help="of each of the two files")
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), default=["none", "sadr", "relations"])
    parser.add_argument("--work", type=Path, default=Path("kedit-regularizers"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "real" / "regularizers.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    excluded = {case.edit.subject for path in args.exclude for case in load_cases(path).cases}
    cases = known_cases(model, tokenizer, args.facts, args.cases, Kind.PARAPHRASE, excluded, 4)
    cases += known_cases(model, tokenizer, args.relations, args.cases, Kind.RELATION, excluded, 6)
    rome = kedit.ROME(model, tokenizer)
    moments = kedit.second_moments(model, tokenizer, rome.config.layers, args.corpus)
    contexts = [rome.contexts[0], *rome.contexts[1 :: max(1, len(rome.contexts) // args.contexts)]][: args.contexts]
    reports: dict[str, EvalReport] = {}
    for name in args.runs:
        regularizer, options = RUNS[name]
        editor = kedit.ROME(model, tokenizer, moments=moments, contexts=contexts, compute_dtype="auto", **options)
        reports[name] = evaluate(
            model, tokenizer, cases, editor, regularizer, exact=False, chunk=8, out=args.work / name
        )
        write(args.out, args, len(cases), reports)


def write(out: Path, args: argparse.Namespace, cases: int, reports: dict[str, EvalReport]) -> None:
    """Write the tables as Markdown."""
    first = next(iter(reports.values()))
    lines = [
        "# Regularizers on a pretrained model",
        "",
        f"ROME on {Path(args.model).name}, {cases} single edits of facts that it knows, {args.contexts} contexts, the rules for",
        "models without a preset; 95% bootstrap intervals by case.",
        "",
        ", ".join(f"{key}: {value}" for key, value in environment().items()),
        "",
        f"| | {' | '.join(name.upper() for name in METRICS)} |",
        "|---|---|---|---|---|---|",
        f"| unedited | {' | '.join(cell(first.estimates[name]['before']) for name in METRICS)} |",
    ]
    for name, report in reports.items():
        lines.append(f"| {name} | {' | '.join(cell(report.estimates[metric]['after']) for metric in METRICS)} |")
    for name, report in list(reports.items())[1:]:
        differences = report.compare(first, METRICS)
        lines.append(f"| {name} − {next(iter(reports))} | {' | '.join(cell(differences[m], '+') for m in METRICS)} |")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
