"""Shared by the analysis tests: tiny facts and cases, and the embedded model with a few of its cases."""

import functools

import torch

import kedit
from kedit.analysis.edited_models import Patches
from kedit.embedded.edit_cases import embedded_world, world_cases
from kedit.evaluation import Probe
from kedit.models import ModelArch
from kedit.models.fingerprint import tensor_fingerprint
from kedit.patch import EditPatch
from kedit.patch.delta import LowRankDelta
from tiny_models import tokenizer

NAMES = ("Danielle Darrieux", "Quentin")

# The answer is what the tiny model itself says, so that its probability is one to reckon with.
FACTS = [
    kedit.Edit("{} works in", "Ada Lovelace", "Berlin"),
    kedit.Edit("The mother of {} is", "Quentin", "English"),
    kedit.Edit("The river, {}", "Darrieux", "Berlin"),  # the subject stands at the end
]
TOKENIZER = tokenizer()


@functools.cache
def embedded():
    """The embedded model and its tokenizer, loaded once; tests leave it as it was."""
    return kedit.load()


@functools.cache
def cases(count):
    """The first cases of the test half."""
    return world_cases(embedded_world(), "test", count)


@functools.cache
def rome():
    """ROME with its preset on the embedded model, but few contexts: they are what costs time."""
    return kedit.ROME(*embedded(), contexts=["{}", "People say that {}", "In the end, {}"])


@functools.cache
def patches(regularizer=None):
    """The patches of :func:`few` with ROME, by case."""
    return Patches(*embedded(), few(), rome(), regularizer).all()


def few():
    """Cases on which plain ROME does damage."""
    return cases(22)[16:]


def tiny_case():
    """A case about two people that the tiny models have heard of; answers of several tokens."""
    edit = kedit.Edit("{} works in", "Ada Lovelace", "Berlin", "Rome")
    neighbours = [
        Probe(kind="neighbour", prompt=f"{name} works in", right="London and Rome", wrong="Berlin") for name in NAMES
    ]
    return kedit.EditCase.of("tiny", edit, neighbours)


def tiny_patch(model, layer=0):
    """A random update of one down-projection, large enough to be felt; the same every time."""
    arch = ModelArch(model)
    weight = arch.weight(layer)
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randn(size, 1, generator=generator) for size in weight.matrix.shape)
    delta = LowRankDelta(left / 2, right / 2)
    marks = {weight.name: tensor_fingerprint(weight.parameter)}
    return EditPatch({weight.name: delta}, marks, {"editor": "hand"})
