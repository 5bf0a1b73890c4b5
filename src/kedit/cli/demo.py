"""Edit one fact with ROME, without and with SADR, and show the effects: in the embedded model or in your own.

Prints the model's answers before and after, draws its attention, saves the patch, reverts the edit and checks that every
weight is bit-identical to the original.

Examples:
  kedit demo
  kedit demo --model ./my-model
  kedit demo --model model.gguf --target-new Berlin --moments-corpus text.txt
  kedit demo --model ./my-model --prompt "{} plays the" --subject "Miles Davis" --target-new violin --question "What did he play?"
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.cli import common
from kedit.errors import CaptureError, ConfigError, KEditError
from kedit.utils.progress import logger
from kedit.utils.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.edit import Edit
    from kedit.editors.value_editor import ValueEditor
    from kedit.evaluation.cases import EditCase

HELP = "edit one fact and show the effects"

PROMPT, SUBJECT, TARGET = "{} is located in the city of", "The Eiffel Tower", "Rome"
PROBES = {
    "paraphrase": "To see the Eiffel Tower, fly to",
    "neighbour": "The Louvre is located in the city of",
    "question": "In which city is the Eiffel Tower?",
}
KEYS_PER_DIMENSION = 20  # of the default text, which says the same things again and again
OUT, FILES = "kedit-demo", ("attention.png", "edit.safetensors")
TEXT_TOKENS, CHAT_TOKENS = 12, 24
WIDTH = 100


@dataclass(frozen=True)
class Question:
    """A row of the table: a prompt, and how to recognise the answer that is hoped for.

    Attributes:
        label: what it tests.
        shown: the prompt as it is printed.
        ids: its tokens.
        wanted: text that the answer should hold; empty: nothing is marked.
        length: new tokens at most.
    """

    label: str
    shown: str
    ids: tuple[int, ...]
    wanted: str = ""
    length: int = TEXT_TOKENS


@dataclass
class Scene:
    """Holds what the demo edits, asks and shows.

    Attributes:
        title: the first line of the output.
        edit: the fact to write.
        questions: rows of the table.
        answer: what the model says to a question, and whether that is the wanted answer.
        watched: the question whose attention is drawn.
        notes: printed below the table.
    """

    title: str
    edit: Edit
    questions: list[Question]
    answer: Callable[[Question], tuple[str, bool]]
    watched: Question
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    common.add_model(parser)
    parser.add_argument("--out", metavar="DIR", help=f"folder for picture and patch (default: {OUT})")
    parser.add_argument("--force", action="store_true", help="overwrite picture and patch in the folder --out")
    parser.add_argument("--case", type=int, metavar="N", help="fact of the embedded model to edit, 0-99 (default: 10)")
    own = parser.add_argument_group("with --model")
    own.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f"sentence up to the target, with {{}} for the subject (default: {PROMPT!r})",
    )
    own.add_argument("--subject", metavar="TEXT", help=f"subject of the fact (default: {SUBJECT})")
    own.add_argument("--target-new", metavar="TEXT", help=f"new target (default: {TARGET})")
    own.add_argument("--paraphrase", metavar="TEXT", help="paraphrase of the prompt, up to the target")
    own.add_argument("--neighbour", metavar="TEXT", help="the same relation of another subject, up to its answer")
    own.add_argument("--question", metavar="TEXT", help="question about the fact, for chat models")
    own.add_argument("--gamma", type=float, help="γ of SADR (default: the preset, or none is needed)")
    own.add_argument(
        "--moments-corpus",
        metavar="FILE",
        help="text for the second moments: text or JSONL file (default: the text of the embedded model, which needs no network)",
    )


def run(args: argparse.Namespace) -> int:
    """Edit, show, save, revert."""
    import kedit
    from kedit.models.fingerprint import model_fingerprint

    _check(args)
    out = Path(args.out or OUT)
    common.check_folder(str(out), "--out", FILES, force=args.force or args.out is None)
    write = sys.stdout.write
    if args.model is None:
        case = _case(args.case)
        model, tokenizer = common.load_model(args)
        editor, sadr = kedit.ROME(model, tokenizer), kedit.SADR()
        scene = _embedded_scene(case, model, tokenizer)
        write(scene.title)
    else:
        edit = kedit.Edit(args.prompt or PROMPT, args.subject or SUBJECT, args.target_new or TARGET)
        model, tokenizer = common.load_model(args)
        editor = kedit.ROME(model, tokenizer)
        scene = _own_scene(args, edit, model, tokenizer)
        write(scene.title)
        sadr = kedit.SADR(gamma=args.gamma)
        scene.notes += give_moments(editor, args.moments_corpus)
    untouched = model_fingerprint(model)

    answers = {"before": [scene.answer(question) for question in scene.questions]}
    attention = {"before": attention_rows(model, scene.watched.ids)}
    for stage, regularizer in (("ROME", None), ("ROME + SADR", sadr)):
        if args.model is not None:
            logger.info("Editing with %s.", stage)
        result = editor.apply(scene.edit, regularizer)
        answers[stage] = [scene.answer(question) for question in scene.questions]
        attention[stage] = attention_rows(model, scene.watched.ids)
        patch = result.patch
        result.revert()
    saved = patch.save(out / FILES[1])
    picture = _draw(out / FILES[0], tokenizer, scene.watched, attention)
    write(_table(scene.questions, answers))
    write("\n" + "".join(f"{line}\n" for note in scene.notes for line in textwrap.wrap(note, _width())) + "\n")
    if picture is not None:
        write(f"picture  {printable(str(picture))}: where the last token looks, before and after\n")
    write(f"patch    {printable(str(saved))}: ROME + SADR, {saved.stat().st_size / 1024:.0f} KiB\n")
    if model_fingerprint(model) != untouched:
        raise KEditError("The model is not what it was before the edits. This is a bug: please report it.")
    write("revert   the model is bit-identical to what it was before\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise where options for the one model are given with the other."""
    own = ("prompt", "subject", "target_new", "paraphrase", "neighbour", "question", "gamma", "moments_corpus")
    given = [f"--{name.replace('_', '-')}" for name in own if getattr(args, name) is not None]
    if args.model is None and given:
        raise ConfigError(f"{', '.join(given)} can be given with --model; the embedded model's facts go by --case.")
    if args.model is not None and args.case is not None:
        raise ConfigError(
            "--case is a fact of the embedded model. With --model, give --prompt, --subject and --target-new."
        )


def _case(number: int | None) -> EditCase:
    from kedit.embedded import load_world
    from kedit.embedded.cases import world_cases

    number = 10 if number is None else number
    if not 0 <= number < 100:
        raise KEditError(f"--case is a number from 0 to 99, not {number}.")
    return world_cases(load_world(), "dev", 100)[number]


def _embedded_scene(case: EditCase, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scene:
    """The fact, a paraphrase, a neighbour with and without the edited sentence before it, another relation."""
    from kedit.evaluation.cases import Kind, distracted

    edit = case.edit
    first = {probe.kind: probe for probe in reversed(case.probes)}
    other = first[Kind.RELATION]
    asked = [
        ("the fact", first[Kind.REWRITE]),
        ("paraphrase", first[Kind.PARAPHRASE]),
        ("neighbour", first[Kind.NEIGHBOUR]),
        ("distracted", first[Kind.DISTRACTED]),
        ("other fact", other),
        ("distracted other", distracted(edit, other)),
    ]
    questions = [
        Question(label, probe.prompt, tuple(tokenizer(probe.prompt)["input_ids"]), probe.right or "")
        for label, probe in asked
    ]

    def answer(question: Question) -> tuple[str, bool]:
        said, probability = _sentence(model, tokenizer, question.ids)
        return f"{said} {100 * probability:.0f}%", said == question.wanted

    title = f"The edit: {edit.text!r} → {edit.target_new!r} instead of {edit.target_true!r}. (An invented world.)\n\n"
    note = "✓ marks the wanted answer. The distracted prompt is the neighbour's, after the edited sentence."
    return Scene(title, edit, questions, answer, questions[3], [note])


def _own_scene(
    args: argparse.Namespace, edit: Edit, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scene:
    """The fact as plain text, a paraphrase, a question to the chat, a neighbour with and without the edited sentence."""
    from kedit.models import ModelArch
    from kedit.prompts.decode import continue_rows

    arch, notes = ModelArch(model), []
    usual = args.prompt is None and args.subject is None
    probes = {name: getattr(args, name) or (text if usual else "") for name, text in PROBES.items()}

    def plain(label: str, text: str, wanted: str) -> Question:
        return Question(label, text, tuple(tokenizer(text)["input_ids"]), wanted)

    def said(question: Question) -> str:
        [(text, ended)] = continue_rows(arch, tokenizer, [question.ids], question.length)
        return " ".join(text.split()) + ("" if ended else " …")

    def answer(question: Question) -> tuple[str, bool]:
        text = said(question)
        return text, bool(question.wanted) and _holds(text, question.wanted)

    questions = [plain("plain text", edit.text, edit.target_new)]
    if probes["paraphrase"]:
        questions.append(plain("paraphrase", probes["paraphrase"], edit.target_new))
    if probes["question"]:
        ids = common.chat_tokens(tokenizer, probes["question"])
        if ids is None:
            notes.append("The tokenizer has no chat template, so the question is left out.")
        else:
            questions.append(Question("chat", probes["question"], ids, edit.target_new, CHAT_TOKENS))
    if probes["neighbour"]:
        asked = plain("neighbour", probes["neighbour"], "")
        asked = replace(asked, wanted=_first_word(said(asked)))
        stated = f"{edit.text} {edit.target_new}. {probes['neighbour']}"
        questions += [asked, plain("distracted neighbour", stated, asked.wanted)]
    left_out = [name for name, text in probes.items() if not text]
    if left_out:
        notes.append(f"Left out, as the edit is your own: {', '.join(f'--{name}' for name in left_out)}.")
    notes.insert(
        0,
        "✓ marks the new target, and for a neighbour the word with which the model began its answer before the edit. Greedy "
        "continuations; … where they are cut.",
    )
    title = f"The edit: {edit.text!r} → {edit.target_new!r}. (Model: {printable(str(args.model))})\n\n"
    return Scene(title, edit, questions, answer, questions[-1], notes)


def _first_word(text: str) -> str:
    word = re.search(r"\w+", text)
    return word[0] if word else ""


def _holds(text: str, wanted: str) -> bool:
    """Return whether words stand in a text, whole."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None


def give_moments(editor: ValueEditor, corpus: Any = None) -> list[str]:
    """Estimate the second moments from the text that is given, or from one that needs no network; return a note on the latter."""
    from kedit.embedded.defaults import corpus as invented
    from kedit.keys.estimate import estimate_moments

    layers, tokens, notes = editor.config.layers, None, []
    if corpus is None:
        corpus, tokens = invented(), KEYS_PER_DIMENSION * max(map(editor.arch.memory_width, layers))
        notes.append(
            "The second moments come from the embedded model's text, a small invented world, so that no network is needed. For an "
            "edit to keep, give text like the model's own with --moments-corpus FILE."
        )
    editor.moments = estimate_moments(editor.arch, editor.tokenizer, layers, corpus, tokens=tokens)
    return notes


def _sentence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> tuple[str, float]:
    """Continue a text up to the full stop, word by likeliest word; also return how likely each is."""
    import torch

    ids, probability = list(prompt), 1.0
    for _ in range(8):
        with torch.no_grad():
            step = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu().softmax(-1).max(-1)
        if str(tokenizer.decode([int(step.indices)])).strip() in (".", ""):
            break
        probability *= float(step.values)
        ids = [*ids, int(step.indices)]
    return str(tokenizer.decode(ids[len(prompt) :])).strip(), probability


def _width() -> int:
    return min(WIDTH, max(60, shutil.get_terminal_size((WIDTH, 24)).columns))


def _table(questions: Sequence[Question], answers: Mapping[str, Sequence[tuple[str, bool]]]) -> str:
    """A prompt on a line of its own, and below it one column per stage: the answer, and whether it is the one wanted."""
    width = _width()
    column = (width - 2) // len(answers) - 2
    lines = ["".join(f"  {'':2}{stage:<{column - 2}}" for stage in answers).rstrip(), "─" * width]
    for number, question in enumerate(questions):
        asked = f"{question.label}: {printable(question.shown)}"
        lines += textwrap.wrap(asked, width, subsequent_indent=" " * (len(question.label) + 2))
        cells = []
        for said in answers.values():
            text, wanted = said[number]
            cells.append(textwrap.wrap(printable(text), column - 2) or [""])
            cells[-1] = [("✓ " if wanted and not row else "  ") + line for row, line in enumerate(cells[-1])]
        for row in range(max(map(len, cells))):
            parts = [cell[row] if row < len(cell) else "" for cell in cells]
            lines.append("".join(f"  {part:<{column}}" for part in parts).rstrip())
    return "\n".join(lines) + "\n"


def attention_rows(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor | None:
    """The last token's attention, the highest of the heads in every block: [L, T]; ``None`` where it cannot be read."""
    import torch

    from kedit.capture import capture_attention
    from kedit.models import ModelArch

    device = ModelArch(model).input_device
    ids = torch.tensor([list(tokens)], device=device)
    last = torch.tensor([[ids.shape[1] - 1]], device=device)
    try:
        with torch.no_grad(), capture_attention(model, last) as capture:
            model(ids)
            return torch.stack([capture.rows[layer][0, :, 0].amax(0).cpu() for layer in sorted(capture.rows)])
    except CaptureError as error:
        logger.info("The attention of this model is not drawn: %s", error)
        return None


def _draw(
    path: Path, tokenizer: PreTrainedTokenizerBase, question: Question, attention: Mapping[str, Tensor | None]
) -> Path | None:
    """One heat map per stage: blocks down, tokens across."""
    stages = {stage: rows for stage, rows in attention.items() if rows is not None}
    if len(stages) < len(attention):
        return None
    try:
        import matplotlib
    except ImportError:
        sys.stderr.write("No picture: matplotlib is not installed (pip install 'kedit[plot]').\n")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [printable(str(tokenizer.decode([token]))).replace("$", r"\$") for token in question.ids]
    figure, axes = plt.subplots(len(stages), 1, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, (stage, rows) in zip(axes, stages.items(), strict=True):
        image = axis.imshow(rows.float().numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(stage, loc="left")
        axis.set_ylabel("block")
        axis.set_yticks(range(0, len(rows), max(1, len(rows) // 8)))
    axes[-1].set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor")
    figure.colorbar(image, ax=axes, label="attention of the last token (highest head)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
