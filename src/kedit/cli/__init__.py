"""The command line, with the names of the Python API.

Each subcommand is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``; it imports what is heavy
inside ``run``, so that ``kedit --help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMANDS = {
    "bench": "kedit.cli.bench",
    "calibrate": "kedit.cli.calibrate",
    "compare": "kedit.cli.compare",
    "demo": "kedit.cli.demo",
    "drift": "kedit.cli.drift",
    "edit": "kedit.cli.edit",
    "eval": "kedit.cli.eval",
    "list": "kedit.cli.list",
    "patch": "kedit.cli.patch",
    "report": "kedit.cli.report",
    "stats": "kedit.cli.stats",
    "sweep": "kedit.cli.sweep",
    "trace": "kedit.cli.trace",
    "ui": "kedit.cli.ui",
}


SHARED = ("edit", "eval", "stats")  # may be run by several processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors are one sentence on standard error and exit status 1.

    Started by ``accelerate launch -m kedit ...``, the processes share the work; the first prints and writes files. Output
    that cannot be printed stops no work: the status is 1 where some was lost, and a reader that closes its end is no error.
    """
    from kedit.utils.terminal import lenient_output

    with lenient_output() as output:
        status = _run(argv)
        output.flush()
        if output.failure is not None:
            sys.stderr.write(f"kedit: standard output cannot be written ({output.failure}). The files are written.\n")
            status = status or 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    from contextlib import ExitStack, redirect_stdout

    from kedit.cli.config import with_config
    from kedit.errors import ConfigError, KEditError
    from kedit.utils.terminal import printable_lines

    parser = _parser()
    try:
        words, command = with_config(parser, sys.argv[1:] if argv is None else argv)
    except KEditError as error:
        sys.stderr.write(f"kedit: {printable_lines(str(error))}\n")
        return 1
    args = parser.parse_args(words)
    args.parser = command
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Plain())
    logging.getLogger("kedit").setLevel(logging.WARNING if args.quiet else logging.INFO)
    logging.getLogger("kedit.capture").setLevel(logging.WARNING)  # which kernel reads the rows is no news here
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.showwarning = _show_warning
            for name in ("model", "data", "edits", "out", "keys", "journal", "save_model", "moments_corpus"):
                if getattr(args, name, None) == "":  # an unset variable of a shell
                    option = "--" + name.replace("_", "-")
                    raise ConfigError(f"{option} is given and empty. Give it a value, or leave it out.")
            if os.environ.get("WORLD_SIZE", "1") != "1":
                from kedit.utils import distributed

                if args.command not in SHARED and distributed.launched() > 1:
                    raise ConfigError(
                        f"kedit {args.command} is run by one process; {', '.join(SHARED)} may be run by several. "
                        "Start it without a launcher."
                    )
                if not distributed.join().leads:
                    logging.getLogger("kedit").setLevel(logging.WARNING)
                    stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.callback(distributed.leave)
            if args.quiet:
                stack.enter_context(_no_bars())
            if "help" in getattr(args, "set", ()):
                from kedit.cli.common import say
                from kedit.cli.explain import explain

                say(explain(args))
                return 0
            status: int = args.run(args)
    except KEditError as error:
        sys.stderr.write(f"kedit {args.command}: {printable_lines(str(error))}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"kedit {args.command}: interrupted; nothing was left half done.\n")
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    from kedit import __version__
    from kedit.cli.config import add_option

    parser = argparse.ArgumentParser(
        prog="kedit", description="Edit facts inside open-weight language models, and prove what the edit did."
    )
    parser.add_argument("--version", action="version", version=f"kedit {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only warnings and errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        add_option(sub)
        sub.set_defaults(run=module.run)
    return parser


class _Plain(logging.Formatter):
    """A message as it is, with what a terminal would act upon escaped."""

    def format(self, record: logging.LogRecord) -> str:
        from kedit.utils.terminal import printable_lines

        return printable_lines(super().format(record))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Neither kedit nor transformers draws progress bars."""
    from transformers.utils import logging as bars

    from kedit.utils.progress import Progress

    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with Progress.hidden():
            yield
    finally:
        if enabled:
            bars.enable_progress_bar()


def _show_warning(message: object, category: type[Warning], *_: object, **__: object) -> None:
    from kedit.utils.terminal import printable_lines

    sys.stderr.write(f"warning: {printable_lines(str(message))}\n")
