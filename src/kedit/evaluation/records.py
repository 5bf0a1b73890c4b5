"""Scores of probes and cases: plain numbers that are stored and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kedit.evaluation.cases import Kind, Probe
from kedit.prompts.likelihood import Answer


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """One probe under one state of the model; what was not measured is ``None``.

    Attributes:
        kind: of the probe.
        right: the right answer.
        wrong: the wrong answer.
        exact: whether the model, decoding greedily to a natural stop, says exactly the right answer.
        text: what it said.
        entropy: n-gram entropy of the generated text, in bits.
        attention: by measure: the last token's attention to the edited subject, and how far its rows moved.
    """

    kind: Kind
    right: Answer | None = None
    wrong: Answer | None = None
    exact: bool | None = None
    text: str | None = None
    entropy: float | None = None
    attention: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what was not measured is left out."""
        record: dict[str, Any] = {"kind": str(self.kind)}
        for name in ("right", "wrong"):
            answer: Answer | None = getattr(self, name)
            if answer is not None:
                record[name] = {"nll": answer.nll, "labels": list(answer.labels), "argmax": list(answer.argmax)}
        for name in ("exact", "text", "entropy"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        if self.attention:
            record["attention"] = dict(self.attention)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ProbeScore:
        """The inverse of :meth:`to_dict`."""
        fields = dict(record)
        fields["kind"] = Kind(fields["kind"])
        for name in ("right", "wrong"):
            if name in fields:
                answer = fields[name]
                fields[name] = Answer(answer["nll"], tuple(answer["labels"]), tuple(answer["argmax"]))
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """All probes of a case under one state of the model.

    Attributes:
        probes: one by one.
        texts: what was measured on plain text.
        reference: tf-idf cosine of all generated texts together with all the case's references together.
    """

    probes: tuple[ProbeScore, ...]
    texts: Mapping[str, float] = field(default_factory=dict)
    reference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        record: dict[str, Any] = {"probes": [probe.to_dict() for probe in self.probes], "texts": dict(self.texts)}
        return record if self.reference is None else {**record, "reference": self.reference}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CaseScore:
        """The inverse of :meth:`to_dict`."""
        probes = tuple(ProbeScore.from_dict(item) for item in record["probes"])
        return cls(probes=probes, texts=record["texts"], reference=record.get("reference"))


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """A finished case.

    Attributes:
        id: of the case.
        prompt: the edit's prompt, subject in place, and what was written.
        asked: the probes, in the order of their scores: prompts and answers as text. Empty in records of older versions.
        before: scores of the unedited model.
        after: scores of the edited one.
        seconds: time by stage.
        failure: why the edit could not be made; ``after`` is then that of the unedited model.
    """

    id: str
    prompt: str
    asked: tuple[Probe, ...] = ()
    before: CaseScore
    after: CaseScore
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        record: dict[str, Any] = {"id": self.id, "prompt": self.prompt}
        if self.asked:
            record["asked"] = [probe.to_dict() for probe in self.asked]
        record |= {"before": self.before.to_dict(), "after": self.after.to_dict()}
        return {**record, "seconds": dict(self.seconds), "failure": self.failure}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CaseRecord:
        """The inverse of :meth:`to_dict`."""
        before, after = (CaseScore.from_dict(record[name]) for name in ("before", "after"))
        plain = {name: record[name] for name in ("id", "prompt", "seconds", "failure")}
        asked = tuple(Probe(**probe) for probe in record.get("asked", ()))
        return cls(before=before, after=after, asked=asked, **plain)
