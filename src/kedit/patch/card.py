"""Model cards: README.md beside patches, adapters and edited models, written from the patches' provenance."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from kedit.patch.describe import base_model, made_by
from kedit.prompts.predictions import Prediction, percent
from kedit.utils.terminal import printable

CARD, EARLIER, BESIDE = "README.md", "README.before-edit.md", "README.kedit.md"
PATCH_FILE = "edit.safetensors"
EMBEDDED = "kedit-embedded"  # the name of the model that kedit.load() gives
_MARK = "<!-- model card written by kedit -->"
_MOST = 50  # edits, and weights, that are listed
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_MARKUP = re.compile(r"([\\`*_\[\]|~#!])")

Kind = Literal["patch", "adapter", "model"]
_LIBRARY = {"patch": "kedit", "adapter": "peft", "model": "transformers"}
_RELATION = {"patch": "adapter", "adapter": "adapter", "model": "finetune"}
_WHAT = {
    "patch": f"`{PATCH_FILE}` holds weight updates that change facts in a language model. The base model is not part of it.",
    "adapter": "This LoRA adapter changes facts in a language model. The base model is not part of it.",
    "model": "This model is the base model with some of its weights changed, so that it says other facts.",
}


def model_card(
    provenances: Sequence[Mapping[str, Any]],
    weights: Sequence[str],
    kind: Kind = "patch",
    *,
    repo: str | None = None,
    files: Sequence[str] = (),
) -> str:
    """Write what was edited, with which result, how to use it and how to undo it, as Markdown with the hub's metadata.

    Args:
        provenances: of the patches, in order.
        weights: names of the weights that they change.
        kind: what the card lies beside.
        repo: its name on the hub, if it has one.
        files: of a model: the patches that its folder keeps.
    """
    parts = [part for known in provenances for part in _parts(known)]
    rows = [row for part in parts for row in _rows(part)]
    base: Mapping[str, Any] = next(
        (known["model"] for known in provenances if isinstance(known.get("model"), dict)), {}
    )
    name = str(base.get("name") or "")
    lines = ["---", _metadata(name, kind, parts).rstrip(), "---", _MARK, "", f"# {_title(rows, kind)}", "", _WHAT[kind]]
    lines += ["", "## What was edited", "", *_table(rows)]
    lines += ["", "## How it was made", "", f"- {_plain(base_model(base))}"]
    lines += [f"- {_plain(text)}" for text in dict.fromkeys(made_by(part) for part in parts)]
    lines += _scores(parts)
    lines.append(f"- changed weights: {', '.join(f'`{name}`' for name in weights[:_MOST])}" + _more(len(weights)))
    lines += ["", "## Use", "", *_use(kind, name, repo), "", "## Undo", "", *_undo(kind, files)]
    lines += [
        "",
        "## Limits",
        "",
        "The figures above are about the prompts above only. Editing a fact can change answers to other prompts too, above all to "
        "those that mention the subject. Measure it on your own prompts with `kedit eval`.",
        "",
        f"Written by kedit {version('kedit')} from the provenance of the edit.",
    ]
    return "\n".join(lines) + "\n"


def write_card(folder: Path, text: str) -> None:
    """Write a card into a new folder; a README.md that came from the base stays under the name README.before-edit.md."""
    if (folder / CARD).is_file() and not is_card(folder / CARD):
        os.replace(folder / CARD, folder / EARLIER)
    (folder / CARD).write_text(text, encoding="utf-8")


def drop_card(folder: Path) -> None:
    """Remove kedit's card from a folder, and give the README.md that it stood for its name back."""
    if is_card(folder / CARD):
        (folder / CARD).unlink()
        if (folder / EARLIER).is_file():
            os.replace(folder / EARLIER, folder / CARD)


def is_card(path: Path) -> bool:
    """Return whether a file is a card that kedit wrote."""
    return path.is_file() and _MARK.encode() in path.read_bytes()


def _parts(known: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A provenance, or those of what was merged into it."""
    merged = [part for part in _dicts(known, "merged") if part]
    if not merged:
        yield known
    for part in merged:
        yield from _parts(part)


def _dicts(known: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = known.get(key)
    return [item if isinstance(item, dict) else {} for item in items] if isinstance(items, list) else []


def _rows(part: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Prediction | None, Prediction | None]]:
    """Each edit with the model's predictions before and after."""
    edits, states = _dicts(part, "edits"), (_dicts(part, "before"), _dicts(part, "after"))
    for number, edit in enumerate(edits):
        before, after = (Prediction.from_dict(all_[number]) if len(all_) == len(edits) else None for all_ in states)
        yield edit, before, after


def _title(rows: Sequence[tuple[dict[str, Any], Any, Any]], kind: Kind) -> str:
    noun = {"patch": "Edit", "adapter": "Adapter", "model": "Edited model"}[kind]
    if len(rows) == 1:
        edit = rows[0][0]
        return f"{noun}: {_plain(_asked(edit))} → {_plain(edit.get('target_new', '?'))}"
    return f"{noun}: {len(rows)} facts"


def _asked(edit: Mapping[str, Any]) -> str:
    return str(edit.get("prompt", "?")).replace("{}", str(edit.get("subject", "?")))


def _table(rows: Sequence[tuple[dict[str, Any], Prediction | None, Prediction | None]]) -> list[str]:
    if not rows:
        return ["The patches name no edits; they were found as the difference of two models, or made by hand."]
    lines = ["| prompt | subject | new target | before | after |", "|---|---|---|---|---|"]
    for edit, before, after in rows[:_MOST]:
        asked = _plain(_asked(edit)) + (" (in a chat)" if edit.get("in_chat") is True else "")
        cells = [
            asked,
            _plain(edit.get("subject", "?")),
            _plain(edit.get("target_new", "?")),
            _said(before),
            _said(after),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"And {len(rows) - _MOST} more."] if len(rows) > _MOST else []
    known = [(before, after) for _, before, after in rows if before is not None and after is not None]
    if known:
        count = [sum(state.said for state in states) for states in zip(*known, strict=True)]
        lines += [
            "",
            f"By greedy decoding, the edited model says {count[1]} of {len(known)} new targets; the base model says "
            f"{count[0]}. Percentages are the probability of the new target.",
        ]
    return lines


def _said(prediction: Prediction | None) -> str:
    return "–" if prediction is None else f"{_plain(prediction.shown)} ({percent(prediction.probability)})"


def _scores(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [part["scores"] for part in parts if isinstance(part.get("scores"), dict) and part["scores"]]
    figures = [
        ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in item.items())
        for item in scores[:_MOST]
    ]
    return [f"- measured by the guard: {_plain(text)}" for text in figures]


def _more(count: int) -> str:
    return f" and {count - _MOST} more" if count > _MOST else ""


def _use(kind: Kind, name: str, repo: str | None) -> list[str]:
    base = "" if name == EMBEDDED else repr(name or "the base model")
    where = repr(repo or "this folder")
    code = {
        "patch": [
            "import kedit",
            "",
            f"model, tokenizer = kedit.load({base})",
            f"kedit.EditPatch.from_pretrained({where}).apply(model)",
        ],
        "adapter": [
            "import kedit, peft",
            "",
            f"model, tokenizer = kedit.load({base})",
            f"model = peft.PeftModel.from_pretrained(model, {where})",
        ],
        "model": ["import kedit", "", f"model, tokenizer = kedit.load({where})"],
    }[kind]
    return ["```python", *code, "```"]


def _undo(kind: Kind, files: Sequence[str]) -> list[str]:
    if kind == "adapter":
        return [
            "Use the base model without the adapter. An adapter that was merged into weights cannot be unmerged exactly."
        ]
    options = "".join(f" --patch {file}" for file in files) or f" --patch {PATCH_FILE}"
    if kind == "model" and not files:
        return ["Use the base model."]
    lines = (
        ["`patch.revert(model)` restores the weights of a model in memory. For a folder:"] if kind == "patch" else []
    )
    lines += ["Use the base model, or take patches away again, all or some of them:"] if kind == "model" else []
    folder = "EDITED_DIR" if kind == "patch" else "THIS_DIR"
    if kind == "model":
        options = options.replace(" --patch ", " --patch THIS_DIR/")
    return [*lines, "", "```bash", f"kedit patch revert {folder} --base BASE_DIR{options} --out DIR", "```"]


def _metadata(name: str, kind: Kind, parts: Sequence[Mapping[str, Any]]) -> str:
    editors = dict.fromkeys(str(part["editor"]) for part in parts if part.get("editor"))
    content: dict[str, Any] = {"library_name": _LIBRARY[kind]}
    if _HUB_NAME.fullmatch(name):  # the hub refuses a card with another one
        content |= {"base_model": name, "base_model_relation": _RELATION[kind]}
    if kind != "patch":
        content["pipeline_tag"] = "text-generation"
    content["tags"] = ["kedit", "model-editing", "knowledge-editing", *editors]
    return str(yaml.safe_dump(content, sort_keys=False))


def _plain(value: Any) -> str:
    """A text that Markdown and HTML show as it is, in one line."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(" ".join(str(value).split())), quote=False))
