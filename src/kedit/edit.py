"""The edit request: which fact, and what it should become."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kedit.errors import EditError
from kedit.utils.files import unique_keys
from kedit.utils.texts import read_text, text_form

SLOT = "{}"
EXAMPLE = '{"prompt": "{} is in", "subject": "...", "target_new": "..."}'


@dataclass(frozen=True)
class Edit:
    """One fact to write: after ``prompt`` with ``subject``, the model should say ``target_new``.

    ``prompt`` holds exactly one ``{}``, the place of the subject; a prompt in which the subject itself stands
    exactly once is normalised to that form. Surrounding white space of subject and targets is dropped. ``notes`` is whatever
    else is known of the fact, as JSON values: it is kept in patches and has no part in comparisons.

    :meth:`chat` makes an edit whose prompt is a user's message, to be put into the model's chat template (``in_chat``, ``system``).
    ``space`` says whether a space stands before the target; ``None``: where one belongs.

    Raises:
        EditError: no ``{}`` and the subject is not in the prompt, or either of them twice; an empty text.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    in_chat: bool = field(default=False, kw_only=True)
    system: str | None = field(default=None, kw_only=True)
    space: bool | None = field(default=None, kw_only=True)
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check and normalise."""
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise EditError(f"Edit.{name} must be text, not {type(value).__name__}: {value!r}.")
            if all(char.isspace() or unicodedata.category(char) == "Cf" for char in value):  # nothing that is seen
                raise EditError(f"Edit.{name} is empty. Give the {name.replace('_', ' ')} as text.")
            check_encodable(f"Edit.{name}", value)
        if self.target_true is not None:
            if not isinstance(self.target_true, str):
                raise EditError(f"Edit.target_true must be text or None, not {type(self.target_true).__name__}.")
            check_encodable("Edit.target_true", self.target_true)
        if not isinstance(self.in_chat, bool) or not isinstance(self.space, bool | None):
            raise EditError(
                f"Edit.in_chat is True or False, and space that or None; found {self.in_chat!r} and {self.space!r}."
            )
        if self.system is not None and not (isinstance(self.system, str) and self.in_chat):
            raise EditError("Edit.system is the text of a chat's system message. Make the edit with Edit.chat(...).")
        if not isinstance(self.notes, Mapping):
            raise EditError(f"Edit.notes is a mapping, as {{'source': 'Wikipedia'}}, not {self.notes!r:.60}.")
        for name in ("subject", "target_new", "target_true"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value.strip() or None) if value else None)
        object.__setattr__(self, "prompt", _with_slot(self.prompt, self.subject))

    @classmethod
    def chat(
        cls,
        user: str,
        subject: str,
        target_new: str,
        target_true: str | None = None,
        *,
        system: str | None = None,
        **fields: Any,
    ) -> Edit:
        """An edit of what a chat model answers: ``Edit.chat("Where is {}?", "the Eiffel Tower", "Rome")``.

        Args:
            user: the user's message, with ``{}`` for the subject. It is put into the model's chat template, up to where the model
                answers; contexts stand inside the message.
            subject: as for the class.
            target_new: the beginning of the answer.
            target_true: as for the class.
            system: the system message; ``None``: none, or the template's own.
            fields: ``space``, ``notes``.

        Raises:
            EditError: as for the class.
        """
        return cls(user, subject, target_new, target_true, in_chat=True, system=system, **fields)

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def question(self) -> tuple[str, str, bool, str | None]:
        """What is asked, of whom and in which form: two edits with one question and different targets contradict each other."""
        return self.subject, self.text, self.in_chat, self.system

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Edit:
        """Make an edit from a mapping with the fields' names; unknown or missing fields raise ``EditError``."""
        known = {item.name for item in fields(cls)}
        if not isinstance(record, Mapping):
            given = (
                "a list (a JSON file of many edits needs one object per line)"
                if isinstance(record, list)
                else repr(record)
            )
            raise EditError(f"An edit record must be an object like {EXAMPLE}, not {given:.80}.")
        unknown, missing = set(record) - known, {"prompt", "subject", "target_new"} - set(record)
        if unknown or missing:
            given = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(missing)}"
            raise EditError(f"An edit record has fields {sorted(known)}; found {given}.")
        return cls(**record)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary; those beyond the fact itself only where they are set."""
        record: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        plain: dict[str, Any] = {"in_chat": False, "system": None, "space": None, "notes": {}}
        return {name: value for name, value in record.items() if name not in plain or value != plain[name]}

    @classmethod
    def from_jsonl(cls, path: str | Path) -> list[Edit]:
        """Read one edit per line from a JSON-lines file; blank lines are skipped.

        Raises:
            EditError: a line that is not JSON or not an edit, with its number.
        """
        text = read_text(path, f"JSON lines: {EXAMPLE} on each line", EditError)
        edits = []
        for number, line in json_lines(text):
            try:
                edits.append(cls.from_dict(json.loads(line, object_pairs_hook=unique_keys)))
            except (ValueError, RecursionError) as error:  # EditError is a ValueError, and numbers can be too long
                if isinstance(error, EditError):
                    raise EditError(f"{path}, line {number}: {error}") from error
                if edits or line.lstrip().startswith("{"):
                    raise EditError(f"{path}, line {number}, is not a complete JSON object: {error}.") from error
                raise EditError(
                    f"{path} is not JSON lines but {text_form(path, text)}. Write one JSON object per line: {EXAMPLE}."
                ) from error
        if not edits:
            raise EditError(f"{path} holds no edits. Write one JSON object per line: {EXAMPLE}.")
        return edits


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of JSON lines that are not blank, numbered from 1."""
    # Not splitlines(): JSON strings may hold U+2028 and other line ends that end no JSON line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def check_encodable(what: str, value: str) -> None:
    """Raise ``EditError`` where a text cannot be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EditError(f"{what} holds half of a surrogate pair, which is no text: {value!r}.") from error


def as_edits(edits: Edit | Iterable[Edit]) -> list[Edit]:
    """One edit or many, as a list; anything else raises ``EditError``."""
    if not isinstance(edits, Edit | Iterable):
        raise EditError(f"Expected a kedit.Edit or a list of them, found {type(edits).__name__}.")
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    if not listed:
        raise EditError("There is nothing to edit: the list of edits is empty.")
    for item in listed:
        if not isinstance(item, Edit):
            raise EditError(f"Expected kedit.Edit objects, found {type(item).__name__}. Make one with kedit.Edit(...).")
    return listed


def _with_slot(prompt: str, subject: str) -> str:
    slots = prompt.count(SLOT)
    if slots == 1:
        return prompt
    if slots > 1:
        raise EditError(f"The prompt {prompt!r} holds {slots} '{{}}'. Leave one, the place of the subject.")
    count = prompt.count(subject)
    if count == 0:
        raise EditError(
            f"The prompt {prompt!r} holds neither '{{}}' nor the subject {subject!r}. Put '{{}}' where the subject stands."
        )
    if count > 1:
        raise EditError(
            f"The subject {subject!r} stands {count} times in the prompt {prompt!r}. Put '{{}}' in the place that is meant."
        )
    return prompt.replace(subject, SLOT)
