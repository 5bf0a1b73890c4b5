"""Time causal tracing against whole prompts: ``python -m benchmarks.bench_tracing --model DIR --data FILE``.

The first facts of CounterFact that a pretrained model (``python -m benchmarks.real_model DIR``) knows, one thread, all kinds of
activations. The plain way runs every corrupted prompt whole, many in one pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchmarks.pairs import RESULTS, compare_once, write

import kedit
from kedit.analysis import causal_tracing
from kedit.analysis.facts import as_facts, known
from kedit.analysis.restorations import WholePrompts
from kedit.analysis.results.tracing import TraceResult
from kedit.data import load_cases
from kedit.models import ModelArch


def difference(one: TraceResult, other: TraceResult) -> float:
    """Largest difference of all effects, in probability."""
    pairs = zip(one.facts, other.facts, strict=True)
    return max(float(np.abs(a.effects[kind] - b.effects[kind]).max()) for a, b in pairs for kind in one.kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="cases in any form that kedit reads")
    parser.add_argument("--facts", type=int, default=5, help="each is traced in a pair of its own (default 5)")
    parser.add_argument("--samples", type=int, default=4, help="draws of the noise (default 4)")
    parser.add_argument("--out", type=Path, default=RESULTS / "tracing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    arch = ModelArch(model)
    edits = [case.edit for case in load_cases(args.data).cases[:100]]
    knows = known(arch, as_facts(arch, tokenizer, edits))
    edits = [edit for edit, knows_it in zip(edits, knows, strict=True) if knows_it][: args.facts]

    def shared(edit: kedit.Edit, **options) -> TraceResult:
        return kedit.trace(model, tokenizer, edit, samples=args.samples, **options)

    def whole(edit: kedit.Edit) -> TraceResult:
        def plain(arch, fact, kinds, width, noise, tokens):
            return WholePrompts(arch, fact, width, noise, tokens)

        with mock.patch.object(causal_tracing, "runs_of", plain):
            return shared(edit)

    shared(edits[0])  # with the check, done once per model
    rows = []
    for edit in edits:
        name = f"{edit.text} ({len(tokenizer(edit.text)['input_ids'])} tokens)"
        calls = (lambda e=edit: whole(e), lambda e=edit: shared(e))
        rows.append(compare_once(name, *calls, difference, model=model, most=1e-5))
    about = [
        f"Facts that {Path(args.model).name} knows, in float32: all restorations of hidden states, MLP and attention outputs, with",
        f"{args.samples} samples of the noise. The plain way runs every corrupted prompt whole; kedit runs the blocks and tokens",
        "that a restoration can change. The difference is the largest of all effects, in probability.",
    ]
    write(args.out, "Speed of causal tracing", about, rows)


if __name__ == "__main__":
    main()
