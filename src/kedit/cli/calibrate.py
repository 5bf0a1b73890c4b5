"""Choose the hyper-parameters of an editor for a model, by edits of development cases.

Examples:
  kedit calibrate --model DIR --data counterfact.json --quick
  kedit calibrate --model DIR --data counterfact.json relations.json --regularizer relations --beside
  kedit calibrate --model DIR --data counterfact.json --editor memit --search moment_weight --out memit.json

The data are facts with a true object, and with paraphrases, neighbours or other relations (docs/evaluation.md). One third of the
subjects is used, by a hash, so that other commands can measure on the rest. Blocks, clamp, λ, AlphaEdit's threshold and γ are
searched one after the other (docs/defaults.md). Editors find the preset in the cache, with --beside in the model's folder, and that
of --out with kedit edit --preset FILE. Ctrl-C keeps what is done: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from kedit.calibration import Calibration
    from kedit.evaluation.cases import EditCase

HELP = "choose an editor's hyper-parameters for a model"
TABLE, PICTURE = "calibration.md", "calibration.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from kedit.calibration.names import STAGES

    common.add_model(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="cases: JSON list, JSON lines, CSV, TSV or name of a data set; several are put together",
    )
    parser.add_argument("--format", metavar="NAME", help="format of --data (default: recognised by its fields)")
    parser.add_argument(
        "--exclude", nargs="+", metavar="FILE", default=[], help="leave the subjects of these cases out"
    )
    parser.add_argument("--all-subjects", action="store_true", help="use all subjects, not one third of them")
    parser.add_argument("--editor", metavar="NAME", help=f"editing method (default: {common.EDITOR})")
    parser.add_argument("--regularizer", metavar="NAME", help="regularizer whose γ is chosen (default: none)")
    parser.add_argument(
        "--preset", metavar="FILE", help="begin with the preset of this file, and keep what is not searched"
    )
    parser.add_argument("--search", nargs="+", choices=STAGES, help="what to search (default: all that the editor has)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and candidates, no tracing")
    parser.add_argument("--no-trace", action="store_true", help="choose the blocks without causal tracing")
    parser.add_argument("--cases", type=int, metavar="N", help="development cases (default: 36, with --quick 12)")
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="further cases for a last comparison (default: half of --cases, 0 with --quick)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of cases (default: 0)")
    parser.add_argument(
        "--moments-corpus", metavar="FILE", help="text for the second moments: text or JSONL file (default: Wikipedia)"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--beside", action="store_true", help="write the preset into the model's folder")
    place.add_argument("--out", metavar="FILE", help="write the preset to FILE, for --preset (default: kedit's cache)")
    parser.add_argument(
        "--work", metavar="DIR", help="folder for what is done, the table and the plot (default: in kedit's cache)"
    )
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Load, search, print the tables, write the preset."""
    from kedit.calibration import calibrate
    from kedit.editors import presets
    from kedit.models import ModelArch

    if args.work:
        common.check_folder(args.work, "--work")
    if args.out:
        _check(args.out, args)
    if args.beside:
        if not args.model or not Path(args.model).is_dir():
            raise ConfigError("--beside writes into the model's folder. Give --model DIR, or drop --beside.")
        _check(str(Path(args.model) / presets.FILE), args)
    cases, excluded = _cases(args)
    model, tokenizer = common.load_model(args)
    try:
        found = calibrate(
            model,
            tokenizer,
            cases,
            args.editor or common.EDITOR,
            regularizer=args.regularizer,
            search=args.search,
            preset=args.preset,
            number=args.cases,
            check=args.check,
            quick=args.quick,
            traced=not args.no_trace,
            exclude=excluded,
            corpus=args.moments_corpus,
            work=args.work,
            seed=args.seed,
        )
    except KeyboardInterrupt:
        sys.stderr.write("kedit calibrate: interrupted. What is done is kept; the same command goes on from there.\n")
        return common.INTERRUPTED
    if args.beside:
        target = Path(args.model) / presets.FILE
    else:
        target = Path(args.out) if args.out else presets.cache_path(ModelArch(model))
    common.say(found.to_markdown(), *_written(found), f"preset: {found.save(target)}")
    return 0


def _check(path: str, args: argparse.Namespace) -> None:
    """Raise now, not after the work, where the preset cannot be written, or would replace one that is there."""
    from kedit.editors import presets

    common.check_file(path, force=True)
    name = args.editor or common.EDITOR
    if Path(path).is_file() and name in presets.read(path) and not args.force:
        raise ConfigError(f"{path} has a preset of {name} already. Add --force to replace it, or choose another --out.")


def _cases(args: argparse.Namespace) -> tuple[list[EditCase], set[str]]:
    """The cases that the options name, and the subjects that are left out."""
    from kedit.evaluation import split_by_subject

    if not args.data:
        if args.model is not None:
            raise ConfigError("A calibration edits facts that the model knows. Give --data FILE with such facts.")
        from kedit.embedded import load_world
        from kedit.embedded.cases import world_cases

        return world_cases(load_world(), "dev", 200, args.seed), set()
    cases = []
    for number, path in enumerate(args.data):
        cases += [replace(case, id=f"{number}-{case.id}") for case in common.facts_of(path, args.format)]
    return cases if args.all_subjects else split_by_subject(cases)[0], common.excluded_subjects(args)


def _written(found: Calibration) -> list[str]:
    """Write the table and the plot into the folder of the runs; returns what was written."""
    from kedit.report import figures
    from kedit.utils.files import write_text

    lines = [f"table: {write_text(found.folder / TABLE, found.to_markdown())}"]
    try:
        lines.append(f"plot: {figures.save(found.figure(), found.folder / PICTURE)}")
    except DependencyError as error:
        lines.append(f"plot: none. {error}")
    return lines
