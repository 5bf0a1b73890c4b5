"""Write an HTML page about one or more edits: causal tracing, attention drift and activation patching, with figures.

Examples:
  kedit report --case test-3 --out edit.html
  kedit report --cases 50 --out run.html
  kedit report --model EleutherAI/gpt-j-6b --data counterfact.json --cases 10 --regularizer sadr --out run.html

Without --data, the cases are the test half of the embedded model's, and the editor is run without and with SADR. For another
model, name the regularizer to compare with.
"""

from __future__ import annotations

import argparse

from kedit.cli import common
from kedit.errors import ConfigError

HELP = "write an HTML page about the effects of edits inside a model"
COUNT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_cases(parser)
    common.add_editor(parser)
    parser.add_argument("--case", metavar="ID", help="use only the case of this name, for example test-3")
    parser.add_argument(
        "--samples", type=int, default=10, metavar="N", help="draws of the noise in tracing (default: 10)"
    )
    parser.add_argument("--out", metavar="FILE", default="report.html", help="file of the page (default: report.html)")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Look, and write the page."""
    from kedit.cli.config import check_settings_file
    from kedit.report import figures
    from kedit.report.overview import reveal

    common.check_file(args.out, force=args.force)
    check_settings_file(common.settings_path(args.out))
    figures.style()  # without matplotlib it fails now, not after the work
    common.choose_editor(args)
    regularizers = common.make_regularizers(args)
    cases = common.load_cases(args, COUNT if args.case is None else 200)
    if args.case is not None:
        cases = [case for case in cases if case.id == args.case]
        if not cases:
            raise ConfigError(
                f"There is no case called {args.case!r}. Cases of the embedded world are test-0, test-1, ..."
            )
    model, tokenizer = common.load_model(args)
    compared = regularizers or ("sadr" if args.model is None and (args.editor or "").lower() != "ft" else None)
    editor = common.make_editor(args, model, tokenizer)
    overview = reveal(model, tokenizer, cases, editor, compared, samples=args.samples, seed=args.seed)
    path = overview.save(args.out)
    settings = common.keep_settings(args, common.settings_path(args.out), editor, regularizers)
    common.say(overview.summary(), "", f"page: {path}", settings)
    return 0
