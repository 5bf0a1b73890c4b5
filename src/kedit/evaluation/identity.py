"""What makes two runs the same run: everything that a figure of theirs depends on, as hashes."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kedit.arch import ModelArch
from kedit.arch.placement import offloaded
from kedit.editors.base import Editor
from kedit.fingerprint import model_fingerprint, tensor_fingerprint
from kedit.history import KeyHistory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, Any]:
    """The code that the figures come from."""
    return {"kedit": version("kedit")}


def describe_weights(model: PreTrainedModel) -> str:
    """A hash of the configuration and of every stored tensor, edited or not, wherever accelerate keeps it."""
    inner = ModelArch(model).model
    away = {
        f"{path}.{leaf}": found.read()
        for path, module in inner.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and (found := offloaded(module, leaf)) is not None
    }
    if not away:
        return model_fingerprint(inner)
    held = {**inner.state_dict(), **away}
    about = {key: repr(value) for key, value in inner.config.to_dict().items() if not key.startswith("_")}
    return digest([about, {name: tensor_fingerprint(tensor) for name, tensor in held.items()}])


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
