"""Compare the last token's attention before and after edits: which heads turn to the edited subject, and what that costs.

Examples:
  kedit drift --cases 50
  kedit drift --cases 50 --regularizer sadr --figures figures
  kedit drift --model EleutherAI/gpt-j-6b --dtype bfloat16 --device-map auto --data counterfact.json --cases 20
  kedit drift --patch edit.safetensors --data case.jsonl

Without --data the embedded world makes the cases (its test half). With a regularizer the plain editor is compared with it.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from kedit.analysis.drifted import DriftResult
    from kedit.analysis.editing import Source

HELP = "show how edits move attention"
COUNT = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_cases(parser)
    common.add_editor(parser)
    parser.add_argument("--patch", metavar="FILE", help="compare with this patch applied, instead of an editor's edits")
    parser.add_argument("--out", metavar="FILE", help="write all figures there (.json)")
    parser.add_argument("--figures", metavar="DIR", help="draw maps and correlation there (PNG)")


def run(args: argparse.Namespace) -> int:
    """Edit, compare, print."""
    from kedit.analysis.drifting import drift

    if args.out:
        common.check_writable(args.out)
    if args.figures:
        common.check_folder(args.figures, "--figures")
    if args.patch and (args.editor or args.regularizer or args.set or args.moments_corpus):
        raise ConfigError(
            "--patch is written already. Drop it, or --editor, --regularizer, --set and --moments-corpus."
        )
    common.choose_editor(args)
    regularizers = common.make_regularizers(args)
    cases = common.load_cases(args, COUNT)
    model, tokenizer = common.load_model(args)
    source: Source = _patch(args.patch) if args.patch else common.make_editor(args, model, tokenizer)
    results = [drift(model, tokenizer, cases, source)]
    if regularizers:
        results.append(drift(model, tokenizer, cases, source, regularizers))
    sys.stdout.write("\n\n".join(result.summary() for result in results) + "\n")
    if len(results) == 2:
        found = results[0].against(results[1])
        sys.stdout.write(
            f"\nIn the heads that over-attend under {results[0].label}, the mean drift is {found['here'].value:.3f} nats; "
            f"under {results[1].label} it is {found['other'].value:.3f}.\n"
        )
    if args.out:
        sys.stdout.write(f"figures: {results[-1].save(args.out)}\n")
    if args.figures:
        _draw(args.figures, results)
    return 0


def _patch(path: str) -> Source:
    from kedit.patch import EditPatch

    return EditPatch.load(path)


def _draw(folder: str, results: list[DriftResult]) -> None:
    from kedit.analysis import plots

    drawn = {"drift": plots.drift_maps(results), "gain": plots.drift_maps(results, "gain")}
    drawn["correlation"] = plots.correlation_plot(results[0])
    for path in common.save_figures(folder, drawn):
        sys.stdout.write(f"picture: {path}\n")
