"""Evaluate edits: measure the probes of every case before and after its edit.

Examples:
  kedit eval --cases 50 --regularizer sadr --out run
  kedit eval --model EleutherAI/gpt-j-6b --dtype bfloat16 --device-map auto --data counterfact.json --cases 200 --out run
  kedit eval --data merged.json --editor memit --mode batch --out run --texts wikitext.txt --generate 100

Without --data, the cases are the test half of the embedded model's. To resume an interrupted run, repeat the command.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TEXTS = 200  # of which the first 512 tokens are read
SETTINGS = "config.yaml"
RESULTS = ("report.html", "summary.md", "summary.json")
HELP = "evaluate edits of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_editor(parser)
    common.add_cases(parser)
    parser.add_argument(
        "--mode",
        choices=["single", "batch", "sequential"],
        default="single",
        help="edit each case alone, all at once, or one after the other (default: single)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="cases per step in sequential mode (default: 1)"
    )
    parser.add_argument("--unedited", action="store_true", help="evaluate only the unedited model")
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="metric to report, repeat for several (default: all)"
    )
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="tokens to generate per generation probe (default: 0)"
    )
    parser.add_argument("--texts", metavar="FILE", help="plain text on which to measure perplexity and KL")
    parser.add_argument("--attention", action="store_true", help="measure the attention to the edited subject")
    parser.add_argument("--no-exact", action="store_true", help="skip the metrics that need greedy decoding")
    parser.add_argument("--out", metavar="DIR", help="folder for records, summary and HTML page")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, print the summary."""
    from kedit.cli.config import check_settings_file
    from kedit.evaluation import evaluate
    from kedit.evaluation.journal import RUN
    from kedit.utils.distributed import current_group

    if args.unedited and (args.regularizer or args.gamma is not None):
        raise ConfigError("--unedited leaves nothing to regularize. Drop it, or --regularizer.")
    if args.out:
        goes_on = (Path(args.out) / RUN).is_file()
        common.check_folder(args.out, "--out", RESULTS, force=goes_on or args.force)
        check_settings_file(Path(args.out) / SETTINGS)
    cases = common.load_cases(args, 200)
    if args.data and not args.unedited:
        from kedit.data import with_new_targets

        with_new_targets(cases, args.data)
    regularizers = common.make_regularizers(args)
    model, tokenizer = common.load_model(args)
    editor = None if args.unedited else common.make_editor(args, model, tokenizer)
    report = evaluate(
        model,
        tokenizer,
        cases,
        editor,
        regularizers,
        args.mode,
        out=args.out,
        metrics=args.metric,
        batch_size=args.batch_size,
        exact=not args.no_exact,
        generate=args.generate,
        attention=args.attention,
        texts=_texts(args.texts, model),
        seed=args.seed,
    )
    common.say(report.to_markdown().removesuffix("\n"))
    if args.out and current_group().leads:
        settings = common.keep_settings(args, Path(args.out) / SETTINGS, editor, regularizers)
        common.say("", f"report: {Path(args.out) / 'report.html'}", settings)
    return 0


def _texts(path: str | None, model: PreTrainedModel) -> tuple[str, ...]:
    if path is None:
        return ()
    from kedit.keys.corpus import as_corpus

    texts = tuple(islice(as_corpus(path, model), MAX_TEXTS))
    if not texts:
        raise ConfigError(f"--texts {path} holds no text, so there is nothing to measure on it.")
    return texts
