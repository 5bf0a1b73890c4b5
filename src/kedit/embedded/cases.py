"""Edit requests about the invented world, with everything that should and should not change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from kedit.embedded.world import Fact, Half, Person, World
from kedit.errors import ConfigError

NUM_NEIGHBOURS = 4


@dataclass(frozen=True)
class Probe:
    """A question with two answers; it is passed when the right one is the more probable.

    Attributes:
        prompt: with one ``{}`` for the subject.
        subject: a name or an alias.
        right: the answer to be preferred.
        wrong: the other.
    """

    prompt: str
    subject: str
    right: str
    wrong: str

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.format(self.subject)


@dataclass(frozen=True)
class WorldCase:
    """An edit request and its probes.

    Attributes:
        prompt: with one ``{}`` for the subject.
        subject: whose fact is edited.
        target_true: the object before the edit.
        target_new: another object of the same relation.
        relation: the edited fact's relation.
        half: the half of the people it is about.
        paraphrases: the fact in the relation's other words (PS).
        neighbours: the same prompt about people with the same object, or with an object of their own (NS).
        distracted: the same, with the edited sentence before it (DNS).
        relations: other relations of the subject; right is the truth, wrong the edit's target (RS).
        aliases: the fact by the subject's nickname; empty if there is none.
        hops: what follows from the edit: the country of the new birthplace; empty for other relations.
    """

    prompt: str
    subject: str
    target_true: str
    target_new: str
    relation: str
    half: Half
    paraphrases: tuple[Probe, ...]
    neighbours: tuple[Probe, ...]
    distracted: tuple[Probe, ...]
    relations: tuple[Probe, ...]
    aliases: tuple[Probe, ...]
    hops: tuple[Probe, ...]

    @property
    def rewrite(self) -> Probe:
        """The edited prompt itself (ES)."""
        return Probe(self.prompt, self.subject, self.target_new, self.target_true)


def cases(world: World, half: Half, n: int, seed: int = 0) -> Iterator[WorldCase]:
    """``n`` cases about people of one half, every fact at most once.

    Only facts of ``"edit"`` people and relations are edited, everybody once before anybody twice. Neighbours are
    ``"probe"`` people, other relations are ``"probe"`` relations: no case probes a fact that any case edits.

    Raises:
        ConfigError: there are fewer facts that may be edited.
    """
    rng = random.Random(f"edits {world.seed} {half} {seed}")
    subjects = [person for person in world.people if person.half == half and person.role == "edit"]
    names = [relation.name for relation in world.relations if relation.role == "edit"]
    if n > len(subjects) * len(names):
        raise ConfigError(
            f"{n} edits were asked for, but the {half} half has {len(subjects) * len(names)} facts that may be edited. "
            "Ask for fewer."
        )
    rng.shuffle(subjects)
    orders = [rng.sample(names, len(names)) for _ in subjects]
    for i in range(n):
        number, turn = i % len(subjects), i // len(subjects)
        yield _case(world, subjects[number], orders[number][turn], rng)


def _case(world: World, person: Person, name: str, rng: random.Random) -> WorldCase:
    relation = world.relation(name)
    true = world.object(person.name, name)
    follows = [other for other in world.relations if other.via == name]
    candidates = [chosen for chosen in relation.objects if chosen != true]
    if follows:  # so that the two-hop answer changes too
        candidates = [chosen for chosen in candidates if world.countries[chosen] != world.countries[true]]
    new = rng.choice(candidates)
    templates = rng.sample(relation.templates, len(relation.templates))
    prompt = templates[0]
    neighbours = tuple(
        Probe(prompt, fact.subject, fact.object, new) for fact in _neighbours(world, person, name, true, new, rng)
    )
    edited = f"{prompt.format(person.name)} {new}. "
    others = [other for other in world.relations if other.role == "probe" and other.via is None]
    return WorldCase(
        prompt=prompt,
        subject=person.name,
        target_true=true,
        target_new=new,
        relation=name,
        half=person.half,
        paraphrases=tuple(Probe(template, person.name, new, true) for template in templates[1:]),
        neighbours=neighbours,
        distracted=tuple(Probe(edited + probe.prompt, probe.subject, probe.right, probe.wrong) for probe in neighbours),
        relations=tuple(
            Probe(template, person.name, world.object(person.name, other.name), new)
            for other in others
            for template in rng.sample(other.templates, 2)
        ),
        aliases=() if person.alias is None else tuple(Probe(each, person.alias, new, true) for each in templates[:2]),
        hops=tuple(
            Probe(template, person.name, world.countries[new], world.countries[true])
            for other in follows
            for template in other.templates
        ),
    )


def _neighbours(world: World, person: Person, relation: str, true: str, new: str, rng: random.Random) -> list[Fact]:
    """Facts of people of the same half that are never edited: the same object first, then any but the edit's target."""
    pool = [
        Fact(other.name, relation, world.object(other.name, relation))
        for other in world.people
        if other.half == person.half and other.role == "probe"
    ]
    rng.shuffle(pool)
    same = [fact for fact in pool if fact.object == true]
    rest = [fact for fact in pool if fact.object not in (true, new)]
    return (same + rest)[:NUM_NEIGHBOURS]
