"""Evaluation cases: an edit and the probes that show what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from kedit.edit import Edit, check_encodable
from kedit.errors import EditError
from kedit.prompts.tokenize import separator


class Kind(str, Enum):
    """Kinds of probes."""

    __str__ = str.__str__  # also in f-strings, as of enum.StrEnum, which Python 3.10 lacks

    REWRITE = "rewrite"  # the edit's own prompt
    PARAPHRASE = "paraphrase"  # the same fact in other words
    NEIGHBOUR = "neighbour"  # another subject with the same relation
    DISTRACTED = "distracted_neighbour"  # the same, after the edited sentence
    RELATION = "relation"  # the same subject, another relation
    ALIAS = "alias"  # the same fact, another name of the subject
    REASONING = "reasoning"  # what follows from the new fact
    GENERATION = "generation"  # a beginning to go on from freely
    COMMONSENSE = "commonsense"  # nothing to do with the edit


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question to the model.

    Attributes:
        kind: what it asks about.
        prompt: the text that is continued.
        right: the continuation that is right after the edit; ``None`` for free generation.
        wrong: the continuation that must be less likely than the right one; ``None`` where there is none.
        accept: other wordings of the right answer, for exact match.
        fact: (subject, relation) of the fact that is asked for, where the source tells.
        in_chat: whether the prompt is a user's message, asked in the model's chat template.
        system: the system message of that chat.
    """

    kind: Kind
    prompt: str
    right: str | None = None
    wrong: str | None = None
    accept: tuple[str, ...] = ()
    fact: tuple[str, str] | None = None
    in_chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Check the texts."""
        object.__setattr__(self, "kind", _kind(self.kind))
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise EditError(f"A {self.kind} probe needs a prompt, found {self.prompt!r}.")
        for name in ("right", "wrong"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise EditError(
                    f"The {name} answer of the {self.kind} probe {self.prompt!r} must be text, not {value!r}."
                )
        if self.right is None and self.kind is not Kind.GENERATION:
            raise EditError(f"The {self.kind} probe {self.prompt!r} needs a right answer.")
        if self.right is not None and self.right == self.wrong:
            raise EditError(f"The {self.kind} probe {self.prompt!r} has {self.right!r} as right and as wrong answer.")
        object.__setattr__(self, "accept", tuple(self.accept))
        for text in (self.prompt, self.right or "", self.wrong or "", *self.accept):
            if not isinstance(text, str):
                raise EditError(f"The {self.kind} probe {self.prompt!r} accepts {text!r}, which is no text.")
            check_encodable(f"A {self.kind} probe", text)
        object.__setattr__(self, "fact", None if self.fact is None else tuple(self.fact))

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON values."""
        fields = {"kind": str(self.kind), "prompt": self.prompt, "right": self.right, "wrong": self.wrong}
        extra = {
            "accept": list(self.accept),
            "fact": list(self.fact or ()),
            "in_chat": self.in_chat,
            "system": self.system,
        }
        return {key: value for key, value in {**fields, **extra}.items() if value}


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """An edit with its probes.

    Attributes:
        id: its name, unique in a run.
        edit: the fact to write.
        probes: what is asked before and after; :meth:`of` adds the edit's own prompt and the distracted neighbours.
        more: facts that are written together with ``edit`` (multi-hop questions over several edits).
        references: texts about the new target, which generated text is compared with.
    """

    id: str
    edit: Edit
    probes: tuple[Probe, ...]
    more: tuple[Edit, ...] = ()
    references: tuple[str, ...] = ()

    @classmethod
    def of(cls, id: str, edit: Edit, probes: Iterable[Probe] = (), **fields: Any) -> EditCase:
        """A case with the probes that follow from the edit itself.

        The rewrite probe asks with the edit's prompt. Each neighbour is asked a second time after the sentence
        "{prompt} {target_new}. " (the SADR paper's distracted neighbour), unless the source has such probes.
        """
        given = tuple(probes)
        kinds = {probe.kind for probe in given}
        all_probes = [] if Kind.REWRITE in kinds else [rewrite_probe(edit)]
        all_probes += given
        if Kind.DISTRACTED not in kinds:
            all_probes += [distracted(edit, probe) for probe in given if probe.kind is Kind.NEIGHBOUR]
        return cls(id=str(id), edit=edit, probes=tuple(all_probes), **fields)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All facts that this case writes."""
        return (self.edit, *self.more)

    def to_dict(self) -> dict[str, Any]:
        """The case as JSON values: a line of kedit's own JSONL."""
        record: dict[str, Any] = {"id": self.id, "edit": self.edit.to_dict()}
        if self.more:
            record["more"] = [edit.to_dict() for edit in self.more]
        record["probes"] = [probe.to_dict() for probe in self.probes]
        if self.references:
            record["references"] = list(self.references)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditCase:
        """The inverse of :meth:`to_dict`; missing derived probes are added. Raises ``EditError`` where malformed."""
        if not isinstance(record, Mapping):
            raise EditError(f"A case must be an object with fields, not {type(record).__name__}.")
        unknown = set(record) - {"id", "edit", "more", "probes", "references"}
        if unknown or "edit" not in record or "id" not in record:
            raise EditError(f"A case has id, edit, probes, more, references; found {sorted(record)}.")
        try:
            probes = [Probe(**probe) for probe in record.get("probes", ())]
        except TypeError as error:
            raise EditError(
                f"Case {record['id']!r}: probes are a list of objects with fields of kedit.evaluation.cases.Probe, not "
                f"{record['probes']!r:.60}."
            ) from error
        return cls.of(
            record["id"],
            Edit.from_dict(record["edit"]),
            probes,
            more=tuple(Edit.from_dict(edit) for edit in record.get("more", ())),
            references=tuple(record.get("references", ())),
        )


def rewrite_probe(edit: Edit) -> Probe:
    """The edit's own prompt: the new target against the old one."""
    return Probe(
        kind=Kind.REWRITE,
        prompt=edit.text,
        right=edit.target_new,
        wrong=edit.target_true,
        in_chat=edit.in_chat,
        system=edit.system,
    )


def in_chat(case: EditCase, system: str | None = None) -> EditCase:
    """A case with its edits and probes as messages of a user, each asked in the model's chat template."""
    edits = [replace(edit, in_chat=True, system=edit.system or system) for edit in case.edits]
    probes = tuple(replace(probe, in_chat=True, system=probe.system or system) for probe in case.probes)
    return replace(case, edit=edits[0], more=tuple(edits[1:]), probes=probes)


def distracted(edit: Edit, neighbour: Probe) -> Probe:
    """A neighbour asked after the edited sentence."""
    sentence = edit.text + separator(edit.text, edit.target_new) + edit.target_new
    return replace(neighbour, kind=Kind.DISTRACTED, prompt=f"{sentence}. {neighbour.prompt}")


def drop_edited(cases: Sequence[EditCase]) -> tuple[list[EditCase], int]:
    """Cases for a run that writes all their facts at once, and how many probes were dropped.

    Neighbour, distracted and relation probes ask for facts that must stay; where another case changes that very
    fact, the probe is dropped. Facts are compared by ``Probe.fact`` and by the prompt's text.
    """
    texts = {edit.text for case in cases for edit in case.edits}
    facts = {fact for case in cases for fact in [fact_of(case)] if fact is not None}
    kept, dropped = [], 0
    for case in cases:
        probes = tuple(probe for probe in case.probes if not _asks_edited(probe, texts, facts))
        dropped += len(case.probes) - len(probes)
        kept.append(replace(case, probes=probes))
    return kept, dropped


def fact_of(case: EditCase) -> tuple[str, str] | None:
    """(subject, relation) of the fact that a case changes, as its rewrite probe tells."""
    return next((probe.fact for probe in case.probes if probe.kind is Kind.REWRITE), None)


def check_cases(cases: Iterable[EditCase]) -> list[EditCase]:
    """The cases as a list; raises ``EditError`` where there are none, or two have one name."""
    if not isinstance(cases, Iterable):
        raise EditError(
            f"Expected a list of kedit.EditCase objects, found {type(cases).__name__}. Cases of a file are "
            "load_cases(file).cases."
        )
    checked = list(cases)
    if not checked:
        raise EditError("There is nothing to evaluate: the list of cases is empty.")
    seen: set[str] = set()
    for case in checked:
        if not isinstance(case, EditCase):
            raise EditError(
                f"Expected kedit.EditCase objects, found {type(case).__name__}. Make them with EditCase.of(...)."
            )
        if case.id in seen:
            raise EditError(f"Two cases are called {case.id!r}. Give each one an id of its own.")
        seen.add(case.id)
    return checked


def _asks_edited(probe: Probe, texts: set[str], facts: set[tuple[str, str]]) -> bool:
    if probe.kind not in (Kind.NEIGHBOUR, Kind.DISTRACTED, Kind.RELATION):
        return False
    if probe.fact is not None and probe.fact in facts:
        return True
    parts = probe.prompt.split(". ")  # the edited sentence may stand before the question
    return any(". ".join(parts[i:]) in texts for i in range(len(parts)))


def _kind(value: object) -> Kind:
    try:
        return Kind(str(value))
    except ValueError as error:
        raise EditError(f"{value!r} is no kind of probe. Kinds: {', '.join(Kind)}.") from error
