"""The order of the packages, and no circles in them: imports inside functions and for type checkers count too."""

import ast
from pathlib import Path

import pytest

import kedit

ROOT = Path(kedit.__file__).parent

ORDER = [
    "errors",
    "utils",
    "edit",
    "models",
    "capture",
    "regularizers",
    "prompts",
    "patch",
    "keys",
    "values",
    "editors",
    "evaluation",
    "data",
    "embedded",
    "loading",
    "analysis",
    "report",
    "bench",
    "calibration",
    "sequential",
    "cli",
    "__main__",
]

FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def package_of(path):
    """The package or flat module that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def module_of(path):
    """The dotted name of a file's module; of a package, that of its ``__init__``."""
    name = ".".join(("kedit", *path.relative_to(ROOT).with_suffix("").parts))
    return name.removesuffix(".__init__")


def modules_imported(tree, known):
    """The modules among ``known`` that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def circles(trees):
    """Sets of modules that import one another, directly or through others, of parsed modules by name."""
    arrows = {
        name: {other for other in modules_imported(tree, trees) if other in trees} for name, tree in trees.items()
    }
    reached = {name: set(others) for name, others in arrows.items()}
    for via in trees:  # Warshall
        for others in reached.values():
            if via in others:
                others |= reached[via]
    found = {
        frozenset(other for other in reached[name] if name in reached[other]) for name in trees if name in reached[name]
    }
    return sorted(map(sorted, found))


def imported(tree):
    """Packages and flat modules of kedit that a module imports, at its top or inside functions, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: absolute imports only"
            if node.module == "kedit":
                yield from ((alias.name, node.lineno) for alias in node.names if alias.name != "__version__")
            elif (node.module or "").startswith("kedit."):
                yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("kedit."):
                    yield alias.name.split(".")[1], node.lineno


def upward(tree, package):
    """Imports of a module of ``package`` that do not stand above it in :data:`ORDER`."""
    allowed = ORDER[: ORDER.index(package) + 1]
    return [f"line {line} imports kedit.{name}" for name, line in imported(tree) if name not in allowed]


def test_every_package_has_its_place():
    assert sorted({package_of(path) for path in FILES}) == sorted(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_those_above_it(path):
    assert upward(ast.parse(path.read_text(encoding="utf-8")), package_of(path)) == []


def test_no_modules_import_one_another():
    trees = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    assert circles(trees) == []


def test_a_circle_is_seen_through_functions_and_type_checkers():
    trees = {
        "kedit.a": ast.parse("def f():\n    from kedit import b"),
        "kedit.b": ast.parse("if TYPE_CHECKING:\n    from kedit.c import C"),
        "kedit.c": ast.parse("import kedit.a"),
        "kedit.d": ast.parse("from kedit.a import f"),
    }
    assert circles(trees) == [["kedit.a", "kedit.b", "kedit.c"]]


def test_imports_in_functions_and_for_type_checkers_count():
    source = """
from kedit.errors import ConfigError
from kedit import edit, loading

if TYPE_CHECKING:
    from kedit.editors.rome import ROME

def f():
    import kedit.cli.edit
    from kedit.values.forward import Runner
"""
    assert upward(ast.parse(source), "values") == [
        "line 3 imports kedit.loading",
        "line 6 imports kedit.editors",
        "line 9 imports kedit.cli",
    ]
