"""Edit a model on a page in your browser: write an edit, compare answers, keep or undo it, download the patch.

The page is served to this machine alone (127.0.0.1). Its address holds a random token; without it nothing is answered.

Examples:
  kedit ui
  kedit ui --model ./my-model --regularizer sadr
"""

from __future__ import annotations

import argparse
import webbrowser
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "edit a model on a local page in the browser"
PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_editor(parser)
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"port on 127.0.0.1; 0 takes a free one (default: {PORT})"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Load the model, serve the page until Ctrl-C."""
    from kedit.cli.ui.server import Server
    from kedit.cli.ui.session import Session

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port is a number from 0 to 65535, not {args.port}.")
    common.choose_editor(args)
    regularizers = common.make_regularizers(args)

    def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return common.load_model(argparse.Namespace(**{**vars(args), "model": name}))

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None) -> tuple[Any, list[str]]:
        from kedit.cli.demo import give_moments
        from kedit.editors.value_editor import ValueEditor

        editor = common.make_editor(args, model, tokenizer)
        needed = name is not None and not args.moments_corpus and isinstance(editor, ValueEditor)
        return editor, give_moments(editor) if needed else []

    session = Session(load, make, regularizers)
    session.load(args.model)
    with Server(session, args.port) as server:
        common.say(
            f"page: {server.address}",
            "Only this machine can open it. Ctrl-C ends it; edits that were not downloaded are lost.",
        )
        if args.open:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            common.say("ended")
    return 0
