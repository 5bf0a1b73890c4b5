"""The cases of an experiment: what the model knows, for development and held-out, from one file or several."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedit.bench.suite import Suite
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind
from kedit.evaluation.journal import make_folder, write_text
from kedit.evaluation.provenance import digest
from kedit.evaluation.selection import known_cases

KINDS = (Kind.PARAPHRASE, Kind.NEIGHBOUR, Kind.DISTRACTED, Kind.RELATION)


@dataclass(frozen=True)
class Source:
    """Cases of one file, not yet chosen from.

    Attributes:
        name: of the file; cases are called after it.
        development: cases on which something may be chosen.
        held_out: cases of other subjects, for what is reported.
    """

    name: str
    development: Sequence[EditCase]
    held_out: Sequence[EditCase]


@dataclass(frozen=True)
class ChosenCases:
    """The cases of an experiment.

    Attributes:
        development: cases on which something is chosen.
        held_out: cases that are reported.
        about: a sentence per source that says how many facts the unedited model knows.
    """

    development: list[EditCase]
    held_out: list[EditCase]
    about: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        halves = {name: [case.to_dict() for case in getattr(self, name)] for name in ("development", "held_out")}
        return {**halves, "about": self.about}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChosenCases:
        """The inverse of :meth:`to_dict`."""
        halves = [[EditCase.from_dict(case) for case in values[name]] for name in ("development", "held_out")]
        return cls(halves[0], halves[1], list(values["about"]))


def choose_cases(
    suite: Suite,
    sources: Sequence[Source],
    *,
    development: int,
    held_out: int,
    exclude: Collection[str] = (),
    kinds: Collection[Kind] = KINDS,
    probes: int | None = None,
    seed: int = 0,
    file: Path | None = None,
) -> ChosenCases:
    """Take cases whose fact the unedited model knows, so many of each source; every subject once in all of them.

    Args:
        suite: the model.
        sources: where to choose from.
        development: how many of each source, 0 for none.
        held_out: likewise.
        exclude: subjects that are left out.
        kinds: the kinds of probes that are kept.
        probes: so many of each kind per case at most.
        seed: of the order in which cases are taken.
        file: where the choice is kept, so that a second start does not ask the model again.

    Raises:
        EditError: the model knows no fact of a source.
    """
    numbers = {"development": development, "held_out": held_out}
    asked = [
        [source.name, *([case.to_dict() for case in getattr(source, half)] for half in numbers)] for source in sources
    ]
    key = digest([suite.weights, asked, numbers, sorted(exclude), sorted(kinds), probes, seed])
    if (kept := _read(file, key)) is not None:
        return kept
    chosen = ChosenCases([], [], [])
    taken = set(exclude)
    for source in sources:
        said = []
        for half, number in numbers.items():
            if number == 0:
                continue
            label, cases = half.replace("_", "-"), getattr(source, half)
            try:
                found = known_cases(
                    suite.model, suite.tokenizer, cases, number, exclude=taken, kinds=kinds, probes=probes, seed=seed
                )
            except EditError as error:
                raise EditError(f"{source.name}, {label} ({len(cases)} cases): {error}") from error
            getattr(chosen, half).extend(replace(case, id=f"{source.name}-{case.id}") for case in found.cases)
            taken |= {case.edit.subject for case in found.cases}
            few = "" if len(found.cases) == number else f", fewer than the {number} asked for"
            said.append(f"{label}: {found}{few}")
        chosen.about.append(f"{source.name}, {'; '.join(said)}.")
    if file is not None:
        make_folder(file.parent)
        write_text(file, json.dumps({"key": key, **chosen.to_dict()}, ensure_ascii=False, indent=1))
    return chosen


def _read(file: Path | None, key: str) -> ChosenCases | None:
    """A choice that was kept; ``None`` where it is another one or damaged."""
    if file is None or not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return ChosenCases.from_dict(values) if values["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, EditError):
        return None
