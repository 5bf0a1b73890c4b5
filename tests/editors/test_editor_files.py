"""Editors stay short enough to be read beside their equation."""

import ast
import inspect
import io
import textwrap
import tokenize

import pytest

from kedit.editors import EDITORS

LIMITS = {"rome": 40, "rrome": 40, "memit": 40, "pmet": 40, "emmet": 40, "alphaedit": 60}
ASIDE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source):
    """Lines that hold code: not blank, not a comment, not a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ASIDE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_code_lines_are_counted():
    assert (
        code_lines('"""Doc\n\nstring."""\n\n# why\nx = (\n    1,\n)\n\n\ndef f():\n    """Doc."""\n    return x  # y\n')
        == 5
    )


@pytest.mark.parametrize("name", LIMITS)
def test_an_editor_s_file_is_short(name):
    assert code_lines(inspect.getsource(inspect.getmodule(EDITORS[name]))) <= LIMITS[name]


def test_apply_fits_on_a_screen():
    from kedit.editors.base import Editor

    assert code_lines(textwrap.dedent(inspect.getsource(Editor.apply))) <= 30
