"""What makes two runs the same run: everything that a figure of theirs depends on, as hashes."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from kedit.editors.base import Editor
from kedit.fingerprint import tensor_fingerprint
from kedit.history import KeyHistory


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, Any]:
    """The code that the figures come from."""
    return {"kedit": version("kedit")}


def describe_editor(editor: Editor | None) -> dict[str, Any]:
    """An editor by name, and what it reads beside the model; contexts and second moments are made where missing."""
    if editor is None:
        return dict.fromkeys(("editor", "contexts", "moments", "history"))
    moments = editor.moments if editor.needs_moments else {}
    history = getattr(editor, "history", None)
    keys = history.keys if isinstance(history, KeyHistory) and history.count else None
    return {
        "editor": editor.name,
        "contexts": digest(list(editor.contexts)),
        "moments": {str(layer): tensor_fingerprint(moments[layer].matrix) for layer in moments},
        "history": keys and {str(layer): tensor_fingerprint(keys(layer, 0)) for layer in editor.config.layers},
    }
