"""Evaluation cases from files and data sets; malformed records are counted and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit.data.records import ACCEPTED, STANDARD_INPUT
from kedit.data.records import Loaded as Loaded
from kedit.data.records import Malformed as Malformed
from kedit.data.records import Parser as Parser
from kedit.data.records import Record as Record
from kedit.data.records import parse as parse
from kedit.data.records import read_records as read_records
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase
from kedit.utils.network import UNREACHABLE, hub_is_reachable
from kedit.utils.registry import Registry
from kedit.utils.texts import names_a_file
from kedit.utils.validation import is_whole

FORMATS: Registry[Parser] = Registry(
    "format",
    {
        "kedit": "kedit.data:own",
        "counterfact": "kedit.data.counterfact:original",
        "counterfact-flat": "kedit.data.edits:flat",
        "edits": "kedit.data.edits:edits",
        "known": "kedit.data.edits:known",
        "sadr": "kedit.data.sadr:merged",
        "zsre": "kedit.data.zsre:mend",
        "knowedit": "kedit.data.knowedit:knowedit",
        "mquake": "kedit.data.mquake:mquake",
        "ripple": "kedit.data.ripple:ripple",
    },
)

# Fields that together occur in one format only; the first row that fits names the format.
_MARKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"edit", "probes"}), "kedit"),
    (frozenset({"edit", "Relation_Specificity"}), "ripple"),
    (frozenset({"requested_rewrite", "questions"}), "mquake"),
    (frozenset({"requested_rewrite", "rewrite"}), "sadr"),
    (frozenset({"requested_rewrite", "neighborhood_prompts"}), "counterfact"),
    (frozenset({"src", "alt"}), "zsre"),
    (frozenset({"prompt", "locality_prompt"}), "counterfact-flat"),
    (frozenset({"prompt", "target_new", "locality"}), "knowedit"),
    (frozenset({"prompt", "target_new", "portability"}), "knowedit"),
    (frozenset({"edit"}), "kedit"),
    (frozenset({"prompt", "subject", "target_new"}), "edits"),
    (frozenset({"prompt", "subject", "attribute"}), "known"),
)


def load_cases(
    source: str | Path,
    format: str | None = None,
    *,
    strict: bool = False,
    limit: int | None = None,
    split: str = "train",
) -> Loaded:
    """Evaluation cases from a file or a data set of the ``datasets`` package.

    Args:
        source: a JSON list, JSON lines, CSV or TSV file; ``"-"``: the same from standard input; or the name of a data set (needs
            ``kedit[data]``).
        format: its form, a name in :data:`FORMATS`; recognised by its fields if not given.
        strict: raise at the first malformed record instead of leaving it out.
        limit: so many records at most, from the beginning.
        split: of a data set.

    Raises:
        EditError: nothing can be read, the format is not recognised, no record is a case, or one is not and
            ``strict`` is set; ``limit`` is below 1.
    """
    if limit is not None and not (is_whole(limit) and limit >= 1):
        raise EditError(f"limit must be a whole number of at least 1, or None for all records; not {limit!r}.")
    path = Path(source)
    is_file = str(source) == STANDARD_INPUT or path.exists()
    records: Sequence[Any] = read_records(path) if is_file else _dataset(str(source), split, limit)
    records = records[:limit]
    name = format or recognise(records, str(source))
    try:
        loaded = parse(records, FORMATS[name], name, strict=strict)
    except EditError as error:
        raise EditError(f"{source}: {error}") from error
    if not loaded.cases:
        reason = f" The first: {loaded.malformed[0].reason.rstrip('.')}." if loaded.malformed else ""
        raise EditError(
            f"{source} holds no case in the form {name!r}.{reason} Give another --format, or repair the file."
        )
    return loaded


def load_edits(source: str | Path, format: str | None = None) -> list[Edit]:
    """Edits from a file in any of the forms of :func:`load_cases`, in its order; their probes are left aside.

    Raises:
        EditError: as :func:`load_cases` with ``strict``; the records have no new targets.
    """
    return [
        edit for case in with_new_targets(load_cases(source, format, strict=True).cases, source) for edit in case.edits
    ]


def with_new_targets(cases: list[EditCase], source: str | Path) -> list[EditCase]:
    """The cases as they are; raises ``EditError`` where one is a fact without a new target, as those of ``known_1000.json``."""
    for case in cases:
        if any(edit.target_new == edit.target_true for edit in case.edits):
            raise EditError(
                f"{source} holds facts without a new target ({case.edit.text!r} → {case.edit.target_new!r}), which can be traced "
                "and not edited. Give each one a target_new."
            )
    return cases


def recognise(records: Sequence[Any], source: str = "The file") -> str:
    """The name of the format that the first well-formed record's fields belong to."""
    for record in records:
        if isinstance(record, Mapping):
            for fields, name in _MARKS:
                if fields <= record.keys():
                    return name
    names = next((sorted(map(str, record)) for record in records if isinstance(record, Mapping)), None)
    if names is None:
        said = (
            f"its first record is {str(records[0])[:60]!r}, not an object with fields"
            if records
            else "it holds no records"
        )
    else:
        said = f"its first record has the fields {', '.join(names) or '(none)'}"
    if records and isinstance(records[0], str) and records[0].startswith("not JSON"):
        said = f"its first line is {records[0][:80]}"
    raise EditError(
        f"{source} is in no known form: {said}. An edit has the fields prompt, subject, target_new. Known forms (--format): "
        f"{', '.join(FORMATS)}."
    )


def own(record: Record, name: str) -> EditCase:
    """Kedit's own JSON lines: what :meth:`EditCase.to_dict` writes; the ``id`` may be missing."""
    return EditCase.from_dict({"id": name, **record})


def _dataset(name: str, split: str, limit: int | None) -> list[Any]:
    from itertools import islice

    if names_a_file(name):
        raise EditError(f"There is no file {name!r}. Check the path, and give {ACCEPTED}, or the name of a data set.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EditError(
            f"{name!r} is no file, and reading it as a data set needs the datasets package. Install kedit[data]."
        ) from error
    if not hub_is_reachable():
        raise EditError(f"The data set {name!r} cannot be read: {UNREACHABLE}. Give a JSON or JSONL file.")
    try:
        return list(islice(load_dataset(name, split=split, streaming=True), limit))
    except Exception as error:  # datasets raises many kinds: no network, no such name, ...
        raise EditError(f"The data set {name!r} cannot be read ({error}). Give a JSON or JSONL file.") from error
