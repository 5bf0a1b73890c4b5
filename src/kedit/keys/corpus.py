"""Texts for second moments: a file, a list, any iterable, or the default for a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kedit.errors import ConfigError
from kedit.models.defaults import model_defaults
from kedit.utils.network import UNREACHABLE, hub_is_reachable
from kedit.utils.texts import binary_form, kind_of_file, names_a_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en")


@dataclass(frozen=True)
class Corpus:
    """Texts that can be read more than once.

    Attributes:
        name: for people.
        key: what it holds, for caches: a hash, or a name and version; empty if unknown.
        texts: makes an iterator from the beginning.
    """

    name: str
    key: str
    texts: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.texts()


def as_corpus(corpus: Corpus | Iterable[str] | str | Path | None, model: PreTrainedModel) -> Corpus:
    """A corpus from what a user may pass; ``None`` means the model's default.

    A string or path is a file (``.jsonl`` with a ``text`` per line, else plain text with a document per paragraph) or,
    if there is no such file, the name of a data set for ``datasets.load_dataset``.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if corpus is None:
        return _default(model)
    if isinstance(corpus, str | Path):
        path = Path(corpus)
        if not path.exists() and names_a_file(str(corpus)):
            raise ConfigError(
                f"There is no file {str(corpus)!r}. Check the path, and give a text or JSONL file, or the name of a data set."
            )
        return _file(path) if path.exists() else _dataset(str(corpus))
    if not isinstance(corpus, Iterable):
        raise ConfigError(f"A corpus is a file or an iterable of texts, not {type(corpus).__name__}.")
    if isinstance(corpus, list | tuple):
        texts = list(corpus)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("A corpus is a list of texts; this list holds something else.")
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return Corpus(f"{len(texts)} texts", f"sha256:{digest}", lambda: iter(texts))
    iterator = iter(corpus)
    return Corpus("an iterator", "", lambda: iterator)


def _default(model: PreTrainedModel) -> Corpus:
    own = model_defaults(model)
    if own is not None:
        return Corpus(own.corpus_name, own.corpus_key, own.texts)
    try:
        return _dataset(*WIKIPEDIA)
    except ConfigError as error:
        raise ConfigError(
            f"Second moments are estimated from Wikipedia by default, which cannot be read here: {error} Pass "
            "moments={layer: C}, or estimate them from your own text with kedit.second_moments (on the command line: "
            "--moments-corpus FILE)."
        ) from error


def _file(path: Path) -> Corpus:
    kind = kind_of_file(path)
    if kind != "file":  # it is read more than once, so a pipe would not do
        raise ConfigError(f"The corpus {path} is a {kind}, not a regular file. Give a text or JSONL file.")
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            form = binary_form(file.read(1 << 20))
            if form is not None:
                raise ConfigError(f"The corpus {path} is {form}. Give a text or JSONL file.")
            file.seek(0)
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise ConfigError(f"The corpus {path} cannot be read ({error}). Give a text or JSONL file.") from error
    kind, read = ("records", _records) if path.suffix == ".jsonl" else ("paragraphs", _paragraphs)
    return Corpus(str(path), f"{kind}:sha256:{digest.hexdigest()}", lambda: read(path))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The corpus {path} cannot be read ({error}). Give a text or JSONL file in UTF-8.") from error


def _records(path: Path) -> Iterator[str]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: expected an object with a 'text' ({error}).") from error


def _paragraphs(path: Path) -> Iterator[str]:
    held: list[str] = []
    with _opened(path) as lines:
        for line in lines:
            if line.strip():
                held.append(line.strip())
            elif held:
                yield " ".join(held)
                held = []
    if held:
        yield " ".join(held)


def _dataset(name: str, config: str | None = None) -> Corpus:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{name!r} is no file, and reading it as a data set needs the datasets package. "
            "Install kedit[data], or give a text or JSONL file."
        ) from error
    if not hub_is_reachable():
        raise ConfigError(f"The data set {name!r} cannot be read: {UNREACHABLE}. Give a text or JSONL file.")
    try:
        data = load_dataset(name, config, split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds: no network, no such name, ...
        raise ConfigError(f"The data set {name!r} cannot be read ({error}). Give a text or JSONL file.") from error
    return Corpus(name, f"dataset:{name}:{config}", lambda: _column(name, data))


def _column(name: str, data: Iterable[Any]) -> Iterator[str]:
    """The texts of a data set."""
    records = iter(data)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # a connection that broke, a damaged file, ...
            raise ConfigError(
                f"The data set {name!r} cannot be read on ({error}). Try again, or give a text or JSONL file."
            ) from error
        if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
            content = f"columns {', '.join(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__
            raise ConfigError(
                f"The data set {name!r} has no text in a column 'text' (found {content}). Write its texts to a file: plain "
                "text with a document per paragraph, or JSONL with a 'text' per line."
            )
        yield record["text"]
