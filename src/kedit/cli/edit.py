"""Edit facts in a model and save the patch.

Examples:
  kedit edit --prompt "{} works as a" --subject "Hulqui Gossam" --target-new pilot --regularizer sadr --out edit.safetensors
  kedit edit --model EleutherAI/gpt-j-6b --dtype bfloat16 --edits edits.jsonl --out edit.safetensors
  kedit edit --edits edits.jsonl --guard kl=0.05 relation_drop=none --journal run/ --out edits.safetensors
  kedit edit --edits edits.jsonl --editor memit --memory
  kedit edit --model ./chat-model --chat --prompt "Where is {}?" --subject "Big Ben" --target-new Rome --out edit.safetensors

A file holds one edit per line: {"prompt": "...{}...", "subject": "...", "target_new": "..."}; or is a table with these columns.
docs/quickstart.md lists the other fields.

Exit status: 0 if the edited model produces every target; 3 if the patch is written, but the model does not produce all targets;
4 if the guard refused edits of a journal; 1 after an error, when nothing is edited. Under a launcher, 0 also if the model does not
produce all targets.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.errors import ConfigError, EditError, PatchError
from kedit.utils.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from kedit.edit import Edit
    from kedit.evaluation.cases import EditCase, Probe
    from kedit.evaluation.guard import Guard
    from kedit.patch import EditPatch
    from kedit.prompts.predictions import EditCheck

NOT_SAID = 3  # exit status where the edited model does not say every target
REFUSED = 4  # exit status where the guard refused some edits of a journal
SHOWN, WIDTH = 20, 48  # lines of the table, and characters of a prompt in it
BEYOND = 3  # tokens of an answer beyond the target's number, as in the check of an edit
MAX_TEXTS = 100  # more than the guard reads

HELP = "edit facts in a model and save the patch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    common.add_editor(parser)
    parser.add_argument("--prompt", help="sentence up to the target, with {} for the subject")
    parser.add_argument("--subject", help="subject of the fact")
    parser.add_argument("--target-new", help="new target: what the model should answer")
    parser.add_argument(
        "--edits",
        metavar="FILE",
        help="file of edits: JSON lines, JSON list, CSV or TSV, with the fields prompt, subject, target_new; or any form of "
        "kedit eval --data; - reads standard input",
    )
    parser.add_argument("--format", metavar="NAME", help="format of --edits (default: recognised by its fields)")
    common.add_chat(parser, "the prompts of the edits")
    parser.add_argument("--out", metavar="FILE", help="file of the patch (.safetensors)")
    parser.add_argument(
        "--guard",
        nargs="*",
        metavar="LIMIT=VALUE",
        help="roll the edit back if it exceeds a limit of kedit.Guard, for example kl=0.05; none disables a limit",
    )
    parser.add_argument(
        "--guard-cases", metavar="FILE", help="cases with paraphrases, neighbours and relations for the guard"
    )
    parser.add_argument(
        "--guard-texts", metavar="FILE", help="plain text on which the guard measures KL and perplexity"
    )
    parser.add_argument(
        "--journal", metavar="DIR", help="edit one by one, record the steps in DIR, and resume after a crash"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="edits per step of the journal (default: 1)")
    parser.add_argument(
        "--keys",
        metavar="FILE",
        help="AlphaEdit's keys of earlier edits: read if the file exists, written at the end",
    )
    parser.add_argument("--save-model", metavar="DIR", help="write the whole edited model there, with or without --out")
    parser.add_argument(
        "--force", action="store_true", help="overwrite an existing --out, and the model in a --save-model folder"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="print the estimated memory of the edit and stop; estimates missing second moments first",
    )


def run(args: argparse.Namespace) -> int:
    """Edit, report, save."""
    from kedit.evaluation.cases import in_chat
    from kedit.utils.distributed import current_group

    common.check_chat(args)
    cases = [in_chat(case, args.system) for case in _cases(args)] if args.chat else _cases(args)
    edits = [edit for case in cases for edit in case.edits]
    _check(args, edits)
    guard = _guard(args)
    regularizers = common.make_regularizers(args)
    model, tokenizer = common.load_model(args)
    if guard is not None and args.guard_texts:
        guard = _with_texts(guard, args.guard_texts, model)
    editor = common.make_editor(args, model, tokenizer)
    if args.keys:
        _load_keys(editor, args.keys, args.journal)
    if args.memory:
        common.say(f"memory: {editor.estimate_memory(edits, regularizers)}")
        return 0
    if args.journal:
        from kedit.sequential import run_journal

        run = run_journal(args.journal, editor, edits, regularizers, guard=guard, batch_size=args.batch_size or 1)
        status, text = NOT_SAID if run.all_said is False else 0, run.report()
        if not run.patches:
            common.say(text)
            raise EditError("The guard refused every edit, so there is no patch to write.")
        if run.refused:
            status = REFUSED
        patch = run.patch
    else:
        result = editor.apply(edits, regularizers, guard=guard)
        alone = current_group().size == 1  # a launcher would take any other status than 0 for a process that broke down
        status, text = NOT_SAID if alone and result.all_said is False else 0, result.report()
        if current_group().leads and result.checks:
            text = "\n".join([*_table(editor, cases, result.checks), "", text])
        if not current_group().leads:
            return status
        patch = result.patch
    lines = [text]
    try:
        for line in _save(args, patch, editor, regularizers):
            lines.append(line)
    finally:
        common.say(*lines)
    return status


def _table(editor: Any, cases: Sequence[EditCase], checks: Sequence[EditCheck]) -> list[str]:
    """What the model says before and after, an edit on each line, and to its paraphrase where one is given."""
    from kedit.evaluation.cases import Kind
    from kedit.evaluation.probing import probe_text
    from kedit.prompts.decode import continue_rows
    from kedit.prompts.tokenize import encode

    shown = [(case, edit) for case in cases for edit in case.edits][:SHOWN]
    asked: dict[int, Probe] = {}
    for number, (case, edit) in enumerate(shown):
        paraphrases = [probe for probe in case.probes if probe.kind is Kind.PARAPHRASE and edit is case.edit]
        if paraphrases:
            asked[number] = paraphrases[0]
    rows = encode(editor.tokenizer, [probe_text(editor.tokenizer, probe, probe.right) for probe in asked.values()])
    lengths = [len(row.labels) + BEYOND for row in rows]
    answers: dict[int, str] = {}
    if rows:
        texts = continue_rows(editor.arch, editor.tokenizer, [row.ids[: row.target] for row in rows], lengths)
        answers = dict(zip(asked, (text for text, _ in texts), strict=True))
    table = [("prompt", "wanted", "before", "after", *(("paraphrase",) if answers else ()))]
    for number, ((_, edit), check) in enumerate(zip(shown, checks, strict=False)):
        before = "" if check.before is None else check.before.shown
        cells = [edit.text, edit.target_new, before, ("✓ " if check.after.said else "✗ ") + check.after.shown]
        if answers:
            cells.append(answers.get(number, "–"))
        table.append(tuple(_cell(text, WIDTH if place == 0 else WIDTH // 2) for place, text in enumerate(cells)))
    more = len(checks) - len(shown)
    return [*common.columns(table), *([f"and {more} more"] if more > 0 else [])]


def _cell(text: str, width: int) -> str:
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _save(args: argparse.Namespace, patch: EditPatch, editor: Any, regularizers: Sequence[Any]) -> Iterator[str]:
    """Write what the options ask for, and tell of each file once it is complete."""
    if args.out:
        yield f"patch: {patch.save(args.out)}"
    if args.keys:
        yield f"keys: {_save_keys(editor, args.keys)}"
    if args.save_model:
        yield f"model: {common.save_model(editor.model, editor.tokenizer, args.save_model, patch)}"
    if args.out:
        yield common.keep_settings(args, common.settings_path(args.out), editor, regularizers)


def _cases(args: argparse.Namespace) -> list[EditCase]:
    """The edits that the options name, with what the file asks about them."""
    from kedit.data import load_cases, with_new_targets
    from kedit.edit import EXAMPLE, Edit
    from kedit.evaluation.cases import EditCase
    from kedit.utils.progress import logger

    single = (args.prompt, args.subject, args.target_new)
    if (args.edits is None) == all(part is None for part in single) or (args.edits and any(single)):
        raise EditError("Give either --edits FILE, or --prompt, --subject and --target-new.")
    if args.edits is None and None in single:
        raise EditError("A single edit needs --prompt, --subject and --target-new, all three.")
    if not args.edits:
        return [EditCase.of("0", Edit(*single))]
    try:
        loaded = load_cases(args.edits, args.format, strict=True)
    except EditError as error:
        raise EditError(f"{error} An edit is a record like {EXAMPLE}.") from error
    notes = sorted({name for case in loaded.cases for edit in case.edits for name in edit.notes})
    if notes:
        logger.info("Kept as notes of the edits: %s.", ", ".join(notes))
    return with_new_targets(loaded.cases, args.edits)


def _check(args: argparse.Namespace, edits: Sequence[Edit]) -> None:
    """Raise now, not after the work, where options do not fit together or a file cannot be written."""
    from kedit.cli.config import check_settings_file
    from kedit.utils.distributed import launched
    from kedit.utils.folders import is_within

    if not (args.out or args.save_model or args.journal or args.memory):
        raise EditError(
            "Give --out FILE, where the patch shall be written, or --save-model DIR for the whole edited model."
        )
    if args.memory and args.journal:
        raise ConfigError("--memory tells of edits that are made together. Drop --journal.")
    if args.out is not None:
        common.check_file(args.out, force=args.force or _is_of_this_journal(args, edits))
    if args.out:
        check_settings_file(common.settings_path(args.out))
    if args.batch_size is not None and not args.journal:
        raise EditError("--batch-size belongs to a journal. Add --journal DIR.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {args.batch_size}.")
    if args.save_model:
        common.check_model_folder(args.save_model, force=args.force)
        if args.out and is_within(Path(args.out), Path(args.save_model)):
            raise ConfigError(
                "--out lies in the --save-model folder, where loaders can mistake the patch for weights. Choose another --out."
            )
    common.choose_editor(args)
    if args.keys:
        common.check_file(args.keys, "--keys", force=True)
    if args.out and args.keys and os.path.realpath(args.out) == os.path.realpath(args.keys):
        raise ConfigError("--out and --keys name one file, so one would overwrite the other. Name two.")
    for option, path in (("--out", args.out), ("--keys", args.keys), ("--save-model", args.save_model)):
        if args.journal and path and is_within(Path(path), Path(args.journal)):
            raise ConfigError(
                f"{option} lies in the --journal folder, which holds the journal alone. Choose another {option}."
            )
    if args.journal and launched() > 1:
        raise ConfigError("A journal is kept by one process. Start kedit without a launcher, or drop --journal.")


def _is_of_this_journal(args: argparse.Namespace, edits: Sequence[Edit]) -> bool:
    """Return whether ``--out`` is a patch of the journal that goes on: a longer one loses nothing of it."""
    from kedit.patch import EditPatch
    from kedit.sequential import is_begun

    if not (args.journal and is_begun(args.journal) and Path(args.out).is_file()):
        return False
    try:
        known = EditPatch.load(args.out).provenance.get("edits", [])
    except PatchError:
        return False
    given = [edit.to_dict() for edit in edits]
    return all(edit in given for edit in known)


def _load_keys(editor: Any, path: str, journal: str | None) -> None:
    """Give AlphaEdit the keys of earlier edits, where there are some; a journal that goes on has those it began with."""
    from kedit.editors.key_history import KeyHistory
    from kedit.sequential import is_begun

    if not hasattr(editor, "history"):
        raise ConfigError(
            f"--keys belongs to an editor that remembers keys (alphaedit), not to {editor.name}. Drop it."
        )
    if Path(path).exists():
        goes_on = journal is not None and is_begun(journal)
        (KeyHistory(editor.model) if goes_on else editor.history).load(path)  # checked in any case


def _save_keys(editor: Any, path: str) -> Path:
    """Write all keys, old and new; a file with keys that are not among them stays as it is."""
    if Path(path).exists() and not editor.history.begins_with(path):
        raise PatchError(
            f"{path} holds keys that this run neither began with nor made, so it is left as it is. The patch is kept; run "
            "again with another --keys FILE to get the keys."
        )
    saved: Path = editor.history.save(path)
    return saved


def _guard(args: argparse.Namespace) -> Guard | None:
    """The guard that the options describe."""
    if args.guard is None:
        if args.guard_cases or args.guard_texts:
            raise ConfigError("--guard-cases and --guard-texts belong to a guard. Add --guard.")
        return None
    from kedit.evaluation.guard import from_limits

    given = common.overrides(args.guard, "--guard")
    limits = {key: None if value in ("none", "None") else value for key, value in given.items()}
    cases = []
    if args.guard_cases:
        from kedit.data import load_cases

        cases = load_cases(args.guard_cases, strict=True).cases
    return from_limits(limits, cases=cases)


def _with_texts(guard: Guard, path: str, model: PreTrainedModel) -> Guard:
    """The guard with the beginning of a text file to read."""
    from kedit.keys.corpus import as_corpus

    return dataclasses.replace(guard, texts=tuple(islice(as_corpus(path, model), MAX_TEXTS)))
