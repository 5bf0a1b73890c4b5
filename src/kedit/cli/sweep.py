"""Try hyper-parameters of an editor on development cases, every combination of the given values.

Examples:
  kedit sweep --set layers=0,1,2 --out sweep
  kedit sweep --model DIR --data counterfact.json --moments-corpus wikitext.txt --set layers=3,5,8 --set clamp=1,2,4 --out sweep
  kedit sweep --editor memit --regularizer sadr --set layers=[0,1],[0,1,2] --set gamma=auto,0.1,1 --by dns --out sweep

Values have commas between them; a value that is a list has brackets. gamma is γ of the regularizers, sadr.select a field of one.
Among the points with ES of at least 99, the best one has the best balance, the harmonic mean of ES, PS, NS, RS and DNS, or the best
metric --by. Cases are chosen as by kedit bench, which measures on other subjects. Without --data, they are the embedded model's.

What is finished stays in --out. To go on after an interrupt, repeat the command.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.cli.bench import (
    SETTINGS,
    add_experiment,
    cases_for,
    check_experiment,
    make_suite,
    sources_of,
    with_plot,
    write_tables,
)
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from kedit.bench import Sweep

HELP = "try hyper-parameters of an editor on development cases"
NAMES = TABLE, CSV, PLOT = "sweep.md", "sweep.csv", "sweep.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    add_experiment(parser)
    parser.add_argument("--editor", metavar="NAME", help=f"editing method (default: {common.EDITOR})")
    parser.add_argument(
        "--regularizer", action="append", metavar="NAME", help="regularizer of all points; repeat for several"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE...]",
        help="values of a hyper-parameter, repeat for other ones: --set layers=3,5 --set clamp=2. --set help explains them",
    )
    parser.add_argument(
        "--by", default="balance", metavar="METRIC", help="what the best point has most of (default: balance)"
    )


def run(args: argparse.Namespace) -> int:
    """Choose the cases, run every point, write the table after each."""
    from kedit.bench import Sweep
    from kedit.utils.validation import check_whole

    check_whole("--dev-cases", args.dev_cases, 1)
    out = check_experiment(args, NAMES)
    grid = values_of(args.set)
    config = {} if args.compute_dtype is None else {"compute_dtype": args.compute_dtype}
    sources = sources_of(args, 1)
    options: dict[str, Any] = {"regularizers": args.regularizer or [], "by": args.by, "chunk": args.chunk}
    Sweep.check(args.editor or common.EDITOR, grid, options["regularizers"], args.by)
    suite = make_suite(args, config)
    cases = cases_for(args, suite, sources, development=args.dev_cases, held_out=0)
    sweep = Sweep(suite, args.editor or common.EDITOR, grid, cases.development, **options)
    try:
        sweep.go(lambda: _write_tables(out, sweep, cases.about))
    except KeyboardInterrupt:
        _write(out, sweep, cases.about)
        sys.stderr.write(
            f"kedit sweep: interrupted; {len(sweep.reports)} of {len(sweep.points)} points are in {out / TABLE}. "
            "The same command goes on.\n"
        )
        return common.INTERRUPTED
    common.say(*_write(out, sweep, cases.about), common.keep_settings(args, out / SETTINGS))
    return 0


def values_of(items: list[str]) -> dict[str, list[Any]]:
    """``KEY=VALUE,VALUE`` options as lists of values."""
    grid: dict[str, list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key or not text.strip():
            raise ConfigError(f"--set needs KEY=VALUE or KEY=VALUE,VALUE, found {item!r}.")
        try:
            found = ast.literal_eval(f"[{text}]")
        except (ValueError, SyntaxError):  # text, not in quotation marks
            found = [_value(part.strip()) for part in text.split(",")]
        values = [tuple(value) if isinstance(value, list) else value for value in found]
        single = itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in values)
        if not all(isinstance(value, bool | int | float | str | None) for value in single):
            raise ConfigError(f"--set {key}: values are numbers, texts or lists like [3,4], not {text}.")
        if key in grid:
            raise ConfigError(f"--set {key} is given twice. Give all its values at once: --set {key}=VALUE,VALUE.")
        grid[key] = list(dict.fromkeys(values))
    return grid


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _write(out: Path, sweep: Sweep, about: list[str]) -> list[str]:
    """Write what is finished, with the plot; the table, and lines that say where it is."""
    from kedit.bench.plot import sweep_lines

    draw = (lambda: sweep_lines(sweep)) if sweep.reports else None
    return with_plot(out, NAMES, _write_tables(out, sweep, about), draw)


def _write_tables(out: Path, sweep: Sweep, about: list[str]) -> str:
    """Write the tables of what is finished; the Markdown one."""
    from kedit.bench.table import sweep_csv, sweep_markdown

    return write_tables(out, NAMES, sweep_markdown(sweep, about), sweep_csv(sweep))
