"""docs/hyperparameters.md lists every hyper-parameter with its default, and no other."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from kedit import SADR
from kedit.editors import EDITORS
from kedit.regularizers import KeyNorm, Neighbours, RelationKeys, Relations

PAGE = (Path(__file__).parents[2] / "docs" / "hyperparameters.md").read_text("utf-8")
SHARED = "All editors"
EDITOR_SECTIONS = {
    "ROME": "rome",
    "R-ROME": "rrome",
    "MEMIT": "memit",
    "PMET": "pmet",
    "EMMET": "emmet",
    "AlphaEdit": "alphaedit",
    "FT-L": "ft",
}
REGULARIZERS = {
    "SADR": SADR,
    "Key norm": KeyNorm,
    "Relations": Relations,
    "Neighbours": Neighbours,
    "Relation keys": RelationKeys,
}
REQUIRED = "required"


def table(title):
    """The names of a section's table with their defaults."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", section, re.MULTILINE)
    assert all(meaning.strip() for _, _, meaning in rows)
    names = [name for name, _, _ in rows]
    assert len(names) == len(set(names))
    return {name: REQUIRED if cell == REQUIRED else ast.literal_eval(cell.strip("`")) for name, cell, _ in rows}


def defaults(kind):
    """The fields of a dataclass with their defaults."""
    found = {}
    for field in dataclasses.fields(kind):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = REQUIRED if value is dataclasses.MISSING else value
    return found


@pytest.mark.parametrize("title", EDITOR_SECTIONS)
def test_editors(title):
    config = EDITORS[EDITOR_SECTIONS[title]].Config
    assert {**table(SHARED), **table(title)} == defaults(config)


@pytest.mark.parametrize("title", REGULARIZERS)
def test_regularizers(title):
    assert table(title) == defaults(REGULARIZERS[title])


def test_nothing_else_has_a_section():
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert titles == [SHARED, *EDITOR_SECTIONS, *REGULARIZERS]
