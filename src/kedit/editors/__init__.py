"""The editing methods."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kedit.errors import ConfigError
from kedit.utils.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.editors.base import Editor as Editor
    from kedit.editors.value_editor import ValueEditor as ValueEditor

EDITORS: Registry[type[Editor]] = Registry(
    "editor",
    {
        "rome": "kedit.editors.rome:ROME",
        "rrome": "kedit.editors.rome:RROME",
        "memit": "kedit.editors.memit:MEMIT",
        "pmet": "kedit.editors.pmet:PMET",
        "emmet": "kedit.editors.emmet:EMMET",
        "alphaedit": "kedit.editors.alphaedit:AlphaEdit",
        "ft": "kedit.editors.ft:FT",
    },
)


_BASES = {"Editor": "kedit.editors.base", "ValueEditor": "kedit.editors.value_editor"}


def __getattr__(name: str) -> Any:
    if name in _BASES:  # imported when first used: they load torch
        return getattr(importlib.import_module(_BASES[name]), name)
    raise AttributeError(f"module 'kedit.editors' has no attribute {name!r}")


def editor_class(name: str) -> type[Editor]:
    """The class of an editor by name.

    Raises:
        UnknownNameError: there is none; the nearest known name is given.
        ConfigError: what is registered under the name is no editor.
    """
    from kedit.editors.base import Editor

    kind: object = EDITORS[name]
    if not (isinstance(kind, type) and issubclass(kind, Editor)):
        raise ConfigError(f"The editor {name!r} is {kind!r}, which is no class that derives from kedit.Editor.")
    return kind


def get_editor(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **config: Any) -> Editor:
    """An editor by name; raises as :func:`editor_class`."""
    return editor_class(name)(model, tokenizer, **config)


def from_provenance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, provenance: Mapping[str, Any], **options: Any
) -> Editor:
    """Make the editor again that made a patch (:meth:`kedit.Editor.from_provenance`), its class found by the name there."""
    return editor_class(str(provenance.get("editor"))).from_provenance(model, tokenizer, provenance, **options)
