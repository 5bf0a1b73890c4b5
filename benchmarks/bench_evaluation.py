"""Time the evaluation of probes against whole texts: ``python -m benchmarks.bench_evaluation --model DIR --data FILE``.

CounterFact's cases on a pretrained model (``python -m benchmarks.real_model DIR``), one thread. The plain way runs every different
text whole, in batches of at most 16,384 padded tokens (a text that begins another one is read there), and asks the unedited
model in every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from benchmarks.pairs import RESULTS, compare, write

import kedit
from kedit.data import load_cases
from kedit.evaluation import EditCase, EvalReport, Kind, evaluate
from kedit.models import ModelArch
from kedit.prompts.likelihood import Answer, last_logits, pair_text, score_rows
from kedit.prompts.tokenize import TokenizedPrompt, context_limit, encode, pad

TOKENS = 16_384


@torch.no_grad()
def whole_texts(arch: ModelArch, rows: Sequence[TokenizedPrompt]) -> list[Answer]:
    """Score rows as texts that run whole, as published code does but for repeated ones."""
    texts: list[tuple[int, ...]] = []
    for ids in sorted({row.ids[:-1] for row in rows}, reverse=True):
        if not texts or texts[-1][: len(ids)] != ids:
            texts.append(ids)
    wanted: list[list[int]] = [[] for _ in texts]
    for number, row in enumerate(rows):
        fed = row.ids[:-1]
        wanted[next(i for i, ids in enumerate(texts) if ids[: len(fed)] == fed)].append(number)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        size = max(1, TOKENS // len(texts[order[0]]))
        batch, order = order[:size], order[size:]
        ids, mask = pad([texts[i] for i in batch])
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for place, i in enumerate(batch):
            for number in wanted[i]:
                keep[place, rows[number].prompt_last : len(rows[number].ids) - 1] = True
        at = (keep.flatten().cumsum(0) - 1).view(keep.shape)
        logits = last_logits(arch, ids, mask, keep)
        normaliser, best = logits.logsumexp(-1), logits.argmax(-1)
        for place, i in enumerate(batch):
            for number in wanted[i]:
                row = rows[number]
                cells = at[place, row.prompt_last : len(row.ids) - 1]
                nll = (normaliser[cells] - logits[cells, torch.tensor(row.labels)]).double()
                answers[number] = Answer(float(nll.mean()), row.labels, tuple(best[cells].tolist()))
    return [answers[number] for number in range(len(rows))]


def rows_of(model, tokenizer, cases: Iterable[EditCase], kinds: Iterable[Kind]) -> list[TokenizedPrompt]:
    """Prompt and answer of every probe of some kinds, right and wrong."""
    probes = [probe for case in cases for probe in case.probes if probe.kind in set(kinds) and probe.right]
    answers = [(probe.prompt, answer) for probe in probes for answer in (probe.right, probe.wrong) if answer]
    return encode(tokenizer, [pair_text(*pair) for pair in answers], limit=context_limit(model))


def difference(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """Largest difference of two lists of answers in nats, relative to those above one."""
    pairs = list(zip(one, other, strict=True))
    if any(a.labels != b.labels for a, b in pairs):
        return float("inf")
    return max(abs(a.nll - b.nll) / max(1.0, abs(a.nll)) for a, b in pairs)


def answers_of(report: EvalReport) -> list[Answer]:
    """All answers of a report, before the edit."""
    probes = [probe for record in report.records for probe in record.before.probes]
    return [answer for probe in probes for answer in (probe.right, probe.wrong) if answer is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="cases in any form that kedit reads")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--neighbours", type=int, default=8, help="per case at most")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved pairs (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    arch = ModelArch(model)
    cases = [fewer(case, args.neighbours) for case in load_cases(args.data).cases[: args.cases]]
    rows = []
    for name, kinds in (("distracted neighbours", [Kind.DISTRACTED]), ("all probes", list(Kind))):
        asked = rows_of(model, tokenizer, cases, kinds)

        def plain(asked=asked) -> list[Answer]:
            return whole_texts(arch, asked)

        def shared(asked=asked) -> list[Answer]:
            return score_rows(arch, asked)

        options = {"model": model, "most": 1e-5, "rounds": args.rounds}
        rows.append(compare(f"{name} ({len(asked)} answers)", plain, shared, difference, **options))

    def anew() -> list[Answer]:
        return answers_of(evaluate(model, tokenizer, cases, None, cache=False))

    def kept() -> list[Answer]:
        return answers_of(evaluate(model, tokenizer, cases, None))

    rows.append(compare("before the edit, in a further run", anew, kept, difference, **options))
    about = [
        f"The first {len(cases)} cases of CounterFact with at most {args.neighbours} neighbours each, on {Path(args.model).name}",
        "in float32. The plain way runs every different text whole; kedit runs once what texts have in common at their beginning.",
        "The last row is the unedited model in a second evaluation of the same cases (with greedy answers): with nothing kept of",
        "the first, and as it is by default. The difference is the largest of all answers' log-likelihoods per token, relative",
        "to those above one nat.",
    ]
    write(args.out, "Speed of evaluation", about, rows)


def fewer(case: EditCase, neighbours: int) -> EditCase:
    """A case with so many neighbours at most, and the same after the edited sentence."""
    counts: dict[Kind, int] = {}
    probes = []
    for probe in case.probes:
        counts[probe.kind] = counts.get(probe.kind, 0) + 1
        if probe.kind not in (Kind.NEIGHBOUR, Kind.DISTRACTED) or counts[probe.kind] <= neighbours:
            probes.append(probe)
    return EditCase(id=case.id, edit=case.edit, probes=tuple(probes), references=case.references)


if __name__ == "__main__":
    main()
