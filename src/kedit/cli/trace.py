"""Find where a model stores facts, by causal tracing with noise on the subject.

Examples:
  kedit trace --cases 50 --suggest
  kedit trace --prompt "{} works as a" --subject "Hulqui Gossam"
  kedit trace --model EleutherAI/gpt-j-6b --dtype bfloat16 --device-map auto --data counterfact.json --cases 100 --suggest

Without --data, the facts are those of the embedded model. The answer is the true one; with --prompt it is --answer, or the
model's own prediction.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from kedit.cli import common
from kedit.errors import ConfigError, EditError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from kedit.analysis.results.tracing import TraceResult
    from kedit.edit import Edit
    from kedit.evaluation.cases import EditCase

HELP = "find where a model stores facts"
COUNT = 50
FIGURES = ("tracing", "handover")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_cases(parser)
    parser.add_argument("--prompt", help="sentence up to the answer of a single fact, with {} for the subject")
    parser.add_argument("--subject", help="subject of that fact")
    parser.add_argument("--answer", help="answer to that fact (default: the model's own prediction)")
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="draws of the noise (default: 10)")
    parser.add_argument(
        "--noise", type=float, default=3.0, help="noise in standard deviations of the embeddings (default: 3)"
    )
    parser.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="draw no more noise for effects known to within P (default: draw all)",
    )
    parser.add_argument("--window", type=int, help="blocks restored together (default: 10 of 48, in proportion)")
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="propose layers to edit, with the evidence, and how to check them; needs several facts",
    )
    parser.add_argument("--out", metavar="FILE", help="write all effects to FILE (.json)")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into DIR (PNG)")
    common.add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Trace, print, propose; after an interrupt, what is done."""
    from kedit.analysis.causal_tracing import trace

    common.check_outputs(args, FIGURES)
    facts = _facts(args)
    model, tokenizer = common.load_model(args)
    result = trace(
        model,
        tokenizer,
        facts,
        window=args.window,
        noise=args.noise,
        samples=args.samples,
        seed=args.seed,
        precision=args.precision,
    )
    lines = [result.summary()]
    if args.suggest:
        lines += ["", *_proposal(result, args), _known(model)]
    if args.out:
        lines.append(f"effects: {result.save(args.out)}")
        lines.append(common.keep_settings(args, common.settings_path(args.out)))
    if args.figures:
        from kedit.report import figures

        one = len(result.facts) == 1
        first = figures.tracing_fact(result.facts[0]) if one else figures.tracing_averages(result)
        drawn = dict(zip(FIGURES, (first, figures.tracing_handover(result)), strict=True))
        lines += [f"picture: {path}" for path in common.save_figures(args.figures, drawn)]
    common.say(*lines)
    return common.INTERRUPTED if result.unfinished else 0


def _proposal(result: TraceResult, args: argparse.Namespace) -> list[str]:
    """The proposed layers with their evidence and how to check them, or that there are none."""
    try:
        proposal = result.suggest()
    except EditError as error:
        return [str(error)]
    given = [
        f"--{name} {shlex.quote(value)}" for name in ("model", "data") if (value := getattr(args, name)) is not None
    ]
    given += ["--moments-corpus FILE"] if args.model is not None else []
    return [str(proposal), f"In full: {' '.join(['kedit sweep', *given, proposal.sweep, '--out sweep'])}"]


def _known(model: PreTrainedModel) -> str:
    """Name the layers that kedit would edit without tracing."""
    from kedit.editors import presets
    from kedit.models import ModelArch

    arch = ModelArch(model)
    preset = presets.find("rome", arch)
    if preset is not None:
        return f"kedit's preset of ROME for this model: layers={preset.values['layers']}."
    return f"kedit has no preset of ROME for this model; its rule by depth would be layers={presets.layer_rule(arch)}."


def _facts(args: argparse.Namespace) -> Sequence[Edit | EditCase]:
    if args.prompt is None and args.subject is None:
        if args.answer is not None:
            raise ConfigError("--answer belongs to a fact that is given by --prompt and --subject.")
        return common.load_cases(args, COUNT)
    if args.prompt is None or args.subject is None:
        raise EditError("A single fact needs --prompt and --subject, both.")
    if args.answer is not None and not args.answer.strip():
        raise EditError("--answer is empty. Give the answer, or leave the option out for what the model says next.")
    if args.data is not None or args.cases is not None:
        raise ConfigError("Give either --prompt and --subject, or --data and --cases.")
    from kedit.edit import Edit

    return [Edit(args.prompt, args.subject, args.answer or "?", args.answer)]
