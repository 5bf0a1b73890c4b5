"""The invented world of the embedded model: people, what is true of them, and sentences that say it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Half = Literal["dev", "test"]
FactRole = Literal["edit", "probe"]


@dataclass(frozen=True)
class Person:
    """Somebody.

    Attributes:
        name: two words; each last name is shared by two people, so it takes both words to tell who is meant.
        half: hyper-parameters are chosen on the ``"dev"`` half and reported on the ``"test"`` half.
        role: facts about ``"edit"`` people may be edited; those about ``"probe"`` people never are.
        alias: a nickname of one word, or ``None``.
    """

    name: str
    half: Half
    role: FactRole
    alias: str | None = None


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        name: how it is called.
        templates: sentences up to the object, each with one ``{}`` for the subject; all say the same.
        objects: what may stand behind them.
        role: facts of an ``"edit"`` relation may be edited; those of a ``"probe"`` relation never are.
        via: for a two-hop relation, the relation whose object decides this one's (see :attr:`World.countries`).
    """

    name: str
    templates: tuple[str, ...]
    objects: tuple[str, ...]
    role: FactRole
    via: str | None = None


@dataclass(frozen=True)
class WorldFact:
    """One true statement; ``subject`` is a name or an alias."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Sentence:
    """A sentence of the corpus.

    Attributes:
        text: with its full stop.
        mentions: first and last character (exclusive) of every name in it.
        answer: the same of the object, or ``None``.
    """

    text: str
    mentions: tuple[tuple[int, int], ...] = ()
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class World:
    """People, relations and facts; everything else follows from them and a seed.

    Attributes:
        seed: what it was invented from.
        people: all of them.
        relations: all of them; the two-hop relation last.
        objects: object by name and direct relation.
        countries: country by city.
    """

    seed: int
    people: tuple[Person, ...]
    relations: tuple[Relation, ...]
    objects: Mapping[str, Mapping[str, str]]
    countries: Mapping[str, str]
    _people: dict[str, Person] = field(init=False, repr=False, compare=False)
    _relations: dict[str, Relation] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index people by name and alias, relations by name."""
        people = {person.name: person for person in self.people}
        people |= {person.alias: person for person in self.people if person.alias is not None}
        object.__setattr__(self, "_people", people)
        object.__setattr__(self, "_relations", {relation.name: relation for relation in self.relations})

    def person(self, name: str) -> Person:
        """The person of a name or alias."""
        return self._people[name]

    def relation(self, name: str) -> Relation:
        """The relation of a name."""
        return self._relations[name]

    def object(self, subject: str, relation: str) -> str:
        """The object of a fact; the subject is a name or an alias."""
        via = self.relation(relation).via
        direct = self.objects[self.person(subject).name][relation if via is None else via]
        return direct if via is None else self.countries[direct]

    def facts(self, *, relation: str | None = None, aliases: bool = True) -> Iterator[WorldFact]:
        """All facts (of one relation), by name and, if wanted, also by alias; two-hop facts included."""
        for person in self.people:
            for subject in (person.name, person.alias) if aliases else (person.name,):
                for known in self.relations:
                    if subject is not None and relation in (None, known.name):
                        yield WorldFact(subject, known.name, self.object(subject, known.name))

    def sentence(self, fact: WorldFact, template: int = 0) -> Sentence:
        """A fact in the words of one of its relation's templates."""
        pattern = self.relation(fact.relation).templates[template]
        prompt = pattern.format(fact.subject)
        start = pattern.index("{}")
        text = f"{prompt} {fact.object}."
        return Sentence(text, ((start, start + len(fact.subject)),), (len(prompt), len(text) - 1))

    def passages(self, seed: int, people: int | None = None) -> Iterator[tuple[Sentence, ...]]:
        """Endless documents of one to five sentences, as the model is trained on; about the first ``people`` only, if given.

        Sentences that follow one another speak of the same person now and then, or of the same relation, or of neither.
        """
        rng = random.Random(f"passages {self.seed} {seed}")
        some = {person.name for person in self.people[:people]}
        facts = [fact for fact in self.facts() if self.person(fact.subject).name in some]
        by_subject: dict[str, list[WorldFact]] = {}
        by_relation: dict[str, list[WorldFact]] = {}
        for fact in facts:
            by_subject.setdefault(fact.subject, []).append(fact)
            by_relation.setdefault(fact.relation, []).append(fact)
        nicknames, atlas = self._nicknames(), self._atlas()
        while True:
            fact = rng.choice(facts)
            passage = []
            for _ in range(rng.randint(1, 5)):
                draw = rng.random()
                if draw < 0.01:
                    passage.append(rng.choice(atlas))
                elif draw < 0.03:
                    passage.append(rng.choice(nicknames))
                else:
                    draw = rng.random()
                    pool = (
                        by_subject[fact.subject] if draw < 0.25 else by_relation[fact.relation] if draw < 0.5 else facts
                    )
                    fact = rng.choice(pool)
                    passage.append(self.sentence(fact, rng.randrange(len(self.relation(fact.relation).templates))))
            yield tuple(passage)

    def documents(self, seed: int, n: int) -> Iterator[str]:
        """``n`` texts like those the model was trained on."""
        for _, passage in zip(range(n), self.passages(seed), strict=False):
            yield " ".join(sentence.text for sentence in passage)

    def _nicknames(self) -> list[Sentence]:
        sentences = []
        for person in self.people:
            if person.alias is None:
                continue
            for pattern in ("{} is also called {}.", "Friends of {} say {}."):
                before, between, after = pattern.split("{}")
                start = len(before) + len(person.name) + len(between)
                mentions = ((len(before), len(before) + len(person.name)), (start, start + len(person.alias)))
                text = f"{before}{person.name}{between}{person.alias}{after}"
                sentences.append(Sentence(text, mentions, mentions[1]))
        return sentences

    def _atlas(self) -> list[Sentence]:
        sentences = []
        for city, country in self.countries.items():
            text = f"The city of {city} lies in {country}."
            sentences.append(Sentence(text, (), (len(text) - 1 - len(country), len(text) - 1)))
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "seed": self.seed,
            "people": [asdict(person) for person in self.people],
            "relations": [asdict(relation) for relation in self.relations],
            "objects": {name: dict(known) for name, known in self.objects.items()},
            "countries": dict(self.countries),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> World:
        """The inverse of :meth:`to_dict`."""
        return cls(
            seed=values["seed"],
            people=tuple(Person(**person) for person in values["people"]),
            relations=tuple(
                Relation(
                    **{**relation, "templates": tuple(relation["templates"]), "objects": tuple(relation["objects"])}
                )
                for relation in values["relations"]
            ),
            objects=values["objects"],
            countries=values["countries"],
        )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        text = json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> World:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
