"""Compare the last token's attention before and after edits: which heads attend more to the edited subject, and its cost.

Examples:
  kedit drift --cases 50
  kedit drift --cases 50 --regularizer sadr --figures figures
  kedit drift --model EleutherAI/gpt-j-6b --dtype bfloat16 --device-map auto --data counterfact.json --cases 20
  kedit drift --patch edit.safetensors --data case.jsonl

Without --data, the cases are the test half of the embedded model's. With a regularizer, the editor is run without and with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from kedit.analysis.edited_models import Source
    from kedit.analysis.results.drift import DriftResult

HELP = "show how edits change attention"
COUNT = 50
FIGURES = ("drift", "gain", "correlation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_cases(parser)
    common.add_editor(parser)
    parser.add_argument("--patch", metavar="FILE", help="use this patch instead of editing")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write all numbers to FILE (x.json; those with a regularizer to x-regularized.json)",
    )
    parser.add_argument("--figures", metavar="DIR", help="draw heat maps and the correlation into DIR (PNG)")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Edit, compare, print."""
    from kedit.analysis.attention_drift import drift

    files = [str(_path(args.out, number)) for number in (1, 2)] if args.out else []
    common.check_outputs(args, FIGURES, files if args.regularizer else files[:1])
    if args.patch and (args.editor or args.regularizer or args.set or args.moments_corpus):
        raise ConfigError(
            "--patch is written already. Drop it, or --editor, --regularizer, --set and --moments-corpus."
        )
    common.choose_editor(args)
    regularizers = common.make_regularizers(args)
    cases = common.load_cases(args, COUNT)
    model, tokenizer = common.load_model(args)
    source: Source = _patch(args.patch) if args.patch else common.make_editor(args, model, tokenizer)
    results: list[DriftResult] = []
    for chosen in ([], regularizers) if regularizers else ([],):
        results.append(drift(model, tokenizer, cases, source, chosen))
        # at once: what comes later may fail
        saved = [f"results: {results[-1].save(_path(args.out, len(results)))}"] if args.out else []
        common.say(results[-1].summary(), *saved, "")
    if len(results) == 2:
        common.say(results[0].comparison(results[1]))
    if args.figures:
        _draw(args.figures, results)
    if args.out:
        editor = None if args.patch else source
        common.say(common.keep_settings(args, common.settings_path(args.out), editor, regularizers))
    return 0


def _path(out: str, number: int) -> Path:
    """Return where the plain editor's results are written (the first), and those with a regularizer beside it."""
    path = Path(out)
    return path if number == 1 else path.with_name(f"{path.stem}-regularized{path.suffix}")


def _patch(path: str) -> Source:
    from kedit.patch import EditPatch

    return EditPatch.load(path)


def _draw(folder: str, results: list[DriftResult]) -> None:
    from kedit.report import figures

    drawn = (figures.drift_maps(results), figures.drift_maps(results, "gain"), figures.correlation_plot(results[0]))
    saved = common.save_figures(folder, dict(zip(FIGURES, drawn, strict=True)))
    common.say(*(f"picture: {path}" for path in saved))
