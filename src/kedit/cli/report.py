"""Write an HTML page about one or more edits: causal tracing, attention drift and activation patching, with figures.

Examples:
  kedit report --case test-3 --out edit.html
  kedit report --model ./my-model --prompt "{} is in" --subject "The Eiffel Tower" --target-new Rome --neighbour "The Louvre is in"
  kedit report --model ./my-model --patch edit.safetensors --out edit.html
  kedit report --model EleutherAI/gpt-j-6b --data counterfact.json --cases 10 --regularizer sadr --out run.html

Without --data, --prompt or --patch, the cases are the test half of the embedded model's, and the editor is run without and with
SADR. For another model, name the regularizer to compare with. Where an edit of your own has no probes about its subject, the
answers of the model before the edit are taken as right.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kedit.evaluation.cases import EditCase
    from kedit.patch import EditPatch
    from kedit.report.overview import Reveal

HELP = "write an HTML page about the effects of edits inside a model"
COUNT = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_cases(parser)
    common.add_editor(parser)
    own = parser.add_argument_group("an edit of your own")
    own.add_argument("--prompt", metavar="TEXT", help="sentence up to the target, with {} for the subject")
    own.add_argument("--subject", metavar="TEXT", help="subject of the fact")
    own.add_argument("--target-new", metavar="TEXT", help="new target")
    own.add_argument(
        "--neighbour",
        metavar="TEXT",
        action="append",
        help="prompt about another subject, up to its answer; repeat for several",
    )
    own.add_argument("--patch", metavar="FILE", help="use this patch, and the edits that it names, instead of editing")
    common.add_chat(parser, "the prompts")
    parser.add_argument("--case", metavar="ID", help="use only the case of this name, for example test-3")
    parser.add_argument(
        "--samples", type=int, default=10, metavar="N", help="draws of the noise in tracing (default: 10)"
    )
    parser.add_argument("--out", metavar="FILE", default="report.html", help="file of the page (default: report.html)")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Look, and write the page."""
    from kedit.cli.config import check_settings_file
    from kedit.evaluation.own import with_own_probes
    from kedit.models import ModelArch
    from kedit.patch import EditPatch
    from kedit.report import figures
    from kedit.report.overview import reveal

    common.check_file(args.out, force=args.force)
    check_settings_file(common.settings_path(args.out))
    figures.style()  # without matplotlib it fails now, not after the work
    common.check_chat(args)
    if args.patch and (args.editor or args.regularizer or args.set or args.moments_corpus):
        raise ConfigError(
            "--patch is written already. Drop it, or --editor, --regularizer, --set and --moments-corpus."
        )
    common.choose_editor(args)
    regularizers = common.make_regularizers(args)
    patch = EditPatch.load(args.patch) if args.patch else None
    cases = _cases(args, patch)
    if args.case is not None:
        cases = [case for case in cases if case.id == args.case]
        if not cases:
            raise ConfigError(
                f"There is no case called {args.case!r}. Cases of the embedded world are test-0, test-1, ..."
            )
    model, tokenizer = common.load_model(args)
    if patch is not None or args.prompt is not None or args.data is not None:
        arch = ModelArch(model)
        cases = [with_own_probes(arch, tokenizer, case, args.neighbour or ()) for case in cases]
    if patch is not None:
        return _write(args, reveal(model, tokenizer, cases, patch, None, samples=args.samples, seed=args.seed))
    usual = args.model is None and args.prompt is None and (args.editor or "").lower() != "ft"
    compared = regularizers or ("sadr" if usual else None)
    editor = common.make_editor(args, model, tokenizer)
    overview = reveal(model, tokenizer, cases, editor, compared, samples=args.samples, seed=args.seed)
    return _write(args, overview, editor, regularizers)


def _cases(args: argparse.Namespace, patch: EditPatch | None) -> list[EditCase]:
    """The edits that the options name: one of the user's own, those of a patch, or cases."""
    from kedit.edit import Edit
    from kedit.evaluation.cases import EditCase, in_chat

    single = (args.prompt, args.subject, args.target_new)
    if any(part is not None for part in single):
        if (
            None in single
            or args.data is not None
            or patch is not None
            or args.cases is not None
            or args.case is not None
        ):
            raise ConfigError(
                "An edit of your own needs --prompt, --subject and --target-new, all three, without --data, --patch, --case and "
                "--cases."
            )
        cases = [EditCase.of("0", Edit(*single))]
    elif patch is not None and args.data is None:
        cases = common.cases_of(patch)[: args.cases]
    else:
        if args.neighbour and args.data is None:
            raise ConfigError("--neighbour belongs to an edit of your own. Give --prompt, --subject and --target-new.")
        cases = common.load_cases(args, COUNT if args.case is None else 200)
    return [in_chat(case, args.system) for case in cases] if args.chat else cases


def _write(args: argparse.Namespace, overview: Reveal, editor: Any = None, regularizers: Sequence[Any] = ()) -> int:
    """Save the page and the settings, and tell."""
    path = overview.save(args.out)
    settings = common.keep_settings(args, common.settings_path(args.out), editor, regularizers)
    common.say(overview.summary(), "", f"page: {path}", settings)
    return 0
