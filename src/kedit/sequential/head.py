"""The header of a journal, by which a run that goes on is checked to be the same."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.editors.key_history import KeyHistory
from kedit.editors.value_editor import ValueEditor
from kedit.errors import PatchError, PatchMismatchError
from kedit.evaluation.guard import Guard
from kedit.models.fingerprint import model_fingerprint, tensor_fingerprint
from kedit.regularizers import Choice, describe, resolve
from kedit.sequential.folder import HEADER, START, is_begun, write_json
from kedit.utils.files import parse_json, reading

if TYPE_CHECKING:
    from kedit.editors.base import Editor

FORMAT = "kedit-journal"
_WORDS = {
    "budget": "another budget of tokens per wave (editor.engine.budget)",
    "keys": "other keys of earlier edits (editor.history)",
}


def begin(where: Path, editor: Editor, regularizer: Choice, guard: Guard | None, batch_size: int) -> None:
    """Write down what the run is, or check that it is the one that was begun; with the keys that it began with."""
    history, known, restored = _history(editor), _read(where), False
    if history is not None and history.layers and known is None:
        history.save(where / START)  # before the head, which makes the folder a journal
    if history is not None and not history.layers and known and known.get("keys") and (where / START).exists():
        history.load(where / START)
        restored = True
    try:
        header = _header(editor, regularizer, guard, batch_size)
        if known is None:
            write_json(where / HEADER, header)
        else:
            _check(where, known, header)
    except BaseException:
        if history is not None and restored:
            history.clear()
        raise


def _history(editor: Editor) -> KeyHistory | None:
    """The keys of earlier edits, where the editor remembers any."""
    history = getattr(editor, "history", None)
    return history if isinstance(history, KeyHistory) else None


def _header(editor: Editor, regularizer: Choice, guard: Guard | None, batch_size: int) -> dict[str, Any]:
    """Settings that must be the same when a run goes on, as JSON."""
    moments = editor.moments if isinstance(editor, ValueEditor) else {}
    history = _history(editor)
    keys = {} if history is None else {str(layer): history.keys(layer, 0) for layer in history.layers}
    limits = None if guard is None else {name: getattr(guard, name) for name in Guard.limits()}
    if guard is not None and limits is not None:
        limits["texts"] = list(guard.texts_for(editor.model))
        limits["cases"] = [case.to_dict() for case in guard.cases]
    header = {
        "format": FORMAT,
        "format_version": 1,
        "kedit_version": version("kedit"),
        "model": model_fingerprint(editor.model),
        "editor": editor.name,
        "config": editor.config.to_dict(),
        "regularizers": [describe(item) for item in resolve(regularizer)],
        "contexts": list(editor.contexts),
        "moments": {str(layer): tensor_fingerprint(moments[layer].matrix) for layer in moments},
        "keys": {layer: tensor_fingerprint(matrix) for layer, matrix in keys.items()},
        "batch_size": batch_size,
        "budget": editor.engine.budget,
        "guard": limits,
    }
    record: dict[str, Any] = json.loads(json.dumps(header))
    return record


def _read(where: Path) -> dict[str, Any] | None:
    """The head of a journal; ``None`` where none is begun."""
    path = where / HEADER
    if not is_begun(where):
        return None
    with reading(path):
        known = parse_json(path.read_bytes(), str(path))
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise PatchError(f"{path} is not the head of a kedit journal. Name a new folder for the journal.")
    return known


def _check(where: Path, known: dict[str, Any], header: dict[str, Any]) -> None:
    """Raise unless the run is the one that was begun."""
    if known.get("model") != header["model"]:
        raise PatchMismatchError(
            f"The model is not the one that the journal {where} began with. Load that model, unedited, to go on."
        )
    other = [key for key in header if key != "kedit_version" and known.get(key) != header[key]]
    if other:
        words = [_WORDS.get(key, f"another {key}") for key in other]
        raise PatchError(
            f"The journal {where} was begun with {', '.join(words)}, so going on would not give the same result. "
            "Use the same settings, or a new folder."
        )
