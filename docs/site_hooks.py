"""What the docs site does beyond mkdocs: pages from outside ``docs/``, and the docstrings' roles as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the measured results and the pages at the root of the repository."""
    measured = sorted(path for path in (ROOT / RESULTS).rglob("*.*") if path.suffix != ".json")
    found = {path: f"results/{path.relative_to(ROOT / RESULTS).as_posix()}" for path in measured}
    found |= {ROOT / name: uri for name, uri in PAGES.items()}
    for path, uri in found.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they work in the repository, as they work on the site."""
    markdown = markdown.replace(f"](../{RESULTS}/", "](results/")
    for name, uri in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({uri}")
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](").replace(f"]({RESULTS}/", "](results/")
    return markdown


class Roles(Extension):
    """Sphinx roles and literal blocks of the docstrings as Markdown."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a collected object."""
        if obj.docstring is not None:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
