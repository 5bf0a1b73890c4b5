"""The pictures of README, on a pretrained model: the heads that an edit turns to its subject, and one prompt's attention.

    python -m benchmarks.readme_pictures --model DIR --data counterfact_flat_1000.json --corpus text.txt

Edits facts that the model knows with ROME, without and with SADR without γ, each alone, and writes ``drift.png`` and
``attention.png`` into ``docs/``. The attention is that of the distracted neighbour whose right answer lost most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from benchmarks.bench_half import known_cases

import kedit
from kedit.analysis.results.drift import DriftResult
from kedit.report import figures

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="text for the second moments")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rome, sadr = measure(args)
    figures.save(drift_picture(rome, sadr), args.out / "drift.png")
    figures.save(attention_picture(rome, sadr), args.out / "attention.png")


def measure(args: argparse.Namespace) -> tuple[DriftResult, DriftResult]:
    """The drift of all probes after ROME, and after ROME with SADR."""
    model, tokenizer = kedit.load(args.model, dtype=torch.float32)
    cases = known_cases(model, tokenizer, args.data, args.cases, 4)
    editor = kedit.ROME(model, tokenizer, compute_dtype="bfloat16")
    editor.moments = kedit.second_moments(model, tokenizer, editor.config.layers, args.corpus)
    rome, sadr = (kedit.drift(model, tokenizer, cases, editor, name) for name in (None, "sadr"))
    return rome, sadr


def drift_picture(rome: DriftResult, sadr: DriftResult):
    """Head × block maps of the change of the weight on the subject; the title counts it."""
    gains = [result.map("gain") for result in (rome, sadr)]
    most = np.unravel_index(np.argmax(gains[0]), gains[0].shape)
    figure = figures.drift_maps([rome, sadr], "gain")
    drift = rome.against(sadr)
    less = 1 - drift["other"].value / drift["here"].value
    figure.suptitle(
        f"ROME turns heads to the edited subject (most: block {rome.layers[most[0]]}, head {most[1]});\n"
        f"SADR takes {100 * less:.0f}% of the drift of these heads away",
        x=0.01,
        ha="left",
    )
    print(f"{len(rome.of(rome.main_kind))} probes; {rome.comparison(sadr)}")
    return figure


def attention_picture(rome: DriftResult, sadr: DriftResult):
    """Where the last token of the worst probe looks; the title says what that does to the right answer."""
    probe = max(rome.of("distracted_neighbour"), key=lambda one: one.loss)
    twin = next(one for one in sadr.probes if (one.case, one.prompt) == (probe.case, probe.prompt))
    states = {"before the edit": probe.map_before, "ROME": probe.map_after, "ROME + SADR": twin.map_after}
    figure = figures.attention_maps(probe, states)
    chances = [f"{100 * chance:.0f}%" for chance in (probe.right_before, probe.right_after, twin.right_after)]
    figure.suptitle(
        f"Probability of the right answer “{probe.right}”: {chances[0]} before the edit,\n"
        f"{chances[1]} after ROME, {chances[2]} after ROME with SADR",
        x=0.01,
        ha="left",
    )
    print(f"{probe.prompt!r} → {probe.right!r}, case {probe.case}: {', '.join(chances)}")
    return figure


if __name__ == "__main__":
    main()
