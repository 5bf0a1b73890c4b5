"""Estimate the second moments that editors need for a model, and cache them.

Examples:
  kedit stats --layers 0
  kedit stats --model EleutherAI/gpt-j-6b --layers 3,4,5,6,7,8 --corpus text.txt

Without --corpus, the text is Wikipedia, which needs kedit[data] and network; the embedded model has its own text. The columns
are explained in docs/second-moments.md.
"""

from __future__ import annotations

import argparse

from kedit.cli import common
from kedit.errors import ConfigError

HELP = "estimate second moments before editing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    parser.add_argument(
        "--layers", required=True, metavar="N[,N...]", help="blocks to estimate, for example 3,4,5,6,7,8"
    )
    parser.add_argument(
        "--corpus", metavar="FILE", help="text file, JSONL file or name of a data set (default: Wikipedia)"
    )
    parser.add_argument("--tokens", type=int, help="number of keys (default: 50 per dimension)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="stop earlier, once twice as much text changes the direction of an edit by less than this share (for example 0.5)",
    )


def run(args: argparse.Namespace) -> int:
    """Estimate, cache, print the statistics."""
    from kedit.keys.estimate import cache_folder, second_moments

    try:
        layers = [int(part) for part in args.layers.split(",")]
    except ValueError as error:
        raise ConfigError(f"--layers is a list of block numbers like 3,4,5, not {args.layers!r}.") from error
    model, tokenizer = common.load_model(args)
    moments = second_moments(model, tokenizer, layers, args.corpus, tokens=args.tokens, tolerance=args.tolerance)
    lines = ["layer     keys  split halves differ by  effective rank  width"]
    for layer in layers:
        m = moments[layer]
        width = m.matrix.shape[:-1].numel()  # of a mixture, of all experts together
        half = "-" if m.split_half is None else f"{100 * m.split_half:.1f} %"
        lines.append(f"{layer:5d} {m.tokens or 0:8,d} {half:>23} {m.effective_rank or 0:15.1f} {width:6d}")
    common.say(*lines, f"kept in {cache_folder()}")
    return 0
