"""The shipped weights and world are what they claim to be."""

import pytest
import recall
import torch
from invent import invent

import kedit
from kedit.embedded import ASSETS, load_world
from kedit.embedded.cases import world_cases
from kedit.embedded.world import World
from kedit.evaluation.cases import Kind, fact_of


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def embedded():
    return kedit.load()


def test_the_assets_are_small():
    size = sum(path.stat().st_size for path in ASSETS.iterdir())
    assert size <= 6_000_000


def test_the_weights_are_stored_in_bfloat16_and_loaded_as_asked(embedded):
    from safetensors import safe_open

    with safe_open(ASSETS / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert embedded[0].dtype is torch.float32
    assert kedit.load(dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_the_tokenizer_returns_no_token_types(embedded):
    assert set(embedded[1]("Somebody works as a")) == {"input_ids", "attention_mask"}


def test_the_world_follows_from_its_seed(world):
    assert invent(world.seed) == world
    assert len(world.people) >= 300
    assert len(world.relations) >= 5


def test_last_names_are_shared_so_no_single_word_names_a_person(world):
    firsts, lasts = zip(*(person.name.split() for person in world.people), strict=True)
    assert min(lasts.count(name) for name in set(lasts)) >= 2
    assert min(firsts.count(name) for name in set(firsts)) >= 2
    assert len({person.name for person in world.people}) == len(world.people)


def test_every_fact_is_recalled_in_every_wording(embedded, world):
    shares = recall.recall(*embedded, world)
    assert min(shares.values()) >= 0.99, {key: value for key, value in shares.items() if value < 0.99}


def test_facts_are_recalled_by_nickname_too(embedded, world):
    by_relation = recall.mean_by_relation(recall.recall(*embedded, world, aliases=True))
    assert min(by_relation.values()) >= 0.99, by_relation


def test_the_subjects_last_token_carries_the_facts_in_the_first_blocks_and_hands_them_over(embedded, world):
    shares = recall.handover(*embedded, world)
    assert min(shares[:2]) >= 0.9, shares
    assert shares[-1] <= 0.1, shares


def test_cases_of_the_halves_are_about_different_people_and_never_probe_what_is_edited(world):
    subjects = {}
    for half in ("dev", "test"):
        cases = world_cases(world, half, 200)
        people = subjects[half] = {case.edit.subject for case in cases}
        edited = {fact_of(case) for case in cases}
        assert len(edited) == len(cases)
        for case in cases:
            subject, relation = fact_of(case)
            assert subject == case.edit.subject
            assert world.object(subject, relation) == case.edit.target_true != case.edit.target_new
            for probe in case.probes:
                if probe.kind in (Kind.NEIGHBOUR, Kind.DISTRACTED):
                    assert probe.fact[0] not in people
                    assert probe.right == world.object(*probe.fact) != case.edit.target_new
    assert not subjects["dev"] & subjects["test"]


def test_documents_are_texts_of_the_world(world):
    documents = list(world.documents(3, 50))
    assert documents == list(world.documents(3, 50))
    names = {person.name for person in world.people}
    assert sum(any(name in text for name in names) for text in documents) > 25


def test_a_recipe_of_a_few_steps_trains_saves_and_loads(world, tmp_path):
    """The recipe runs; that it learns takes minutes and is what the shipped weights show."""
    import train

    assert train.main(["--out", str(tmp_path / "tiny"), "--steps", "2"]) == 0
    model, _ = kedit.load(tmp_path / "tiny")
    assert model.dtype is torch.bfloat16
    assert World.load(tmp_path / "tiny" / "world.json") == world
