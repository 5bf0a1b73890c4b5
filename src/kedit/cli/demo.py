"""Edit one fact of the embedded model, with ROME alone and with SADR, and look at what happens.

Prints what the model says before and after, draws where its attention goes, saves the patch, takes the edit back and
checks that every weight is what it was, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.errors import KEditError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.testbed.cases import WorldCase

HELP = "edit a fact of the embedded model and look at what happens"


@dataclass(frozen=True)
class Question:
    """A row of the table: a prompt, and the answer that the edited model should give."""

    label: str
    prompt: str
    wanted: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", metavar="DIR", default="kedit-demo", help="where picture and patch go")
    parser.add_argument("--case", type=int, default=10, metavar="N", help="which fact to edit (0-99)")


def run(args: argparse.Namespace) -> int:
    """Edit, show, save, revert."""
    import kedit
    from kedit.fingerprint import model_fingerprint

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KEditError(f"Cannot write to the folder {out}: {error}.") from error
    case = _case(args.case)
    model, tokenizer = kedit.load()
    questions = _questions(case)
    distracted = next(question for question in questions if question.label == "distracted")
    edit = kedit.Edit(case.prompt, case.subject, case.target_new, case.target_true)
    untouched = model_fingerprint(model)
    write = sys.stdout.write
    write(f"The edit: {edit.text!r} → {edit.target_new!r} instead of {edit.target_true!r}. (An invented world.)\n\n")

    answers = {"before": [_answer(model, tokenizer, question.prompt) for question in questions]}
    attention = {"before": _attention(model, tokenizer, distracted.prompt)}
    editor = kedit.ROME(model, tokenizer)
    for stage, regularizer in (("ROME", None), ("ROME + SADR", "sadr")):
        result = editor.apply(edit, regularizer)
        answers[stage] = [_answer(model, tokenizer, question.prompt) for question in questions]
        attention[stage] = _attention(model, tokenizer, distracted.prompt)
        patch = result.patch
        result.revert()
    write(_table(questions, answers))
    write("\n✓ marks the wanted answer. The distracted prompt is the neighbour's, after the edited sentence.\n\n")
    picture = _draw(out / "attention.png", tokenizer, distracted.prompt, attention)
    if picture is not None:
        write(f"picture  {picture}: where the last token looks, before and after\n")
    saved = patch.save(out / "edit.safetensors")
    write(f"patch    {saved}: ROME + SADR, {saved.stat().st_size / 1024:.0f} KiB\n")
    if model_fingerprint(model) != untouched:
        raise KEditError("The model is not what it was before the edits. This is a bug: please report it.")
    write("revert   the model is bit-identical to what it was before\n")
    return 0


def _case(number: int) -> WorldCase:
    from kedit import testbed

    if not 0 <= number < 100:
        raise KEditError(f"--case is a number from 0 to 99, not {number}.")
    return list(testbed.load_world().edits("dev", 100))[number]


def _questions(case: WorldCase) -> list[Question]:
    """The fact, a paraphrase, a neighbour with and without the edited sentence before it, another relation."""
    neighbour, other = case.neighbours[0], case.relations[0]
    stated = f"{case.prompt.replace('{}', case.subject)} {case.target_new}."
    return [
        Question("the fact", case.prompt.replace("{}", case.subject), case.target_new),
        Question("paraphrase", case.paraphrases[0].text, case.target_new),
        Question("neighbour", neighbour.text, neighbour.right),
        Question("distracted", f"{stated} {neighbour.text}", neighbour.right),
        Question("other fact", other.text, other.right),
        Question("distracted other", f"{stated} {other.text}", other.right),
    ]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, float]:
    """What the model says up to the full stop, word by likeliest word, and how likely that is."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    count, probability = len(ids), 1.0
    for _ in range(8):
        with torch.no_grad():
            step = model(torch.tensor([ids])).logits[0, -1].float().softmax(-1).max(-1)
        if str(tokenizer.decode([int(step.indices)])).strip() in (".", ""):
            break
        probability *= float(step.values)
        ids = [*ids, int(step.indices)]
    return str(tokenizer.decode(ids[count:])).strip(), probability


def _table(questions: Sequence[Question], answers: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """Prompts down, stages across: the answer, its probability, and whether it is the one wanted."""
    rows = [["", "prompt", *answers]]
    for number, question in enumerate(questions):
        said = [answers[stage][number] for stage in answers]
        cells = [f"{text} {100 * p:.0f}%{' ✓' if text == question.wanted else ''}" for text, p in said]
        rows.append([question.label, question.prompt, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]]) + "\n"


def _attention(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """The last token's attention, the highest of the heads in every block: [L, T]."""
    import torch

    from kedit.capture import capture_attention

    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad(), capture_attention(model, torch.tensor([[ids.shape[1] - 1]])) as capture:
        model(ids)
        return torch.stack([capture.rows[layer][0, :, 0].amax(0) for layer in sorted(capture.rows)])


def _draw(path: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, attention: Mapping[str, Tensor]) -> Path | None:
    """One heat map per stage: blocks down, tokens across."""
    try:
        import matplotlib
    except ImportError:
        sys.stderr.write("No picture: matplotlib is not installed (pip install 'kedit[plot]').\n")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [tokenizer.decode([token]) for token in tokenizer(prompt)["input_ids"]]
    figure, axes = plt.subplots(len(attention), 1, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, (stage, rows) in zip(axes, attention.items(), strict=True):
        image = axis.imshow(rows.float().numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(stage, loc="left")
        axis.set_ylabel("block")
        axis.set_yticks(range(len(rows)))
    axes[-1].set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor")
    figure.colorbar(image, ax=axes, label="attention of the last token (highest head)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
