"""Measure editors and regularizers on facts that a model knows, as one table.

Examples:
  kedit bench --out bench
  kedit bench --model DIR --data counterfact.json merged.json --moments-corpus wikitext.txt --out bench
  kedit bench --model DIR --data counterfact.json --editors rome,memit --regularizers none,sadr,relations+sadr:auto --out bench

A row of the table is an editor with none or some regularizers: NAME takes the regularizer's own γ, NAME:0.5 this one, NAME:auto
none, NAME:best the one that does best on development cases, which SADR gets by itself; NAME+NAME takes both. adr is SADR on all
heads. Development and held-out cases have different subjects. Without --data, the cases are the embedded model's. --contexts 5
--compute-dtype auto is several times faster.

What is finished stays in --out. To go on after an interrupt, repeat the command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from kedit.bench import Experiment, Suite
    from kedit.bench.cases import ChosenCases, Source

HELP = "measure editors and regularizers on a model, as one table"
RUNS, CASES, SETTINGS = "runs", "cases.json", "config.yaml"
NAMES = TABLE, CSV, PLOT = "table.md", "table.csv", "tradeoff.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    add_experiment(parser)
    parser.add_argument(
        "--editors", default="rome", metavar="NAMES", help="editors, with commas, or all (default: rome)"
    )
    parser.add_argument(
        "--regularizers",
        default="none,sadr,sadr:auto,relations",
        metavar="NAMES",
        help="rows for each editor, with commas (default: none,sadr,sadr:auto,relations)",
    )
    parser.add_argument(
        "--cases", type=int, default=100, metavar="N", help="held-out cases of each file (default: 100)"
    )
    parser.add_argument(
        "--gammas",
        metavar="N[,N...]",
        help="γ that are tried on development cases (default: 0.02,0.1,0.5,2,10, and up to two more beyond the best)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="hyper-parameter of all editors that have it, or of one: --set clamp=2 --set memit.layers=[3,4,5]",
    )
    parser.add_argument(
        "--fluency", type=int, default=0, metavar="N", help="tokens to generate per generation probe (default: 0)"
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """The options that kedit bench and kedit sweep share."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="files of cases; those of CounterFact give PS, NS and DNS, those of the SADR paper RS",
    )
    parser.add_argument("--format", metavar="NAME", help="format of the files (default: recognised by their fields)")
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files whose subjects are left out, with none of their cases run",
    )
    parser.add_argument(
        "--dev-cases", type=int, default=20, metavar="N", help="development cases of each file (default: 20)"
    )
    parser.add_argument(
        "--probes", type=int, default=6, metavar="N", help="probes of each kind per case at most (default: 6)"
    )
    parser.add_argument(
        "--moments-corpus",
        metavar="FILE",
        help="text for the second moments: text or JSONL file (default: Wikipedia, needs kedit[data] and network; for the "
        "embedded model, its own text)",
    )
    parser.add_argument(
        "--contexts",
        type=int,
        metavar="N",
        help="contexts of the optimisation, fewer are faster (default: the editor's, 21)",
    )
    parser.add_argument(
        "--compute-dtype",
        metavar="DTYPE",
        help="dtype of the optimisation's passes: float32, bfloat16, float16, or auto, the fastest (default: the model's)",
    )
    parser.add_argument(
        "--chunk", type=int, default=8, metavar="N", help="edits that are optimised together (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in which cases are taken (default: 0)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the runs and the table")


def run(args: argparse.Namespace) -> int:
    """Choose the cases, run, write the table after each row."""
    from kedit.bench import Experiment
    from kedit.bench.experiment import GAMMAS
    from kedit.bench.rows import rows_of
    from kedit.bench.suite import check_hyper_parameters
    from kedit.utils.validation import check_whole

    check_whole("--fluency", args.fluency, 0)
    check_whole("--cases", args.cases, 1)
    out = check_experiment(args, NAMES)
    editors = editor_names(args.editors)
    rows = rows_of(split_names(args.regularizers))
    config = hyper_parameters(args)
    check_hyper_parameters(editors, config)
    gammas = GAMMAS if args.gammas is None else numbers(args.gammas, "--gammas")
    sources = sources_of(args, args.cases)
    suite = make_suite(args, config)
    needed = args.dev_cases if any(row.chooses_gamma for row in rows) else 0
    cases = cases_for(args, suite, sources, development=needed, held_out=args.cases, fluency=args.fluency > 0)
    experiment = Experiment(
        suite,
        editors,
        rows,
        cases.development,
        cases.held_out,
        gammas=gammas,
        fluency=args.fluency,
        chunk=args.chunk,
    )
    try:
        experiment.go(lambda: _write_tables(out, experiment, cases.about))
    except KeyboardInterrupt:
        _write(out, experiment, cases.about)
        done = len(experiment.reports)
        sys.stderr.write(f"kedit bench: interrupted; {done} rows are in {out / TABLE}. The same command goes on.\n")
        return common.INTERRUPTED
    common.say(*_write(out, experiment, cases.about), common.keep_settings(args, out / SETTINGS))
    return 0


def check_experiment(args: argparse.Namespace, names: Sequence[str]) -> Path:
    """The folder of the results; raises now, not after the work, where an option is out of range or it cannot be written."""
    from kedit.cli.config import check_settings_file
    from kedit.utils.validation import check_whole

    for option, least in (("dev_cases", 0), ("probes", 1), ("chunk", 1)):
        check_whole("--" + option.replace("_", "-"), getattr(args, option), least)
    if args.contexts is not None:
        check_whole("--contexts", args.contexts, 1)
    out = Path(args.out)
    common.check_folder(args.out, "--out", names, force=(out / RUNS).is_dir())
    check_settings_file(out / SETTINGS)
    return out


def split_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def editor_names(text: str) -> list[str]:
    """Editors by name, each once; raises ``UnknownNameError`` where there is none of a name."""
    from kedit.editors import EDITORS, editor_class

    names = list(EDITORS) if text == "all" else list(dict.fromkeys(split_names(text)))
    for name in names:
        editor_class(name)
    if not names:
        raise ConfigError("--editors names none. Give names with commas, such as rome,memit, or all.")
    return names


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between them, ascending."""
    try:
        found = tuple(sorted({float(part) for part in split_names(text)}))
    except ValueError as error:
        raise ConfigError(f"{option} is a list of numbers like 0.1,1,10, not {text!r}.") from error
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        raise ConfigError(f"{option} is a list of numbers above 0 like 0.1,1,10, not {text!r}.")
    return found


def hyper_parameters(args: argparse.Namespace) -> dict[str, object]:
    """Those of --set and --compute-dtype."""
    shared = {} if args.compute_dtype is None else {"compute_dtype": args.compute_dtype}
    return shared | common.overrides(args.set)


def sources_of(args: argparse.Namespace, count: int) -> list[Source]:
    """The cases of the files, divided by subject; those of the embedded world where no file is given."""
    from kedit.bench.cases import Source
    from kedit.evaluation import split_by_subject

    if args.data is None:
        if args.model is not None:
            raise ConfigError("The embedded world's cases are about the embedded model. Give --data with --model.")
        from kedit.embedded import load_world
        from kedit.embedded.cases import world_cases

        world = load_world()
        return [
            Source("embedded", world_cases(world, "dev", max(1, args.dev_cases)), world_cases(world, "test", count))
        ]
    sources: list[Source] = []
    for path in dict.fromkeys(args.data):
        cases = common.facts_of(path, args.format)
        name = Path(path).stem
        if any(name == other.name for other in sources):
            name = f"{name}-{len(sources) + 1}"
        sources.append(Source(name, *split_by_subject(cases)))
    return sources


def cases_for(
    args: argparse.Namespace,
    suite: Suite,
    sources: list[Source],
    *,
    development: int,
    held_out: int,
    fluency: bool = False,
) -> ChosenCases:
    """The cases that the options ask for; says how many facts the model knows."""
    from kedit.bench.cases import KINDS, choose_cases
    from kedit.evaluation import Kind

    chosen = choose_cases(
        suite,
        sources,
        development=development,
        held_out=held_out,
        exclude=common.excluded_subjects(args),
        kinds=(*KINDS, Kind.GENERATION) if fluency else KINDS,
        probes=args.probes,
        seed=args.seed,
        file=Path(args.out) / CASES,
    )
    sys.stderr.write("".join(f"{line}\n" for line in chosen.about))
    return chosen


def make_suite(args: argparse.Namespace, config: dict[str, object]) -> Suite:
    """The model, and the folder of the runs."""
    from kedit.bench import Suite

    model, tokenizer = common.load_model(args)
    return Suite(
        model, tokenizer, Path(args.out) / RUNS, corpus=args.moments_corpus, contexts=args.contexts, config=config
    )


def write_tables(out: Path, names: Sequence[str], table: str, numbers: str) -> str:
    """Write the Markdown table and the CSV under the first two names; returns the former."""
    from kedit.evaluation.journal import make_folder, write_text

    make_folder(out)
    for name, text in zip(names, (table, numbers), strict=False):  # the third is the plot's
        write_text(out / name, text)
    return table


def with_plot(out: Path, names: Sequence[str], table: str, draw: Callable[[], Figure] | None) -> list[str]:
    """The lines to print: the table and where everything is. Writes the plot, where there is something to draw."""
    from kedit.evaluation.journal import write_text
    from kedit.report.figures import as_svg

    lines = [table.removesuffix("\n"), "", f"table: {out / names[0]}, {out / names[1]}"]
    if draw is None:
        return lines
    try:
        write_text(out / names[2], as_svg(draw()))
    except DependencyError as error:
        return [*lines, f"no plot: {error}"]
    return [*lines, f"plot: {out / names[2]}"]


def _write(out: Path, experiment: Experiment, about: list[str]) -> list[str]:
    """Write what is finished, with the plot; the table, and lines that say where it is."""
    from kedit.bench.plot import points_of, tradeoff

    draw = (lambda: tradeoff(experiment)) if points_of(experiment) else None
    return with_plot(out, NAMES, _write_tables(out, experiment, about), draw)


def _write_tables(out: Path, experiment: Experiment, about: list[str]) -> str:
    """Write the tables of what is finished; the Markdown one."""
    from kedit.bench.table import markdown, to_csv

    return write_tables(out, NAMES, markdown(experiment, about), to_csv(experiment))
