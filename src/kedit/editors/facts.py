"""The facts of one call, and those that earlier patches wrote of the same subjects."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kedit.edit import Edit
from kedit.errors import EditError
from kedit.patch import EditPatch
from kedit.patch.ledger import Ledger
from kedit.prompts.predictions import Prediction
from kedit.utils.progress import logger
from kedit.utils.warning import warn_user

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_consistent(edits: Sequence[Edit]) -> None:
    """Raise where one prompt has two targets, however it is spaced or composed; warn where an edit is given twice.

    Raises:
        EditError: two edits contradict each other; both are named by their numbers.
    """
    asked: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    twice: list[int] = []
    for number, edit in enumerate(edits):
        other = asked.setdefault((_plain(edit.text), _form(edit)), number)
        if _plain(edits[other].target_new) != _plain(edit.target_new):
            again = "" if edit.text == edits[other].text else f"{edit.text!r} "
            raise EditError(
                f"Edits {other} and {number} contradict each other: {edits[other].text!r} → {edits[other].target_new!r} and "
                f"{again}→ {edit.target_new!r}. Leave one of them."
            )
        if first.setdefault(edit.question, number) != number:
            twice.append(number)
    if twice:
        named = ", ".join(map(str, twice[:5])) + (", ..." if len(twice) > 5 else "")
        warn_user(f"{len(twice)} of {len(edits)} edits are given more than once and count once (numbers {named}).")


def _plain(text: str) -> str:
    """A text in composed form, with single spaces, without what is not seen."""
    seen = "".join(char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cf")
    return " ".join(seen.split())


def _form(edit: Edit) -> tuple[bool, str | None]:
    """Whether an edit is asked in a chat, and with which system message: in text and in a chat, a question is two."""
    return edit.in_chat, edit.system


def earlier_facts(model: PreTrainedModel, edits: Sequence[Edit]) -> list[Edit]:
    """The facts about the subjects of ``edits`` that the model's patches wrote, but for those that ``edits`` replace.

    An update of a subject's value would overwrite them: they have the same key.
    """
    subjects = {edit.subject for edit in edits}
    earlier: dict[Hashable, Edit] = {}
    for patch in Ledger.of(model).owners:
        records = patch.provenance.get("edits") if isinstance(patch, EditPatch) else None
        for record in records if isinstance(records, list) else []:
            if isinstance(record, dict) and record.get("subject") in subjects:
                with suppress(EditError):  # a foreign patch may say anything
                    edit = Edit.from_dict(record)
                    earlier[edit.subject, _plain(edit.text), _form(edit)] = edit
    for edit in edits:
        old = earlier.pop((edit.subject, _plain(edit.text), _form(edit)), None)
        if old is not None and old.target_new != edit.target_new:
            logger.info("%s → %s replaces → %s.", edit.text, edit.target_new, old.target_new)
    for edit in earlier.values():
        logger.info("Kept with the new facts about %s: %s → %s.", edit.subject, edit.text, edit.target_new)
    return list(earlier.values())


def warn_of_alike(edits: Sequence[Edit], before: Sequence[Prediction]) -> None:
    """Warn of two edits of one subject that seem to ask the same question and want different answers.

    They seem to where the model, before the edit, answers both alike.
    """
    seen: dict[tuple[str, str], Edit] = {}
    for edit, prediction in zip(edits, before, strict=True):
        other = seen.setdefault((_plain(edit.subject), prediction.first_choice.strip()), edit)
        if other.target_new != edit.target_new and other.question != edit.question:
            warn_user(
                f"{other.text!r} → {other.target_new!r} and {edit.text!r} → {edit.target_new!r} may contradict each other: before "
                f"the edit the model answers both with {prediction.first_choice!r}. If they mean the same, leave one."
            )
