"""How much a fact that a model knows distracts it: ``python -m benchmarks.bench_known_distraction --model DIR --data FILE ...``.

Nothing is edited. Each neighbour is asked alone, after the sentence that an edit would write, and after a true sentence of the
same relation and with the same target about another subject, one that the model knows. The last is what DNS can be hoped to be
after an edit: an edited fact that distracts no more than a fact of the model's own.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import kedit
from kedit.data import load_cases
from kedit.evaluation import EditCase, Kind, evaluate, known_cases
from kedit.evaluation.cases import distracted
from kedit.utils.progress import Progress

NEIGHBOURS = 4  # of a case at most


def pairs(cases: Sequence[EditCase]) -> Iterator[tuple[EditCase, EditCase]]:
    """Each case with one of the same relation whose true answer is its target; facts are alike where their prompts are."""
    by_answer = defaultdict(list)
    for case in cases:
        by_answer[case.edit.prompt, case.edit.target_true].append(case)
    for case in cases:
        others = [
            one for one in by_answer[case.edit.prompt, case.edit.target_new] if one.edit.subject != case.edit.subject
        ]
        if others:
            yield case, random.Random(case.edit.subject).choice(others)


def asked(case: EditCase, other: EditCase, known: bool) -> EditCase:
    """The case's neighbours, alone and after a sentence: the known fact of ``other``, or the edit's own."""
    edit = replace(other.edit, target_new=other.edit.target_true) if known else case.edit
    neighbours = [probe for probe in case.probes if probe.kind is Kind.NEIGHBOUR][:NEIGHBOURS]
    return replace(case, probes=(*neighbours, *(distracted(edit, probe) for probe in neighbours)))


def main() -> int:
    """Ask, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="CounterFact records")
    parser.add_argument("--cases", type=int, default=200, metavar="N")
    args = parser.parse_args()
    model, tokenizer = kedit.load(args.model)
    every = [replace(case, id=f"{Path(path).stem}-{case.id}") for path in args.data for case in load_cases(path).cases]
    found = [(one, other) for one, other in pairs(every) if any(probe.kind is Kind.NEIGHBOUR for probe in one.probes)]
    random.Random(0).shuffle(found)
    asked_about = {case.id: case for pair in found for case in pair}
    knows = {case.id for case in known_cases(model, tokenizer, asked_about.values()).cases}
    chosen = [pair for pair in found if {case.id for case in pair} <= knows][: args.cases]
    if not chosen:
        print(
            "No case has another of the same relation whose true answer is its target, both known to the model.",
            file=sys.stderr,
        )
        return 1
    with Progress.hidden():
        own, other = (
            evaluate(model, tokenizer, [asked(*pair, known) for pair in chosen], None, exact=False)
            for known in (False, True)
        )
    rows = {
        "asked alone (NS)": own.estimates["ns"]["before"],
        "after the edit's sentence (DNS, unedited)": own.estimates["dns"]["before"],
        "after the sentence of a known fact": other.estimates["dns"]["before"],
        "known fact − edit's sentence": other.compare(own, ["dns"])["dns"],
    }
    print(f"{len(chosen)} cases of {len(found)} with such a pair; the model knows both facts of each.\n")
    print("| | right answers |\n|---|---|")
    print("\n".join(f"| {name} | {estimate.text(1)} |" for name, estimate in rows.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
