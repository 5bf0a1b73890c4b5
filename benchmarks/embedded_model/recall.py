"""Measure the embedded model: recall, and the block that passes a subject's facts on to later tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit.embedded.world import World
from kedit.keys.read import outputs
from kedit.models import ModelArch, Site
from kedit.models.hooks import on_output
from kedit.prompts.tokenize import Text, TokenizedPrompt, encode, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_PER_PASS = 512


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, *, aliases: bool = False
) -> dict[tuple[str, int], float]:
    """Share of people whose object is the model's first choice at every token, by relation and number of template.

    Args:
        model: the embedded model.
        tokenizer: its tokenizer.
        world: what it should know.
        aliases: ask about nicknames instead of names.
    """
    names = [(p.alias if aliases else p.name, p.name) for p in world.people if not aliases or p.alias]
    found = {}
    for relation in world.relations:
        for number, template in enumerate(relation.templates):
            texts = [Text.fill(template, str(said), world.object(name, relation.name)) for said, name in names]
            hits = _first_choice(model, encode(tokenizer, texts))
            found[relation.name, number] = float(hits.float().mean())
    return found


def handover(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, *, count: int = 200, seed: int = 0
) -> list[float]:
    """By block: how often another person's hidden state at the subject's last token brings that person's object.

    The block's output at the subject's last token is replaced by what it is for another person, in the same wording;
    the answer counts as handed over when it is then the other person's.
    """
    rng = random.Random(seed)
    arch = ModelArch(model)
    pairs: list[tuple[Text, Text]] = []
    while len(pairs) < count:
        one, other = rng.sample(world.people, 2)
        relation = rng.choice(world.relations)
        if world.object(one.name, relation.name) != world.object(other.name, relation.name):
            template = rng.choice(relation.templates)
            target = world.object(other.name, relation.name)
            pairs.append((Text.fill(template, one.name, target), Text.fill(template, other.name, target)))
    rows = encode(tokenizer, [one for one, _ in pairs])
    others = encode(tokenizer, [other for _, other in pairs])
    lookup = torch.tensor([row.subject_last for row in rows])
    shares = []
    for layer in range(arch.num_layers):
        states = outputs(arch, others, Site(layer, "block"))
        with on_output(arch.block(layer), partial(_swap, new=states, lookup=lookup)):
            hits = _first_choice(model, rows, rows_per_pass=len(rows))
        shares.append(float(hits.float().mean()))
    return shares


def _swap(hidden: Tensor, *, new: Tensor, lookup: Tensor) -> Tensor:
    changed = hidden.clone()
    changed[torch.arange(len(lookup)), lookup] = new.to(hidden.dtype)
    return changed


@torch.no_grad()
def _first_choice(model: PreTrainedModel, rows: list[TokenizedPrompt], *, rows_per_pass: int = ROWS_PER_PASS) -> Tensor:
    """Whether every target token is the first choice, by row."""
    hits: list[bool] = []
    for start in range(0, len(rows), rows_per_pass):
        part = rows[start : start + rows_per_pass]
        ids, mask = pad([row.ids for row in part])
        best = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
        for i, row in enumerate(part):
            said = best[i, row.prompt_last : len(row.ids) - 1]
            hits.append(bool((said == torch.tensor(row.labels)).all()))
    return torch.tensor(hits)


def mean_by_relation(shares: dict[tuple[str, int], float]) -> dict[str, float]:
    """Mean over the templates of each relation."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for (relation, _), share in shares.items():
        grouped[relation].append(share)
    return {relation: sum(values) / len(values) for relation, values in grouped.items()}
