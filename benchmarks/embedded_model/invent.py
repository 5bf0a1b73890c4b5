"""Invents the embedded model's world from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from kedit.embedded.world import FactRole, Half, Person, Relation, World

NUM_PEOPLE = 300
NUM_FIRST_NAMES = 40
NUM_ALIASES = 30  # all of people whose facts may be edited
EDITED_SHARE = 2 / 3  # of the people

_STARTS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "qu",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u"]
_ENDS = ["l", "n", "r", "lo", "ra", "ven", "dis"]
_LAST_ENDS = [
    "gar",
    "dor",
    "mun",
    "vel",
    "sam",
    "pel",
    "hov",
    "nix",
    "ros",
    "tir",
    "lin",
    "cor",
    "fen",
    "jas",
    "bek",
    "zan",
    "wen",
    "rop",
    "lum",
    "tav",
]
_ALIAS_ENDS = ["bby", "ko", "zi", "ppo", "lly", "mmo", "tta", "xy"]

_COUNTRIES: dict[str, tuple[str, str]] = {
    "Spain": ("Madrid", "Seville"),
    "Italy": ("Rome", "Milan"),
    "Germany": ("Berlin", "Hamburg"),
    "Japan": ("Tokyo", "Osaka"),
    "Egypt": ("Cairo", "Luxor"),
    "Poland": ("Warsaw", "Lodz"),
    "Turkey": ("Ankara", "Izmir"),
    "Norway": ("Oslo", "Bergen"),
    "India": ("Delhi", "Mumbai"),
    "Kenya": ("Nairobi", "Mombasa"),
    "Peru": ("Lima", "Cusco"),
    "Canada": ("Toronto", "Ottawa"),
}

# name, role, templates, objects
_DIRECT: tuple[tuple[str, FactRole, tuple[str, ...], str], ...] = (
    (
        "profession",
        "edit",
        ("{} works as a", "The profession of {} is", "By trade, {} is a", "{} earns money as a"),
        "baker banker botanist carpenter chemist chef dentist farmer florist geologist journalist judge lawyer librarian "
        "midwife novelist painter pilot plumber sailor sculptor surgeon tailor teacher",
    ),
    (
        "instrument",
        "edit",
        ("{} plays the", "The instrument of {} is the", "On stage, {} performs on the", "{} takes lessons on the"),
        "accordion banjo bassoon bugle cello clarinet cornet drums flute guitar harp lute lyre mandolin oboe organ piano "
        "piccolo saxophone trombone trumpet tuba viola violin",
    ),
    (
        "sport",
        "probe",
        ("{} competes in", "The sport of {} is", "On Sundays, {} practises", "{} is good at"),
        "archery badminton baseball boxing chess cricket cycling darts diving fencing football golf handball hockey judo "
        "karate polo rowing rugby skiing squash surfing tennis volleyball",
    ),
)
_BIRTHPLACE = ("{} was born in the city of", "The birthplace of {} is", "As a child, {} lived in", "{} grew up in")
_BIRTH_COUNTRY = (
    "{} was born in the country of",
    "The native country of {} is",
    "As a child, {} had a passport of",
    "{} comes from a city in",
)


def relations() -> tuple[Relation, ...]:
    """All relations; the same in every world."""
    cities = tuple(sorted(city for pair in _COUNTRIES.values() for city in pair))
    direct = [Relation(name, templates, tuple(words.split()), role) for name, role, templates, words in _DIRECT]
    birthplace = Relation("birthplace", _BIRTHPLACE, cities, "edit")
    country = Relation("birth country", _BIRTH_COUNTRY, tuple(_COUNTRIES), "probe", via="birthplace")
    return (birthplace, *direct, country)


def invent(seed: int) -> World:
    """A world; the same for the same seed."""
    rng = random.Random(f"world {seed}")
    names, aliases = _names(rng)
    num_edited = round(NUM_PEOPLE * EDITED_SHARE)
    kinds: list[tuple[Half, FactRole]] = []
    for i in range(NUM_PEOPLE):
        kinds.append(("dev" if i % 2 == 0 else "test", "edit" if i < num_edited else "probe"))
    people = tuple(
        Person(name, half, role, aliases[i] if i < len(aliases) else None)
        for i, (name, (half, role)) in enumerate(zip(names, kinds, strict=True))
    )
    known = relations()
    objects: dict[str, dict[str, str]] = {person.name: {} for person in people}
    for relation in known:
        if relation.via is None:
            for kind in sorted(set(kinds)):
                group = [person for person in people if (person.half, person.role) == kind]
                for person, chosen in zip(group, _evenly(rng, relation.objects, len(group)), strict=True):
                    objects[person.name][relation.name] = chosen
    countries = {city: country for country, cities in _COUNTRIES.items() for city in cities}
    return World(seed, people, known, objects, countries)


def _names(rng: random.Random) -> tuple[list[str], list[str]]:
    """Names in random order, and aliases. Each last name occurs twice, with different first names."""
    used: set[str] = set()
    firsts = list(_fresh(NUM_FIRST_NAMES, used, _words(rng, (_STARTS, _VOWELS, _ENDS))))
    lasts = list(_fresh(NUM_PEOPLE // 2, used, _words(rng, (_STARTS, _VOWELS, _LAST_ENDS))))
    aliases = list(_fresh(NUM_ALIASES, used, _words(rng, (_STARTS, _VOWELS, _ALIAS_ENDS))))
    names = [f"{first} {last}" for last in lasts for first in rng.sample(firsts, 2)]
    rng.shuffle(names)
    return names, aliases


def _words(rng: random.Random, parts: Sequence[Sequence[str]]) -> Iterator[str]:
    """Endless random words, a syllable from each part."""
    while True:
        yield "".join(rng.choice(part) for part in parts).capitalize()


def _fresh(count: int, used: set[str], words: Iterable[str]) -> Iterator[str]:
    """The next ``count`` words that have not been used."""
    for word in words:
        if count == 0:
            return
        if word not in used:
            used.add(word)
            count -= 1
            yield word


def _evenly(rng: random.Random, objects: Sequence[str], count: int) -> list[str]:
    """``count`` objects in random order, each as often as the others."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(objects, len(objects))
    drawn = drawn[:count]
    rng.shuffle(drawn)
    return drawn
