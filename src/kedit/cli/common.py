"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype."""
    parser.add_argument("--model", metavar="NAME", help="a folder or a hub name (default: the embedded model)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the weights")


def add_editor(parser: argparse.ArgumentParser) -> None:
    """--editor, --regularizer, --gamma, --set."""
    parser.add_argument("--editor", default="rome", metavar="NAME", help="editing method (default: rome)")
    parser.add_argument(
        "--regularizer", action="append", metavar="NAME", help="term added to the objective: sadr (may be given twice)"
    )
    parser.add_argument("--gamma", type=float, help="γ of SADR, instead of the preset's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a hyper-parameter of the editor: --set steps=40 --set layers=5",
    )
    parser.add_argument("--moments-corpus", metavar="FILE", help="text for the second moments (default: the model's)")


def check_writable(path: str) -> None:
    """Raise now, not after the work, where a file cannot be written."""
    folder = Path(path).resolve().parent
    while not folder.exists():
        folder = folder.parent
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"Cannot write {path}: it is a folder, or {folder} is not writable. Choose another --out.")


def load_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the options name."""
    import torch

    from kedit.loading import load

    return load(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None)


def overrides(items: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` options as hyper-parameters; values are Python literals, else text."""
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=VALUE, found {item!r}.")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def make_regularizers(args: argparse.Namespace) -> list[Any]:
    """The regularizers that the options name."""
    from kedit.regularizers import REGULARIZERS

    found = [REGULARIZERS[name] for name in args.regularizer or []]
    made = [kind(gamma=args.gamma) if args.gamma is not None and hasattr(kind, "gamma") else kind() for kind in found]
    if args.gamma is not None and not made:
        raise ConfigError("--gamma belongs to a regularizer. Add --regularizer sadr.")
    return made


def make_editor(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The editor that the options name."""
    from kedit.arch import ModelArch
    from kedit.editors import editor
    from kedit.stats import estimate_moments

    made = editor(args.editor, model, tokenizer, **overrides(args.set))
    if args.moments_corpus:
        layers = made.config.layers
        made.moments = estimate_moments(ModelArch(model), tokenizer, layers, args.moments_corpus)
    return made
