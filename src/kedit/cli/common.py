"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ConfigError
from kedit.utils.terminal import printable_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.editors.base import Editor
    from kedit.evaluation.cases import EditCase
    from kedit.patch import EditPatch
    from kedit.patch.content import PatchContent

EDITOR = "rome"
INTERRUPTED = 130  # exit status after Ctrl-C


def say(*texts: str) -> None:
    """Print texts, one below the other; what a terminal would act upon is escaped."""
    sys.stdout.write("".join(f"{printable_lines(text)}\n" for text in texts))


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device, --device-map."""
    parser.add_argument(
        "--model", metavar="NAME", help="folder, GGUF file or Hub name of the model (default: the embedded model)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the weights")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="where the model runs, for example cpu or cuda:1 (default: the GPU, if there is one)",
    )
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="device map of accelerate for models that do not fit one device, for example auto",
    )


def add_cases(parser: argparse.ArgumentParser) -> None:
    """--data, --format, --strict, --cases, --split, --seed."""
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="cases: JSON list, JSON lines, CSV, TSV, - for standard input, or name of a data set",
    )
    parser.add_argument("--format", metavar="NAME", help="format of --data (default: recognised by its fields)")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed record")
    parser.add_argument("--cases", type=int, metavar="N", help="maximum number of cases")
    parser.add_argument(
        "--split",
        choices=["dev", "test"],
        default="test",
        help="which half of the embedded model's cases (default: test)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the embedded model's cases and of sampling (default: 0)"
    )


def load_cases(args: argparse.Namespace, count: int) -> list[EditCase]:
    """The cases that the options name; ``count`` of the embedded world's where nothing is said."""
    if args.cases is not None and args.cases < 1:
        raise ConfigError(f"--cases must be at least 1, not {args.cases}.")
    if args.data is not None:
        from kedit.data import load_cases

        loaded = load_cases(args.data, args.format, strict=args.strict, limit=args.cases)
        sys.stderr.write(loaded.report() + "\n")
        return loaded.cases
    if args.model is not None:
        raise ConfigError("The embedded world's cases are about the embedded model. Give --data with --model.")
    from kedit.embedded import load_world
    from kedit.embedded.cases import world_cases

    return world_cases(load_world(), args.split, args.cases or count, args.seed)


def facts_of(path: str, form: str | None) -> list[EditCase]:
    """The cases of one of several files, each with a new target; says what was read."""
    from kedit.data import load_cases, with_new_targets

    loaded = load_cases(path, form)
    sys.stderr.write(loaded.report() + "\n")
    return with_new_targets(loaded.cases, path)


def excluded_subjects(args: argparse.Namespace) -> set[str]:
    """The subjects of the files of --exclude."""
    from kedit.data import load_cases

    return {case.edit.subject for path in args.exclude for case in load_cases(path, args.format).cases}


def cases_of(patch: EditPatch) -> list[EditCase]:
    """The edits that a patch names, as cases."""
    from kedit.edit import Edit
    from kedit.evaluation.cases import EditCase

    edits = [Edit.from_dict(edit) for edit in patch.provenance.get("edits") or []]
    if not edits:
        raise ConfigError("The patch names no edits, so there is nothing to ask. Give --data.")
    return [EditCase.of(str(number), edit) for number, edit in enumerate(edits)]


def add_editor(parser: argparse.ArgumentParser) -> None:
    """--editor, --regularizer, --gamma, --set."""
    parser.add_argument("--editor", metavar="NAME", help=f"editing method (default: {EDITOR})")
    parser.add_argument(
        "--regularizer",
        action="append",
        metavar="NAME",
        help="regularizer, for example sadr, or my_file.py:MyClass; repeat for several",
    )
    parser.add_argument(
        "--gamma",
        type=_gamma,
        help="γ, the factor of the regularizer, or auto: none is needed (default: the preset; auto where there is none)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="hyper-parameter of the editor, or field of a regularizer; repeat for several: --set steps=40 --set sadr.select=all. "
        "--set help explains them",
    )
    parser.add_argument(
        "--preset",
        metavar="FILE",
        help="file of presets, as kedit calibrate writes it (default: kedit_preset.json in the model's folder, then the cache, "
        "then kedit's own)",
    )
    parser.add_argument(
        "--moments-corpus",
        metavar="FILE",
        help="text for the second moments: text or JSONL file (default: Wikipedia, needs kedit[data] and network; for the embedded "
        "model, its own text). See docs/second-moments.md",
    )
    parser.add_argument(
        "--contexts",
        choices=["plain", "mixed"],
        help="contexts of the optimisation: plain text, or mixed: half of them in the model's chat template, for an edit "
        "that holds in text and in a chat (default: plain)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force, for commands whose only use of it is to overwrite."""
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def check_file(path: str, option: str = "--out", *, force: bool = False) -> None:
    """Raise now, not after the work, where a file cannot be written: a regular file, new unless ``force``."""
    from kedit.utils.texts import kind_of_file

    try:
        kind = kind_of_file(path)
        folder = Path(os.path.realpath(path)).parent  # Path.resolve() breaks on links in a circle
        while not folder.exists():
            folder = folder.parent
    except (OSError, ValueError) as error:  # a name that is too long, a null character
        raise ConfigError(f"Cannot write {path!r}: {error}. Choose another {option}.") from error
    if kind is None and path.endswith(("/", os.sep)):
        raise ConfigError(f"{option} {path} names a folder, and a file is to be written. Name a file.")
    if kind not in (None, "file"):
        raise ConfigError(f"Cannot write {path}: it is a {kind}, not a regular file. Choose another {option}.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"Cannot write {path}: {folder} is not a folder that can be written to. Choose another {option}."
        )
    if kind == "file" and not force:
        raise ConfigError(f"{path} exists already. Choose another {option}, or add --force to overwrite it.")


def check_folder(path: str, option: str, names: Sequence[str] = (), *, force: bool = False) -> None:
    """Raise now, not after the work, where the files ``names`` cannot be written into a folder."""
    for name in names or ["file"]:
        file = Path(path) / name
        if names and file.is_file() and not force:
            raise ConfigError(f"{file} exists already. Choose another {option}, or add --force to overwrite it.")
        try:
            check_file(str(file), option, force=True)
        except ConfigError as error:
            raise ConfigError(
                f"{option} {path} is not a folder that can be made or written to. Choose another one."
            ) from error


def check_outputs(args: argparse.Namespace, figures: Sequence[str], files: Sequence[str] = ()) -> None:
    """Raise now, not after the work, where ``--out`` (or ``files``) or ``--figures`` cannot be written."""
    from kedit.cli.config import check_settings_file

    for path in files or ([args.out] if args.out else []):
        check_file(path, force=args.force)
    if args.out:
        check_settings_file(settings_path(args.out))
    if args.figures:
        check_folder(args.figures, "--figures", [f"{name}.png" for name in figures], force=args.force)


def check_model_folder(path: str, option: str = "--save-model", *, force: bool = False) -> None:
    """Raise now, not after the work, where a model cannot be written into a folder: one that is new or empty, unless ``force``."""
    check_folder(path, option)
    if os.path.isdir(path) and os.listdir(path) and not force:
        model = " a model" if os.path.isfile(os.path.join(path, "config.json")) else ""
        raise ConfigError(
            f"{option} {path} holds{model or ' files'} already. Choose a new folder, or add --force to replace the model in it "
            "(its weights, configuration and tokenizer; other files stay)."
        )


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str, patch: PatchContent | None = None
) -> Path:
    """Write a model and its tokenizer into a folder, complete or not at all; weights that lie there already go.

    With ``patch``, which the model carries, the folder holds a model card, and a record by which ``kedit patch revert`` takes the
    patch away again.

    Raises:
        ConfigError: the folder cannot be written.
    """
    from kedit.patch.card import BESIDE, CARD, is_card
    from kedit.patch.checkpoint.manifest import Entry, appended, write_record
    from kedit.utils.folders import partial_folder, replace_folder

    target = Path(os.path.realpath(folder))  # a link to a folder stays one
    try:
        with partial_folder(target) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            if patch is not None and patch.deltas:
                base = Path(str(getattr(model.config, "_name_or_path", "") or os.devnull))
                write_record(new, appended(base, [patch]) if base.is_dir() else [Entry.of(patch, 1)])
                if (target / CARD).is_file() and not is_card(target / CARD):  # somebody's own, which stays
                    os.replace(new / CARD, new / BESIDE)
            replace_folder(new, target, stale=_is_part_of_a_model)
    except OSError as error:
        raise ConfigError(f"Cannot write the model to {folder}: {error}. Choose another folder.") from error
    return Path(folder)


def _is_part_of_a_model(name: str) -> bool:
    """Return whether a file holds weights, or says how they are loaded: beside another model's it would be read with it."""
    ends = (".safetensors", ".bin", ".index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack")
    return name.endswith(ends) or name in ("kedit.json", "generation_config.json", "chat_template.jinja")


def load_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the options name, on the GPU where there is one and nothing else is said."""
    import torch

    from kedit.loading import load

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.device_map is not None:
        if args.device is not None:
            raise ConfigError("--device and --device-map both place the model. Give one of them.")
        if args.model is None:
            raise ConfigError("--device-map places a model that is given by --model; the embedded one is small.")
        return load(args.model, dtype=dtype, device_map=args.device_map)
    device = _device(args)
    try:
        if args.model is not None and device.type != "cpu":
            return load(args.model, dtype=dtype, device_map={"": str(device)})
        model, tokenizer = load(args.model, dtype=dtype)
        placed: Any = model
        return placed.to(device), tokenizer
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The model does not fit into the memory of {device}. Give --device-map auto, --dtype bfloat16, or --device cpu."
        ) from error


def _gamma(text: str) -> float | str:
    """γ as it is typed."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _device(args: argparse.Namespace) -> torch.device:
    """The one device that the options name; of several processes, each has its own GPU."""
    import torch

    from kedit.utils import distributed

    if args.device is None:
        return torch.device(distributed.device() or "cpu")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"--device {args.device} cannot be used ({reason}). Give cpu, or a GPU that is there: cuda:0."
        ) from error
    return device


def add_chat(parser: argparse.ArgumentParser, what: str) -> None:
    """--chat, --system; ``what`` says which prompts are messages then."""
    parser.add_argument(
        "--chat", action="store_true", help=f"put {what} into the model's chat template, as a user's message"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")


def check_chat(args: argparse.Namespace) -> None:
    """Raise where there is a system message and no chat."""
    if args.system is not None and not args.chat:
        raise ConfigError("--system is the system message of a chat. Add --chat.")


def chat_tokens(tokenizer: PreTrainedTokenizerBase, question: str, system: str | None = None) -> tuple[int, ...] | None:
    """A question in the model's chat template, up to where the model answers; ``None`` without a template."""
    from kedit.prompts.chat import has_template, in_template

    if not has_template(tokenizer):
        return None
    return tuple(tokenizer(in_template(tokenizer, question, system), add_special_tokens=False)["input_ids"])


def overrides(items: list[str], option: str = "--set") -> dict[str, Any]:
    """``KEY=VALUE`` options as hyper-parameters: numbers, lists of them, True, False, None; else text."""
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} needs KEY=VALUE, found {item!r}.")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if not isinstance(value, bool | int | float | str | list | tuple | None):
            raise ConfigError(f"{option} {key} is a number, a text or a list like [3,4], not {text}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    return values


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def settings_path(result: str) -> Path:
    """Where the settings of a run are written: beside the file that is its result, ``edit.config.yaml`` of ``edit.safetensors``."""
    path = Path(result)
    return path.with_name(f"{path.stem}.config.yaml")


def keep_settings(args: argparse.Namespace, path: Path, editor: Any = None, regularizers: Sequence[Any] = ()) -> str:
    """Write the settings of a run, those of its editor and regularizers as they were used; returns a line that says so."""
    from kedit.cli.config import write_settings

    used = None
    if editor is not None:
        call = editor.describe_call(list(regularizers))
        used = dict(call["config"])
        for name, fields in zip(args.regularizer or [], call["regularizers"], strict=False):
            prefix = name.rpartition(":")[2]
            used |= {f"{prefix}.{key}": value for key, value in fields.items() if key not in ("name", "class")}
    return f"settings: {write_settings(path, args, used)}"


def save_figures(folder: str, drawn: Mapping[str, Figure]) -> list[Path]:
    """Write figures as PNG files, by name."""
    from kedit.report import figures

    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return [figures.save(figure, target / f"{name}.png") for name, figure in drawn.items()]
    except OSError as error:
        raise ConfigError(f"Cannot write figures to {folder}: {error}. Choose another folder.") from error


def make_regularizers(args: argparse.Namespace) -> list[Any]:
    """The regularizers that the options name."""
    from kedit.regularizers import make, takes_gamma

    names = args.regularizer or []
    if args.gamma is not None and not any(takes_gamma(name) for name in names):
        raise ConfigError("--gamma belongs to a regularizer that has a γ. Add --regularizer sadr.")
    shared = {} if args.gamma is None else {"gamma": args.gamma}
    fields: dict[str, dict[str, Any]] = {name: dict(shared) if takes_gamma(name) else {} for name in names}
    for key, value in overrides(args.set).items():
        prefix, dot, field = key.partition(".")
        if dot:
            named = [name for name in names if prefix.lower() in (name.lower(), name.rpartition(":")[2].lower())]
            if not named:
                raise ConfigError(
                    f"--set {key} is a field of the regularizer {prefix}, which is not used. Add --regularizer {prefix}."
                )
            fields[named[0]][field] = value
    return [make(name, **fields[name]) for name in names]


def choose_editor(args: argparse.Namespace) -> tuple[type[Editor], dict[str, Any]]:
    """The editor's class and hyper-parameters that the options name; asks for no model, so it can be called first."""
    from kedit.editors import editor_class

    kind = editor_class(args.editor or EDITOR)
    given = {key: value for key, value in overrides(args.set).items() if "." not in key}
    known = kind.Config.field_names()
    for name in given:
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no hyper-parameter {name!r}. It has {', '.join(sorted(known))}.")
    return kind, given


def make_editor(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The editor that the options name."""
    from kedit.editors.value_editor import ValueEditor
    from kedit.keys.estimate import estimate_moments
    from kedit.models import ModelArch

    kind, given = choose_editor(args)
    contexts: Any = "mixed" if args.contexts == "mixed" else None
    made: Any = kind(model, tokenizer, contexts=contexts, preset=args.preset, **given)
    if args.moments_corpus and isinstance(made, ValueEditor):  # FT reads none
        layers = made.moment_layers
        made.moments = estimate_moments(ModelArch(model), tokenizer, layers, args.moments_corpus)
    return made
