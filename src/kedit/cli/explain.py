"""What ``--set help`` prints: every hyper-parameter with its default and its explanation, from the classes' docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from kedit.cli import common

WIDTH = 100


def explain(args: argparse.Namespace) -> str:
    """The hyper-parameters of the editor that the options name, and the fields of its regularizers (else of all)."""
    from kedit.editors import editor_class
    from kedit.regularizers import REGULARIZERS, regularizer_class

    name = getattr(args, "editor", None) or common.EDITOR
    editor = editor_class(name)
    parts = [
        f"Hyper-parameters of {name}, for example --set steps=40:",
        *_entries(editor.Config),
    ]
    for name in getattr(args, "regularizer", None) or list(REGULARIZERS):
        kind = regularizer_class(name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            continue
        prefix = name.rpartition(":")[2].lower()
        entries = list(_entries(kind, f"{prefix}."))
        if entries:
            shown = next((field.name for field in dataclasses.fields(kind) if field.init), "field")
            parts += ["", f"Fields of the regularizer {name}, for example --set {prefix}.{shown}=VALUE:", *entries]
    parts += ["", "A model's preset or rule sets some of them (docs/defaults.md); the patch records what was used."]
    return "\n".join(parts)


def _entries(kind: type, prefix: str = "") -> Iterator[str]:
    known = explanations(kind)
    for field in dataclasses.fields(kind):
        if field.init:
            yield f"  {prefix}{field.name} ({_default(field)})"
            text = known.get(field.name, "")
            yield from textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {field.default!r}"
    return (
        "required, or set by the preset or rule"
        if field.default_factory is dataclasses.MISSING
        else "default made anew"
    )


def explanations(kind: type) -> dict[str, str]:
    """By field: what the "Attributes" of the docstrings of a class and its parents say, the class's own first."""
    known: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        section = re.search(
            r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(parent.__doc__ or ""), re.MULTILINE | re.DOTALL
        )
        for name, text in re.findall(
            r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL
        ):
            known[name] = " ".join(text.replace("``", "").split())
    return known
