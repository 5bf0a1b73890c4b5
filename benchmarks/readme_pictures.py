"""The pictures of README, on a pretrained model: the heads that an edit turns to its subject, and one prompt's attention.

    python -m benchmarks.readme_pictures --model DIR --data counterfact_flat_1000.json --corpus text.txt

Edits facts that the model knows with ROME, without and with SADR without γ, each alone, and writes ``drift.png`` and
``attention.png`` into ``docs/``. The attention is that of the distracted neighbour whose right answer lost most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
    """Head × block maps of the change of the weight on the subject; the title counts what SADR does about it."""
    gain = rome.map("gain")
    turned = [rome.layers[block] for block in range(len(gain)) if gain[block].max() > gain.max() / 2]
    drift = rome.against(sadr)
    less = 1 - drift["other"].value / drift["here"].value
    figure = figures.drift_maps([rome, sadr], "gain")
    titled(
        figure,
        f"{len(rome.of(rome.main_kind))} edits: heads of blocks {min(turned)} to {max(turned)} turn to the edited subject;\n"
        f"SADR takes away {100 * less:.0f}% of the drift of the heads that over-attend",
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
    titled(
        figure,
        f"Probability of the right answer “{probe.right}”: {chances[0]} before the edit,\n"
        f"{chances[1]} after ROME, {chances[2]} after ROME with SADR",
    )
    print(f"{probe.prompt!r} → {probe.right!r}, case {probe.case}: {', '.join(chances)}")
    return figure


def titled(figure, text: str) -> None:
    """Put the finding above a figure."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=17)


if __name__ == "__main__":
    main()
