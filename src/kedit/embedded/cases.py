"""Evaluation cases about the invented world, with everything that should and should not change."""

from __future__ import annotations

import random
from collections.abc import Iterable

from kedit.edit import Edit
from kedit.embedded.world import Half, Person, World, WorldFact
from kedit.errors import ConfigError
from kedit.evaluation.cases import EditCase, Kind, Probe, distracted

NUM_NEIGHBOURS = 4
NUM_REFERENCES = 5


def world_cases(world: World, split: Half, n: int, seed: int = 0) -> list[EditCase]:
    """``n`` cases from one half of an embedded world, every fact at most once; no case probes a fact that any of them edits.

    Only facts of ``"edit"`` people and relations are edited, everybody once before anybody twice. Neighbours are
    ``"probe"`` people, other relations are ``"probe"`` relations.

    Probes: rewrite, paraphrase, alias (nicknames), reasoning (two hops), neighbour, distracted neighbour, relation and
    generation. The world has no common sense to ask for. The references of the generations are the world's own sentences
    about people who have the new object.

    Raises:
        ConfigError: there are fewer facts that may be edited.
    """
    rng = random.Random(f"edits {world.seed} {split} {seed}")
    subjects = [person for person in world.people if person.half == split and person.role == "edit"]
    names = [relation.name for relation in world.relations if relation.role == "edit"]
    if n > len(subjects) * len(names):
        raise ConfigError(
            f"{n} edits were asked for, but the {split} half has {len(subjects) * len(names)} facts that may be edited. "
            "Ask for fewer."
        )
    rng.shuffle(subjects)
    orders = [rng.sample(names, len(names)) for _ in subjects]
    cases = []
    for i in range(n):
        turn, number = divmod(i, len(subjects))
        cases.append(_case(world, subjects[number], orders[number][turn], f"{split}-{i}", rng))
    return cases


def _case(world: World, person: Person, name: str, id: str, rng: random.Random) -> EditCase:
    """The case that gives a person another object of the relation ``name``."""
    relation, true = world.relation(name), world.object(person.name, name)
    follows = [other for other in world.relations if other.via == name]
    candidates = [chosen for chosen in relation.objects if chosen != true]
    if follows:  # so that the two-hop answer changes too
        candidates = [chosen for chosen in candidates if world.countries[chosen] != world.countries[true]]
    new = rng.choice(candidates)
    prompt, *paraphrases = rng.sample(relation.templates, len(relation.templates))
    edit = Edit(prompt, person.name, new, true)

    def ask(
        kind: Kind, templates: Iterable[str], subject: str, right: str, wrong: str, fact: tuple[str, str] | None = None
    ) -> list[Probe]:
        return [
            Probe(kind=kind, prompt=text.format(subject), right=right, wrong=wrong, fact=fact) for text in templates
        ]

    probes = ask(Kind.REWRITE, [prompt], person.name, new, true, (person.name, name))
    probes += ask(Kind.PARAPHRASE, paraphrases, person.name, new, true, (person.name, name))
    if person.alias is not None:
        probes += ask(Kind.ALIAS, [prompt, *paraphrases[:1]], person.alias, new, true, (person.alias, name))
    for other in follows:
        right, wrong = world.countries[new], world.countries[true]
        probes += ask(Kind.REASONING, other.templates, person.name, right, wrong)
    neighbours = []
    for near in _neighbours(world, person, name, true, new, rng):
        neighbours += ask(Kind.NEIGHBOUR, [prompt], near.subject, near.object, new, (near.subject, name))
    probes += [*neighbours, *(distracted(edit, probe) for probe in neighbours)]
    for other in world.relations:
        if other.role == "probe" and other.via is None:
            right = world.object(person.name, other.name)
            probes += ask(Kind.RELATION, rng.sample(other.templates, 2), person.name, right, new)
    probes.append(Probe(kind=Kind.GENERATION, prompt=edit.text))
    facts = [fact for fact in world.facts(relation=name, aliases=False) if fact.object == new]
    references = tuple(world.sentence(fact).text for fact in facts[:NUM_REFERENCES])
    return EditCase.of(id, edit, probes, references=references)


def _neighbours(
    world: World, person: Person, relation: str, true: str, new: str, rng: random.Random
) -> list[WorldFact]:
    """Facts of people of the same half that are never edited: the same object first, then any but the edit's target."""
    pool = [
        WorldFact(other.name, relation, world.object(other.name, relation))
        for other in world.people
        if other.half == person.half and other.role == "probe"
    ]
    rng.shuffle(pool)
    same = [fact for fact in pool if fact.object == true]
    rest = [fact for fact in pool if fact.object not in (true, new)]
    return (same + rest)[:NUM_NEIGHBOURS]
