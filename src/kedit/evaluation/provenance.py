"""Origins of metrics: code, model, editor and machine, as hashes and names."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kedit.editors.base import Editor
from kedit.editors.key_history import KeyHistory
from kedit.editors.value_editor import ValueEditor
from kedit.models.fingerprint import tensor_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, Any]:
    """The code that the numbers come from."""
    return {"kedit": version("kedit")}


def describe_editor(editor: Editor | None) -> dict[str, Any]:
    """An editor by name, and what it reads beside the model; contexts and second moments are made where missing."""
    if editor is None:
        return dict.fromkeys(("editor", "contexts", "moments", "history"))
    moments = editor.moments if isinstance(editor, ValueEditor) else {}
    history = getattr(editor, "history", None)
    keys = history.keys if isinstance(history, KeyHistory) and history.count else None
    return {
        "editor": editor.name,
        "contexts": digest(list(editor.contexts)),
        "moments": {str(layer): tensor_fingerprint(moments[layer].matrix) for layer in moments},
        "history": keys and {str(layer): tensor_fingerprint(keys(layer, 0)) for layer in editor.config.layers},
    }


PACKAGES = ("kedit", "torch", "transformers", "accelerate", "numpy")


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """A model by name, type, size and dtype."""
    config = model.config.get_text_config()
    source = str(getattr(model.config, "_name_or_path", "") or "")
    return {
        "name": Path(source).name if Path(source).exists() else source,
        "type": str(config.model_type),
        "num_layers": int(getattr(config, "num_hidden_layers", 0)),
        "hidden": int(getattr(config, "hidden_size", 0)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def environment() -> dict[str, Any]:
    """The machine and the versions of what computes."""
    machine: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["accelerator"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    for package in PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            continue
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
