"""Edit one fact of the embedded model, with and without SADR, and show what it did."""

from __future__ import annotations

import argparse

HELP = "edit a fact of the embedded model and look at what happens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", metavar="DIR", default="kedit-demo", help="where picture and patch go")


def run(args: argparse.Namespace) -> int:
    """Edit, show, revert."""
    raise NotImplementedError
