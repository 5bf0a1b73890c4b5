"""Evaluation cases from files and data sets; malformed records are counted and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit.data.records import ACCEPTED
from kedit.data.records import Loaded as Loaded
from kedit.data.records import Malformed as Malformed
from kedit.data.records import Parser as Parser
from kedit.data.records import Record as Record
from kedit.data.records import parse as parse
from kedit.data.records import read_records as read_records
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
        "counterfact-flat": "kedit.data.counterfact:flat",
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
        source: a ``.json`` or ``.jsonl`` file, or the name of a data set (needs ``kedit[data]``).
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
    records: Sequence[Any] = read_records(path) if path.exists() else _dataset(str(source), split, limit)
    records = records[:limit]
    name = format or recognise(records, str(source))
    loaded = parse(records, FORMATS[name], name, strict=strict)
    if not loaded.cases:
        reason = f" The first: {loaded.malformed[0].reason.rstrip('.')}." if loaded.malformed else ""
        raise EditError(
            f"{source} holds no case in the form {name!r}.{reason} Give another --format, or repair the file."
        )
    return loaded


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
    edits = ""
    if names is not None and {"prompt", "subject", "target_new"} <= set(names):
        edits = ' These are edits: as cases, write each as {"edit": {...}}; kedit edit --edits takes them as they are.'
    raise EditError(f"{source} is in no known form: {said}.{edits} Known forms (--format): {', '.join(FORMATS)}.")


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
