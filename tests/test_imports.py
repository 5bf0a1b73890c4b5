"""Import time, and where things may be named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kedit

ROOT = Path(kedit.__file__).parent


def modules():
    """Every module of the package by its name without "kedit.", parsed."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


@pytest.mark.parametrize(
    "name", [f"editors.{method}" for method in ("rome", "memit", "pmet", "emmet", "alphaedit", "ft")]
)
def test_editors_import_one_another_only_to_inherit(name):
    tree = MODULES[name]
    bases = {
        part.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        for part in ast.walk(base)
        if isinstance(part, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kedit.editors."):
            if node.module.removeprefix("kedit.editors.") not in ("rome", "memit", "pmet", "emmet", "alphaedit", "ft"):
                continue
            names = {alias.name for alias in node.names}
            assert names & bases, f"{name} imports {names} from {node.module} and inherits from none of them"


def words_of_code(tree):
    """Identifiers and strings of a module, docstrings left out."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        for attribute in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                yield value


def test_sadr_is_named_only_where_names_belong():
    """Its own module, the presets, the registry of names; user-facing fronts may offer and measure it."""
    fronts = ("regularizers", "editors.presets", "cli", "data", "evaluation", "bench", "analysis", "report", "embedded")
    found = {name for name, tree in MODULES.items() if any("sadr" in word.lower() for word in words_of_code(tree))}
    assert "regularizers.sadr" in found
    assert {name for name in found if not name.startswith(fronts)} == set()


def test_no_eval_no_pickle_no_remote_code_no_cuda():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = node.func
                called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
                target = getattr(getattr(function, "value", None), "id", "")
                assert (target, called) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}, name
                assert not (isinstance(function, ast.Name) and called in ("eval", "exec")), name
                assert called != "cuda", name
                for keyword in node.keywords:
                    constant = isinstance(keyword.value, ast.Constant) and keyword.value.value
                    assert not (keyword.arg == "trust_remote_code" and constant), name


def run(code):
    """Run Python in a fresh process and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_quick_and_loads_nothing_heavy():
    code = "import sys, time; t = time.perf_counter(); import kedit; print(time.perf_counter() - t, *sys.modules)"
    seconds, *loaded = min((run(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert float(seconds) < 0.3
    heavy = {"torch", "transformers", "numpy", "safetensors", "tqdm", "accelerate", "einops", "datasets", "matplotlib"}
    assert heavy & set(loaded) == set()


@pytest.mark.parametrize("command", ["kedit", "kedit edit"])
def test_help_is_quick_and_loads_nothing_heavy(command):
    arguments = [*command.split()[1:], "--help"]
    code = f"""
import sys
from kedit.cli import main
try:
    main({arguments})
except SystemExit as end:
    print(end.code, *sys.modules)
"""
    words = run(code).split()
    assert "torch" not in words
    assert "transformers" not in words
    assert "usage:" in words


def test_public_names_resolve_and_no_others():
    for name in kedit.__all__:
        assert getattr(kedit, name) is not None
    promised = [
        "Edit",
        "EditPatch",
        "EditResult",
        "Editor",
        "KEditError",
        "ROME",
        "RROME",
        "SADR",
        "SecondMoments",
        "get_editor",
        "load",
    ]
    assert set(promised) <= set(kedit.__all__)
    assert set(kedit.__all__) <= set(dir(kedit))
    assert kedit.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'Rome'"):
        kedit.Rome  # noqa: B018


def test_importing_everything_touches_no_random_state_and_no_threads():
    code = (
        "import random, torch, transformers; a = torch.get_rng_state(); b = random.getstate(); n = torch.get_num_threads();"
        "import kedit; [getattr(kedit, name) for name in kedit.__all__]; import kedit.cli;"
        "print(torch.equal(a, torch.get_rng_state()), b == random.getstate(), n == torch.get_num_threads(), kedit.ROME.name)"
    )
    assert run(code).split() == ["True"] * 3 + ["rome"]
