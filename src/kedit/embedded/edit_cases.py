"""The embedded model's own cases: its invented world asked in every way that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kedit.edit import Edit
from kedit.evaluation.cases import EditCase, Kind, Probe

if TYPE_CHECKING:
    from kedit.embedded.cases import Probe as WorldProbe
    from kedit.embedded.cases import WorldCase
    from kedit.embedded.world import World

GROUPS = {
    "paraphrases": Kind.PARAPHRASE,
    "aliases": Kind.ALIAS,
    "hops": Kind.REASONING,
    "neighbours": Kind.NEIGHBOUR,
    "distracted": Kind.DISTRACTED,
    "relations": Kind.RELATION,
}
NUM_REFERENCES = 5


def embedded_world() -> World:
    """The world that the embedded model was trained on."""
    from kedit.embedded import ASSETS
    from kedit.embedded.world import World

    return World.load(ASSETS / "world.json")


def world_cases(world: World, split: Literal["dev", "test"], n: int, seed: int = 0) -> list[EditCase]:
    """``n`` cases from one half of an embedded world, seeded; no case probes a fact that any of them edits.

    Probes: rewrite, paraphrase, alias (nicknames), reasoning (two hops), neighbour, distracted neighbour, relation and
    generation. The world has no common sense to ask for. The references of the generations are the world's own sentences
    about people who have the new object.
    """
    return [_case(world, found, f"{split}-{number}") for number, found in enumerate(world.edits(split, n, seed))]


def _case(world: World, found: WorldCase, name: str) -> EditCase:
    edit = Edit(found.prompt, found.subject, found.target_new, found.target_true)
    probes = [_probe(Kind.REWRITE, found.rewrite, found.relation)]
    for group, kind in GROUPS.items():
        same = kind in (Kind.NEIGHBOUR, Kind.DISTRACTED, Kind.PARAPHRASE, Kind.ALIAS)
        probes += [_probe(kind, probe, found.relation if same else None) for probe in getattr(found, group)]
    probes.append(Probe(kind=Kind.GENERATION, prompt=edit.text))
    facts = [fact for fact in world.facts(relation=found.relation, aliases=False) if fact.object == found.target_new]
    references = tuple(world.sentence(fact).text for fact in facts[:NUM_REFERENCES])
    return EditCase.of(name, edit, probes, references=references)


def _probe(kind: Kind, found: WorldProbe, relation: str | None) -> Probe:
    fact = None if relation is None else (found.subject, relation)
    return Probe(kind=kind, prompt=found.text, right=found.right, wrong=found.wrong, fact=fact)
