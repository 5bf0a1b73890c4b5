"""The notebooks of the docs run from top to bottom, and are committed without outputs."""

import json
from functools import partial
from pathlib import Path

import matplotlib
import pytest

from kedit.editors import EDITORS
from kedit.keys.estimate import estimate_moments

matplotlib.use("Agg")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code(path):
    """The cells with code of a notebook."""
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["edit_a_fact", "own_editor"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    assert [cell for cell in code(path) if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kedit.editors.value_editor.estimate_moments", partial(estimate_moments, tokens=3_000))
    monkeypatch.setattr(EDITORS, "_objects", dict(EDITORS._objects))
    space = {"__name__": path.stem}
    for number, cell in enumerate(code(path), 1):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec", dont_inherit=True), space)
