"""What the analysis tests share: tiny facts and cases, and the embedded model with a few of its cases."""

import functools

import kedit
from kedit.data.world import embedded_world, world_cases
from models import tokenizer

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
    """ROME with its preset on the embedded model, made once: the second moments take a moment."""
    return kedit.ROME(*embedded())
