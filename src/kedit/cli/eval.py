"""Evaluate edits: measure the probes of every case before and after its edit.

Examples:
  kedit eval --cases 50 --regularizer sadr --out run
  kedit eval --model EleutherAI/gpt-j-6b --dtype bfloat16 --device-map auto --data counterfact.json --cases 200 --out run
  kedit eval --data merged.json --editor memit --mode batch --out run --texts wikitext.txt --generate 100

  kedit eval --model BASE_DIR --patch edit.safetensors --data cases.json --out run
  kedit eval --base BASE_DIR --model EDITED_DIR --data cases.json --out run

Without --data, the cases are the test half of the embedded model's; with --patch, the edits that the patch names. To resume an
interrupted run, repeat the command. kedit compare tells two runs apart.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.patch import EditPatch

MAX_TEXTS = 200  # of which the first 512 tokens are read
SETTINGS = "config.yaml"
PARQUET: dict[str, Literal["probes", "metrics"]] = {"probes.parquet": "probes", "metrics.parquet": "metrics"}
RESULTS = ("report.html", "summary.md", "summary.json", "probes.csv")
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
    parser.add_argument(
        "--patch",
        nargs="+",
        metavar="FILE",
        help="measure these finished patches, applied in order, instead of editing",
    )
    parser.add_argument(
        "--base", metavar="NAME", help="measure the model --model, which is edited already, beside this one, its base"
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
    common.add_chat(parser, "the edits and all probes")
    parser.add_argument("--out", metavar="DIR", help="folder for records, summary and HTML page")
    parser.add_argument(
        "--parquet", action="store_true", help=f"also write {' and '.join(PARQUET)} to --out (needs pyarrow)"
    )
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Load, evaluate, print the summary."""
    from kedit.cli.config import check_settings_file
    from kedit.evaluation import evaluate
    from kedit.evaluation.cases import in_chat
    from kedit.evaluation.journal import RUN
    from kedit.evaluation.report import check_parquet
    from kedit.utils.distributed import current_group

    finished = bool(args.patch or args.base)
    if finished:
        _check_finished(args)
    if args.unedited and (args.regularizer or args.gamma is not None):
        raise ConfigError("--unedited leaves nothing to regularize. Drop it, or --regularizer.")
    if args.parquet:
        if not args.out:
            raise ConfigError("--parquet writes its files to the folder of --out. Give --out DIR, too.")
        check_parquet()
    if args.out:
        goes_on = (Path(args.out) / RUN).is_file()
        common.check_folder(
            args.out, "--out", [*RESULTS, *(PARQUET if args.parquet else ())], force=goes_on or args.force
        )
        check_settings_file(Path(args.out) / SETTINGS)
    patch = _patch(args.patch) if args.patch else None
    cases = common.load_cases(args, 200) if args.data or patch is None else common.cases_of(patch)
    common.check_chat(args)
    if args.chat:
        cases = [in_chat(case, args.system) for case in cases]
    if args.data and not args.unedited:
        from kedit.data import with_new_targets

        with_new_targets(cases, args.data)
    regularizers = common.make_regularizers(args)
    model, tokenizer = common.load_model(args)
    editor = None if args.unedited or finished else common.make_editor(args, model, tokenizer)
    report = evaluate(
        model,
        tokenizer,
        cases,
        editor if patch is None else patch,
        regularizers,
        args.mode,
        base=_base(args, tokenizer) if args.base else None,
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
        for name, rows in PARQUET.items() if args.parquet else ():
            report.to_parquet(Path(args.out) / name, rows)
        settings = common.keep_settings(args, Path(args.out) / SETTINGS, editor, regularizers)
        common.say("", f"report: {Path(args.out) / 'report.html'}", settings)
    return 0


def _check_finished(args: argparse.Namespace) -> None:
    """Raise where options of editing stand beside a finished patch or model."""
    if args.patch and args.base:
        raise ConfigError("--patch measures patches on --model, and --base an edited model. Give one of them.")
    given = ("editor", "regularizer", "set", "gamma", "moments_corpus", "unedited")
    editing = [f"--{name.replace('_', '-')}" for name in given if getattr(args, name) not in (None, [], False)]
    if args.mode != "single":
        editing.append("--mode")
    if editing:
        raise ConfigError(
            f"{'--patch' if args.patch else '--base'} measures what is finished. Drop {', '.join(editing)}."
        )
    if args.base and args.model is None:
        raise ConfigError("--base is the model before its edits. Give --model, the edited one, too.")


def _patch(paths: list[str]) -> EditPatch:
    from kedit.patch import EditPatch

    patches = [EditPatch.load(path) for path in paths]
    return EditPatch.merge(patches) if len(patches) > 1 else patches[0]


def _base(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model before its edits."""
    from kedit.evaluation.finished import check_same_tokenizer

    base, own = common.load_model(argparse.Namespace(**{**vars(args), "model": args.base}))
    check_same_tokenizer(own, tokenizer)
    return base


def _texts(path: str | None, model: PreTrainedModel) -> tuple[str, ...]:
    if path is None:
        return ()
    from kedit.keys.corpus import as_corpus

    texts = tuple(islice(as_corpus(path, model), MAX_TEXTS))
    if not texts:
        raise ConfigError(f"--texts {path} holds no text, so there is nothing to measure on it.")
    return texts
