"""Reads files of records, and turns records into cases without stopping at a bad one."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit.edit import json_lines
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase
from kedit.utils.files import unique_keys
from kedit.utils.terminal import printable
from kedit.utils.texts import read_text, text_form

Record = Mapping[str, Any]
Parser = Callable[[Record, str], EditCase]

ACCEPTED = "a JSON list of records, JSON lines, or a table (CSV or TSV) with a header"
STANDARD_INPUT = "-"
PARSE_ERRORS = (EditError, KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True)
class Malformed:
    """A record that is no case: its number (from 0) and what is wrong with it."""

    number: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """Cases of a file.

    Attributes:
        cases: the cases, in the file's order.
        malformed: the records that gave none.
        format: the format's name.
    """

    cases: list[EditCase]
    malformed: list[Malformed]
    format: str

    def report(self) -> str:
        """Counts, and the malformed records by number and reason."""
        lines = [f"{len(self.cases)} cases ({self.format})"]
        if self.malformed:
            lines[0] += f", {len(self.malformed)} malformed records left out"
            lines += [f"  record {bad.number}: {bad.reason}" for bad in self.malformed]
        return "\n".join(map(printable, lines))


def parse(records: Iterable[Any], parser: Parser, format: str, *, strict: bool = False) -> Loaded:
    """Every record through ``parser``; a malformed one is counted and named, or raised where ``strict``."""
    cases: list[EditCase] = []
    malformed: list[Malformed] = []
    names: set[str] = set()
    for number, record in enumerate(records):
        try:
            case = parser(_mapping(record), str(number))
            if case.id in names:
                raise EditError(f"the id {case.id!r} is taken by an earlier record")
        except PARSE_ERRORS as error:
            reason = _reason(error, format)
            if strict:
                raise EditError(f"Record {number} is no {format} record: {reason}") from error
            malformed.append(Malformed(number, reason))
            continue
        names.add(case.id)
        cases.append(case)
    return Loaded(cases, malformed, format)


def _reason(error: Exception, format: str) -> str:
    """Say what is wrong with a record, for people: Python's own words speak of types that are not in the file."""
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    if isinstance(error, EditError) or type(error) is ValueError:
        return str(error)
    return f"a field holds another kind of value than records of the form {format!r} have there"


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list, of JSON lines, or of a table; ``Path("-")`` is standard input.

    The suffix tells (``.jsonl``, ``.csv``, ``.tsv``), and otherwise the content. What is no record becomes a malformed one of its
    own: a line that is not JSON, a row of a table with more cells than the header.

    Raises:
        EditError: the file cannot be read, or holds none of these forms.
    """
    text = _standard_input() if str(path) == STANDARD_INPUT else read_text(path, ACCEPTED, EditError)
    if path.suffix.lower() in (".csv", ".tsv"):
        return list(_rows(text, "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)))
    if _is_table(text):
        return list(_rows(text, _delimiter(text)))
    if path.suffix == ".jsonl" and not _is_list(text):
        return list(_lines(text))
    try:
        records = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        if len(lines := list(json_lines(text))) > 1 and all(line.lstrip().startswith("{") for _, line in lines):
            return list(_lines(text))
        if not text.lstrip().startswith(("{", "[")):
            raise EditError(f"{path} is {text_form(path, text)}. Give {ACCEPTED}.") from error
        raise EditError(f"{path} is not JSON: {error}. Give {ACCEPTED}.") from error
    if isinstance(records, dict):  # some files wrap their list: {"data": [...]}
        lists = [value for value in records.values() if isinstance(value, list)]
        records = lists[0] if len(lists) == 1 else [records]
    if not isinstance(records, list):
        raise EditError(f"{path} holds {json.dumps(records)[:60]} alone. Give {ACCEPTED}.")
    return records


def _lines(text: str) -> Iterator[Any]:
    for number, line in json_lines(text):
        try:
            yield json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            yield f"not JSON (line {number}): {error}"


def _is_list(text: str) -> bool:
    """Whether a text is a JSON list of objects, whatever its file is called."""
    if not text.lstrip().startswith("["):
        return False
    try:
        return all(isinstance(item, dict) for item in json.loads(text))
    except (ValueError, RecursionError):
        return False


def _rows(text: str, delimiter: str) -> Iterator[Any]:
    """The rows of a table as records; empty cells are ``None``."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if None in row:
                yield f"line {reader.line_num} has more cells than the header; put quotes around a text with {delimiter!r}"
            else:
                yield {key.strip(): value or None for key, value in row.items()}
    except csv.Error as error:
        yield f"line {reader.line_num} is no row of a table: {error}"


def _is_table(text: str) -> bool:
    """Whether a text begins with a table's header, whatever its file is called."""
    line = next(iter(text.splitlines()), "")
    names = {name.strip() for name in next(csv.reader([line], delimiter=_delimiter(text)), [])}
    return {"prompt", "subject"} <= names


def _delimiter(text: str) -> str:
    line = next(iter(text.splitlines()), "")
    return max(",\t;", key=line.count)


def _standard_input() -> str:
    text = sys.stdin.read()
    if not text.strip():
        raise EditError(f"Standard input is empty. Give {ACCEPTED}, or the path of a file.")
    return text.removeprefix("\ufeff")


def _mapping(record: Any) -> Record:
    if isinstance(record, Mapping):
        return record
    raise EditError(record if isinstance(record, str) else f"{json.dumps(record)[:40]} instead of an object")


def text(value: Any) -> str:
    """A text field: as it stands, or the ``str`` of CounterFact's {"str": ..., "id": ...}."""
    content = value["str"] if isinstance(value, Mapping) else value
    if not isinstance(content, str) or not content.strip():
        raise EditError(f"expected text, found {value!r}")
    return content.strip()


def texts(value: Any) -> list[str]:
    """All texts in a text, a list, or a list of lists, in order; empty ones dropped."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Sequence):
        return [part for item in value for part in texts(item)]
    return [text(value)]


def subject_slot(prompt: str, subject: str) -> str:
    """The prompt with ``{}`` for its first mention of the subject, where it has none."""
    return prompt if "{}" in prompt else prompt.replace(subject, "{}", 1)
