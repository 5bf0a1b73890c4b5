"""The API reference of the docs site has every public name, once."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import kedit

ROOT = Path(__file__).parents[2]
SOURCE = Path(kedit.__file__).parent
PACKAGES = [
    "bench",
    "capture",
    "data",
    "editors",
    "embedded",
    "evaluation",
    "models",
    "patch",
    "regularizers",
    "sequential",
]
LISTED = Counter(
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
)


def public(package):
    """Names that a package's ``__init__`` defines, or imports under their own name (``import X as X``)."""
    for node in ast.parse((SOURCE / package / "__init__.py").read_text("utf-8")).body:
        match node:
            case ast.ImportFrom():
                yield from (alias.name for alias in node.names if alias.asname == alias.name)
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign():
                yield node.target.id


def test_names_at_the_top():
    assert {f"kedit.{name}" for name in kedit.__all__} - set(LISTED) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_names_of_packages(package):
    names = [name for name in public(package) if not name.startswith("_") and name not in kedit.__all__]
    names = [name for name in names if (package, name) != ("editors", "get_editor")]
    assert names
    assert [name for name in names if f"kedit.{package}.{name}" not in LISTED] == []


def test_errors():
    tree = ast.parse((SOURCE / "errors.py").read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} - set(kedit.__all__)
    assert {f"kedit.errors.{name}" for name in names} - set(LISTED) == set()


def test_nothing_twice():
    assert [name for name, times in LISTED.items() if times > 1] == []


def test_every_page_is_in_the_navigation():
    shown = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in shown] == []
