"""Compare two evaluations of the same cases: paired differences after the edits, with 95% intervals.

Examples:
  kedit compare rome sadr
  kedit compare rome sadr --metric dns --metric rs --csv differences.csv

RUN is a folder that kedit eval wrote with --out. The difference is the second run minus the first: above 0, the second has more.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.cli import common

if TYPE_CHECKING:
    from kedit.evaluation.report import EvalReport
    from kedit.evaluation.statistics import Estimate

HELP = "compare two evaluations of the same cases"
HEADS = ("metric", "first", "second", "second - first", "", "n (cases)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("first", metavar="RUN", help="folder of an evaluation, from which the difference counts")
    parser.add_argument("second", metavar="RUN", help="folder of another evaluation of the same cases")
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="metric to compare, repeat for several (default: all)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the differences to FILE as a table")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Print the differences."""
    from kedit.evaluation.metrics import METRICS
    from kedit.evaluation.report import EvalReport, show

    if args.csv:
        common.check_file(args.csv, "--csv", force=args.force)
    for name in args.metric or ():
        METRICS[name]
    first, second = (EvalReport.load(folder) for folder in (args.first, args.second))
    differences = second.compare(first, args.metric)
    rows: list[tuple[str, ...]] = [HEADS]
    table: list[dict[str, object]] = []
    for name, difference in differences.items():
        metric = METRICS[name]
        if difference is None:
            rows.append((metric.label, "–", "–", "–", "no case of both runs has a value", ""))
            continue
        values = [report[name] for report in (first, second)]
        verdict = _verdict(difference, metric.direction)
        cells = [show(value, metric) for value in (*values, difference)]
        arrow = "↑" if metric.direction == "higher" else "↓"
        rows.append(
            (
                f"{metric.label} {arrow}",
                cells[0],
                cells[1],
                f"{'+' if difference.value > 0 else ''}{cells[2]}",
                verdict,
                f"{difference.n} ({difference.cases})",
            )
        )
        numbers = {"first": values[0].value, "second": values[1].value, "difference": difference.value}
        table.append(
            {
                "metric": name,
                **numbers,
                "low": difference.low,
                "high": difference.high,
                "n": difference.n,
                "cases": difference.cases,
            }
        )
    common.say(
        f"first:  {_named(first, args.first)}", f"second: {_named(second, args.second)}", "", *common.columns(rows), ""
    )
    common.say(
        "second - first: above 0, the second run has the larger value; ↑ more is better, ↓ less is better. In brackets: 95%",
        "bootstrap interval of the paired difference, by case. better, worse: the interval is on one side of 0.",
    )
    if args.csv:
        common.say("", f"table: {_write(args.csv, table)}")
    return 0


def _verdict(difference: Estimate, direction: str) -> str:
    """What the interval says of the second run."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return ""
    return "better" if (difference.low > 0) == (direction == "higher") else "worse"


def _named(report: EvalReport, folder: str) -> str:
    return f"{report.title} ({folder}, {len(report.records)} cases)"


def _write(path: str, table: list[dict[str, object]]) -> Path:
    from kedit.evaluation.journal import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else ["metric"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(Path(path), text.getvalue())
    return Path(path)
