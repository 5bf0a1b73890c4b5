"""Import time, the arrow of the stages, and where things may be named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kedit

ROOT = Path(kedit.__file__).parent

# The stages in order: a module imports only what stands before it. A package stands for all its modules.
ORDER = [
    "errors",
    "text",
    "shapes",
    "placement",
    "fingerprint",
    "progress",
    "processes",
    "registry",
    "edit",
    "delta",
    "hooks",
    "compat",
    "arch",
    "batch",
    "memory",
    "solve",
    "presets",
    "capture",
    "regularizers.base",
    "regularizers.sadr",
    "regularizers.keynorm",
    "regularizers",
    "runner",
    "locate",
    "contexts",
    "corpus",
    "moments",
    "stats",
    "partial",
    "parts",
    "footprint",
    "request",
    "optimise",
    "engine",
    "ledger",
    "patch",
    "history",
    "pipeline",
    "routing",
    "demand",
    "result",
    "editors.config",
    "editors.settings",
    "editors.base",
    "editors.rome",
    "editors.memit",
    "editors.alphaedit",
    "editors.ft",
    "editors",
    "loading",
    "evaluation",
    "guard",
    "journal",
    "testbed",
    "data",
    "analysis",
    "cli",
    "__main__",
]

# A default that is looked up only when a user gives nothing.
LATE = {("corpus", "testbed"), ("loading", "testbed")}


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


def stage(name):
    """The entry of ORDER that a module belongs to."""
    while name and name not in ORDER:
        name = name.rpartition(".")[0]
    return name


def imported(tree):
    """Names of the kedit modules that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            if node.module == "kedit":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("kedit."):
                base = node.module.removeprefix("kedit.")
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("kedit.") for a in node.names if a.name.startswith("kedit."))


def test_every_module_has_a_stage():
    assert [name for name in MODULES if not stage(name)] == []


@pytest.mark.parametrize("name", MODULES)
def test_stages_import_only_earlier_ones(name):
    own = stage(name)
    for other in imported(MODULES[name]):
        if other in ("__version__",) or stage(other) == own or (own, stage(other)) in LATE:
            continue
        assert stage(other), f"{name} imports {other}, which has no stage"
        assert ORDER.index(stage(other)) < ORDER.index(own), f"{name} imports the later stage {other}"


def test_the_arrow_test_can_fail():
    tree = ast.parse("def f():\n    from kedit.editors import rome\n    import kedit.cli.edit")
    assert set(imported(tree)) == {"editors.rome", "cli.edit"}
    assert stage("patch.core") == "patch"
    assert ORDER.index(stage("editors.rome")) > ORDER.index("solve")


@pytest.mark.parametrize(
    "name", [n for n in MODULES if n.startswith("editors.") and n not in ("editors.base", "editors.config")]
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
            if node.module in ("kedit.editors.base", "kedit.editors.config", "kedit.editors.settings"):
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
    fronts = ("regularizers", "presets", "cli", "data", "evaluation", "analysis", "testbed")
    found = {name for name, tree in MODULES.items() if any("sadr" in word.lower() for word in words_of_code(tree))}
    assert "regularizers.sadr" in found
    assert {name for name in found if stage(name).split(".")[0] not in fronts} == set()


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
        "editor",
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
