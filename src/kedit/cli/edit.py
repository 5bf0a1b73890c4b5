"""Edit facts in a model and save the patch.

Examples:
  kedit edit --prompt "{} works as a" --subject "Hulqui Gossam" --target-new pilot --regularizer sadr --out edit.safetensors
  kedit edit --model EleutherAI/gpt-j-6b --dtype bfloat16 --edits edits.jsonl --out edit.safetensors

A JSONL file holds one edit per line: {"prompt": "...{}...", "subject": "...", "target_new": "..."}.
"""

from __future__ import annotations

import argparse
import sys

from kedit.cli import common
from kedit.errors import EditError

HELP = "write facts into a model, save the patch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_editor(parser)
    parser.add_argument("--prompt", help="a sentence up to the fact, with {} for the subject")
    parser.add_argument("--subject", help="what the fact is about")
    parser.add_argument("--target-new", help="what the model shall say")
    parser.add_argument("--edits", metavar="FILE", help="many edits, one JSON object per line")
    parser.add_argument("--out", metavar="FILE", required=True, help="where the patch is written (.safetensors)")
    parser.add_argument("--save-model", metavar="DIR", help="also write the whole edited model there")


def run(args: argparse.Namespace) -> int:
    """Edit, report, save."""
    from kedit.edit import Edit

    single = (args.prompt, args.subject, args.target_new)
    if (args.edits is None) == all(part is None for part in single) or (args.edits and any(single)):
        raise EditError("Give either --edits FILE, or --prompt, --subject and --target-new.")
    if args.edits is None and None in single:
        raise EditError("A single edit needs --prompt, --subject and --target-new, all three.")
    edits = Edit.from_jsonl(args.edits) if args.edits else [Edit(*single)]
    common.check_writable(args.out)
    regularizers = common.make_regularizers(args)
    model, tokenizer = common.load_model(args)
    editor = common.make_editor(args, model, tokenizer)
    result = editor.apply(edits, regularizers)
    sys.stdout.write(result.report() + "\n")
    path = result.patch.save(args.out)
    sys.stdout.write(f"patch: {path}\n")
    if args.save_model:
        try:
            model.save_pretrained(args.save_model)
            tokenizer.save_pretrained(args.save_model)
        except OSError as error:
            raise EditError(f"Cannot write the model to {args.save_model}: {error}. The patch is kept.") from error
        sys.stdout.write(f"model: {args.save_model}\n")
    return 0
