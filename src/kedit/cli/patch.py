"""Show, attach, apply, revert, merge, compare, export and push patches.

Examples:
  kedit patch show edit.safetensors
  kedit patch attach edit.safetensors --model BASE_DIR --prompt "The Eiffel Tower is in"
  kedit patch apply BASE_DIR --patch edit.safetensors --out EDITED_DIR
  kedit patch revert EDITED_DIR --base BASE_DIR --patch edit.safetensors --out DIR
  kedit patch merge one.safetensors two.safetensors --out both.safetensors
  kedit patch diff BASE_DIR EDITED_DIR --out edit.safetensors
  kedit patch export edit.safetensors --model BASE_DIR --out ADAPTER_DIR
  kedit patch export edit.safetensors --model BASE_DIR --format gguf --out adapter.gguf
  kedit patch push edit.safetensors --repo USER/NAME
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.errors import ConfigError, ContextLengthError
from kedit.utils.terminal import printable

if TYPE_CHECKING:
    from kedit.patch import EditPatch
    from kedit.patch.checkpoint.rewrite import DiskReport

_MOST = 20  # patches that are listed
HELP = "show, attach, apply, revert, merge, compare, export and push patches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of every action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = _action(actions, "show", _show, "show the provenance, changed weights and measurements of a patch")
    show.add_argument("patch", metavar="PATCH")
    show.add_argument("--json", action="store_true", help="print JSON with the whole provenance")
    attach = _action(
        actions,
        "attach",
        _attach,
        "attach patches as side branches and print what the model generates without and with them",
    )
    attach.add_argument("patches", metavar="PATCH", nargs="+", help="patches in the order of application")
    attach.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="prompt to continue, repeat for several"
    )
    common.add_chat(attach, "each prompt")
    attach.add_argument("--tokens", type=int, default=12, metavar="N", help="tokens to generate (default: 12)")
    attach.add_argument("--force", action="store_true", help="do not compare the weights with the patch's fingerprints")
    common.add_model(attach)
    apply = _action(actions, "apply", _apply, "apply patches to a checkpoint folder and write the result")
    apply.add_argument("base", metavar="BASE_DIR", help="folder with config.json and safetensors weights; not changed")
    _on_disk(apply)
    revert = _action(actions, "revert", _revert, "remove patches from an edited checkpoint folder and write the result")
    revert.add_argument("edited", metavar="EDITED_DIR", help="folder with the patches applied; not changed")
    revert.add_argument(
        "--base", metavar="BASE_DIR", required=True, help="folder that the patches were applied to; not changed"
    )
    _on_disk(revert)
    revert.add_argument(
        "--drop-others",
        action="store_true",
        help="also drop other changes of the same weights if the folder does not keep their patches; they are listed",
    )
    merge = _action(actions, "merge", _merge, "merge several patches into one")
    merge.add_argument("patches", metavar="PATCH", nargs="+", help="patches in the order of application")
    merge.add_argument(
        "--tolerance", type=float, metavar="X", help="recompress each update to this relative error (default: exact)"
    )
    _out_file(merge)
    diff = _action(actions, "diff", _diff, "write the patch that turns one checkpoint folder into another")
    diff.add_argument("base", metavar="BASE_DIR")
    diff.add_argument("edited", metavar="EDITED_DIR")
    diff.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X", help="maximum relative error (default: 1e-4)"
    )
    diff.add_argument("--max-rank", type=int, metavar="N", help="refuse weights that need a higher rank")
    _out_file(diff)
    export = _action(
        actions,
        "export",
        _export,
        "export a patch as a LoRA adapter: of PEFT (a folder), or of llama.cpp (a GGUF file)",
    )
    export.add_argument("patch", metavar="PATCH")
    export.add_argument(
        "--model", metavar="DIR", help="folder with the base model's config.json (default: the embedded model)"
    )
    export.add_argument(
        "--format", choices=["peft", "gguf"], default="peft", help="format of the adapter (default: peft)"
    )
    export.add_argument(
        "--out", metavar="PATH", required=True, help="the new adapter: a folder for peft, a file for gguf"
    )
    common.add_force(export)
    push = _action(actions, "push", _push, "upload a patch with a model card to the Hugging Face hub")
    push.add_argument("patch", metavar="PATCH")
    push.add_argument("--repo", metavar="USER/NAME", required=True, help="model repository; made if there is none")
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    do: Callable[[argparse.Namespace], None] = args.do
    do(args)
    return 0


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    do: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text)
    parser.set_defaults(do=do)
    return parser


def _on_disk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patch", action="append", required=True, metavar="PATCH", help="patch, repeat for several in order"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the new checkpoint folder")
    parser.add_argument("--force", action="store_true", help="do not compare the weights with the patch's fingerprints")
    parser.add_argument(
        "--link",
        action="store_true",
        help="hard-link unchanged shards instead of copying them; the folders then share these files",
    )


def _out_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", required=True, help="the new patch (.safetensors)")
    common.add_force(parser)


def _load(paths: Sequence[str]) -> list[EditPatch]:
    from kedit.patch import EditPatch

    patches = [EditPatch.load(path) for path in paths]
    first: dict[bytes, str] = {}
    for path in paths:
        other = first.setdefault(hashlib.sha256(Path(path).read_bytes()).digest(), path)
        if other != path or paths.count(path) > 1:
            raise ConfigError(f"{other} and {path} are the same patch, which would count twice. Name each patch once.")
    return patches


def _show(args: argparse.Namespace) -> None:
    from kedit.patch.describe import weights
    from kedit.patch.format import plain

    (patch,) = _load([args.patch])
    if args.json:
        content = plain({"provenance": patch.provenance, "weights": weights(patch)}, args.patch)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # what a terminal would act upon, as JSON writes it: only inside of texts is there any
        text = "\n".join(
            "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)
            for line in text.split("\n")
        )
    else:
        text = patch.show()
    common.say(text)


def _attach(args: argparse.Namespace) -> None:
    from kedit.models import ModelArch
    from kedit.models.hooks import inference_state
    from kedit.patch import EditPatch
    from kedit.prompts.decode import continue_rows

    common.check_chat(args)
    if args.tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, not {args.tokens}.")
    patches = _load(args.patches)
    patch = EditPatch.merge(patches) if len(patches) > 1 else patches[0]
    model, tokenizer = common.load_model(args)
    prompts = [_tokens(model, tokenizer, prompt, args) for prompt in args.prompt]
    arch = ModelArch(model)
    with inference_state(arch.model):
        without = continue_rows(arch, tokenizer, prompts, args.tokens)
        with patch.attach(model, force=args.force):
            changed = continue_rows(arch, tokenizer, prompts, args.tokens)
    for prompt, old, new in zip(args.prompt, without, changed, strict=True):
        common.say(printable(prompt), f"  without: {_shown(*old)}", f"  with:    {_shown(*new)}")
    if not args.chat and any(ended and not text for text, ended in (*without, *changed)):
        template = getattr(tokenizer, "chat_template", None)
        advice = "Add --chat to ask in the model's chat template" if template else "Give the beginning of a sentence"
        common.say(f"The model ends its text right after a prompt. {advice}.")


def _shown(text: str, ended: bool) -> str:
    return repr(text) if text or not ended else "nothing: the model ends its text at once"


def _tokens(model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace) -> tuple[int, ...]:
    """The tokens of a prompt, from which the model can write as many more as the options ask for."""
    from kedit.prompts.tokenize import context_limit

    tokens = args.tokens
    if args.chat:
        ids = common.chat_tokens(tokenizer, prompt, args.system)
    else:
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tuple(tokenizer(prompt, add_special_tokens=not begun, verbose=False)["input_ids"])
    if ids is None:
        raise ConfigError("The tokenizer has no chat template. Drop --chat.")
    length, limit = len(ids), context_limit(model)
    if not length or not prompt:
        raise ConfigError(f"--prompt {prompt!r} has no tokens, so there is nothing to continue. Give a text.")
    if limit is not None and length + tokens > limit:
        raise ContextLengthError(
            f"The prompt has {length} tokens and {tokens} are to be written; the model's context window holds {limit}. Shorten "
            "the prompt, or give --tokens."
        )
    return ids


def _apply(args: argparse.Namespace) -> None:
    from kedit.patch.checkpoint.apply import apply_to_checkpoint

    _say(apply_to_checkpoint(args.base, _load(args.patch), args.out, force=args.force, link=args.link))


def _revert(args: argparse.Namespace) -> None:
    from kedit.patch.checkpoint.apply import revert_checkpoint

    patches, options = _load(args.patch), {"force": args.force, "drop_others": args.drop_others, "link": args.link}
    _say(revert_checkpoint(args.edited, args.base, patches, args.out, **options))


def _say(report: DiskReport) -> None:
    lines = [f"checkpoint: {report.folder}"]
    lines.append(f"  {len(report.rewritten)} shard(s) rewritten, {len(report.kept)} taken over as they were")
    if report.left_out:
        lines.append(f"  left behind, as they hold the weights in other forms: {', '.join(report.left_out)}")
    if report.passed_over:
        lines.append(f"  passed over, as links to folders or to nothing: {', '.join(report.passed_over)}")
    lines += [f"  lost: {what}" for what in report.dropped]
    lines.append(f"  patches on it: {len(report.applied)}")
    lines += [f"    {patch}" for patch in report.applied[:_MOST]]
    if len(report.applied) > _MOST:
        lines.append(f"    and {len(report.applied) - _MOST} more")
    common.say(*map(printable, lines))


def _merge(args: argparse.Namespace) -> None:
    from kedit.patch import EditPatch

    common.check_file(args.out, force=True)
    if any(Path(path).exists() and Path(args.out).exists() and Path(path).samefile(args.out) for path in args.patches):
        raise ConfigError(f"{args.out} is one of the patches to merge, which are only read. Choose another --out.")
    common.check_file(args.out, force=args.force)
    _save(EditPatch.merge(_load(args.patches), tolerance=args.tolerance), args.out)


def _diff(args: argparse.Namespace) -> None:
    from kedit.patch import EditPatch

    common.check_file(args.out, force=args.force)
    _save(EditPatch.diff(args.base, args.edited, tolerance=args.tolerance, max_rank=args.max_rank), args.out)


def _save(patch: EditPatch, path: str) -> None:
    saved = patch.save(path)
    common.say(patch.show(), f"patch: {saved}")


def _export(args: argparse.Namespace) -> None:
    from kedit.embedded import ASSETS
    from kedit.patch.checkpoint.read import skeleton

    if args.format == "gguf":
        common.check_file(args.out, force=args.force)
    (patch,) = _load([args.patch])
    model = skeleton(args.model or ASSETS)
    written = patch.to_gguf(args.out, model) if args.format == "gguf" else patch.to_peft(args.out, model)
    common.say(f"adapter: {written}")


def _push(args: argparse.Namespace) -> None:
    (patch,) = _load([args.patch])
    common.say(f"pushed: {patch.push_to_hub(args.repo, private=args.private)}")
