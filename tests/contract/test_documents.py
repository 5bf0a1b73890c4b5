"""README and docs: Python that runs as printed, commands that kedit knows, links that lead somewhere."""

import argparse
import importlib
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import kedit
from kedit.cli import COMMANDS, _parser
from kedit.data import FORMATS
from kedit.editors import EDITORS
from kedit.embedded.defaults import corpus
from kedit.evaluation import METRICS
from kedit.keys.estimate import estimate_moments
from kedit.regularizers import REGULARIZERS
from tiny_models import tiny_model, tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(name, language):
    """The fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty folder to run in, moments from little text, and registries that forget what the page adds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kedit.editors.value_editor.estimate_moments", partial(estimate_moments, tokens=3_000))
    for registry in (EDITORS, FORMATS, METRICS, REGULARIZERS):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
    return tmp_path


def run(name, space):
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec", dont_inherit=True), space)
    return space


def test_readme(scratch, capsys):
    """The saved model is the edited one, with its tokenizer; the one in memory is not edited any more."""
    space = run("README.md", {})
    assert "rome with sadr: 1 edit(s)" in capsys.readouterr().out
    base, _ = kedit.load()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in space["model"].state_dict().items())
    edited, tok = kedit.load(scratch / "edited")
    kedit.EditPatch.load(scratch / "edit.safetensors").apply(base)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in edited.state_dict().items())
    with torch.no_grad():
        said = tok.decode(edited(**tok(space["edit"].text, return_tensors="pt")).logits[0, -1].argmax())
    assert said.strip()
    assert "pilot".startswith(said.strip())


def test_quickstart(scratch, capsys):
    """The first edit says its target, and the model ends as it began."""
    space = run("docs/quickstart.md", {})
    (shown,) = blocks("docs/quickstart.md", "text")
    assert shown.splitlines()[0] in capsys.readouterr().out
    assert space["check"].after.said
    assert len(space["proposals"]) == 2
    assert space["report"]["es"].value == 100
    base, _ = kedit.load()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in space["model"].state_dict().items())


def test_extending(scratch, capsys, monkeypatch):
    contexts = ("{}", "People say that {}", "In the end, {}")
    monkeypatch.setattr("kedit.editors.base.generate_contexts", lambda *_, **__: contexts)
    space = run("docs/extending.md", {"__name__": "extending"})
    out = capsys.readouterr().out
    assert "rome with relations: 1 edit(s)" in out
    assert space["report"]["confidence"].value > 50
    assert space["report"]["es"].value == 100
    assert "1 cases (triples)" in out
    base, _ = kedit.load()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in space["model"].state_dict().items())


def test_extending_by_name(scratch, monkeypatch):
    """The page's entry points, as an installed package would offer them, lead to its definitions."""
    page = "docs/extending.md"
    defined = [block for block in blocks(page, "python") if re.search(r"^(class|def) ", block, re.MULTILINE)]
    (scratch / "my_package.py").write_text("\n\n".join(defined))
    points = tomllib.loads("\n".join(blocks(page, "toml")))["project"]["entry-points"]
    info = scratch / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items())
        for group, each in points.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(scratch)
    try:
        assert issubclass(EDITORS["plain"], kedit.Editor)
        assert REGULARIZERS["relations"]().name == "relations"
        assert METRICS["confidence"].label == "conf"
        assert FORMATS["triples"].__name__ == "triples"
        assert set(points) == {"kedit.editors", "kedit.regularizers", "kedit.metrics", "kedit.formats"}
    finally:
        sys.modules.pop("my_package", None)


def test_second_moments(scratch, capsys):
    text = "\n\n".join(text for _, text in zip(range(200), corpus(), strict=False))
    (scratch / "text.txt").write_text(text)
    model, tok = tiny_model("gpt2"), tokenizer()
    (npz,) = re.findall(r'"(\S+\.npz)"', (ROOT / "docs/second-moments.md").read_text("utf-8"))
    kept = torch.randn(200, 112, generator=torch.Generator().manual_seed(0))
    np.savez(npz, **{"mom2.mom2": (kept.T @ kept).numpy(), "mom2.count": 200})
    space = run("docs/second-moments.md", {"kedit": kedit, "model": model, "tok": tok})
    assert "'tokens': 5600" in capsys.readouterr().out
    torch.testing.assert_close(space["editor"].moments[1].matrix, kept.T @ kept / 200)


def commands(page):
    """The command lines of kedit on a page."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words and words[words.index("-m") + 1] == "kedit":
                yield words[words.index("-m") + 2 :]
            elif "kedit" in words:
                yield words[words.index("kedit") + 1 :]


def refuse(self, message):
    raise ValueError(message)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_exist(page, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    parser = _parser()
    found = [parser.parse_args(words) for words in commands(page)]
    assert found or page.name not in ("README.md", "evaluation.md", "reveal.md", "second-moments.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_have_options_that_exist(command, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    shown = re.findall(r"^  kedit (.*)$", importlib.import_module(COMMANDS[command]).__doc__, re.MULTILINE)
    found = [_parser().parse_args(shlex.split(line)) for line in shown]
    assert found or command == "demo"
    assert all(args.command == command for args in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", page.read_text("utf-8"))
    own = [path for path in named if "NAME" not in path]
    made = {"benchmarks/.runs"}  # by the benchmarks
    assert [path for path in own if path not in made and not (ROOT / path).exists()] == []
