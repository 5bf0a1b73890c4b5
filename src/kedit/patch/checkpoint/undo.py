"""Take patches off the record: whole patches, and parts of merged ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit.patch.checkpoint.manifest import Entry
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, LowRankDelta
from kedit.patch.format import identity


@dataclass(frozen=True)
class Step:
    """A patch that was put onto a checkpoint, and what is left of it."""

    entry: Entry
    patch: PatchContent
    left: PatchContent | None

    @property
    def kept(self) -> Entry | None:
        """The entry of what is left; the same one where all is."""
        if self.left is None or self.left is self.patch:
            return None if self.left is None else self.entry
        return Entry.of(self.left, self.entry.run)


def take_away(known: Sequence[Entry], patches: Sequence[PatchContent]) -> list[Step] | None:
    """Return what is left of the patches on record once ``patches`` are taken away.

    A given patch is one on record, a part of a merged one, or several on record that were merged since. ``None`` where one
    is none of these, or where the file of a patch on record is not at hand.
    """
    steps: list[Step] = []
    for entry in known:
        patch = entry.load()
        if patch is None:
            return None
        steps.append(Step(entry, patch, patch))
    for given in patches:
        if not _take_one(steps, given):
            return None
    return steps


def _take_one(steps: list[Step], given: PatchContent) -> bool:
    """Strike a patch from the steps, the latest that fits first; whether it was found."""
    places = [place for place in reversed(range(len(steps))) if steps[place].left is not None]
    name = identity(given)
    for place in places:
        if identity(_content(steps[place].left)) == name:
            steps[place] = replace(steps[place], left=None)
            return True
    for place in places:
        rest = subtract(_content(steps[place].left), given)
        if rest is not None:
            steps[place] = replace(steps[place], left=rest if rest.deltas else None)
            return True
    struck: list[int] = []
    rest = given
    for place in places:
        smaller = subtract(rest, _content(steps[place].left))
        if smaller is not None:
            struck.append(place)
            rest = smaller
    if rest.deltas:
        return False
    for place in struck:
        steps[place] = replace(steps[place], left=None)
    return True


def _content(patch: PatchContent | None) -> PatchContent:
    assert patch is not None
    return patch


def subtract(whole: PatchContent, part: PatchContent) -> PatchContent | None:
    """A patch without the columns that ``part`` has in it; ``None`` where it does not hold them side by side.

    Weights of which nothing is left are left out. As column pairs are added one after another, what is left gives the bits
    that the other parts give.
    """
    deltas: dict[str, Delta] = dict(whole.deltas)
    for name, delta in part.deltas.items():
        if name not in deltas:
            return None
        rest = _without_columns(deltas[name], delta)
        if rest is None:
            return None
        if rest.tensors() and rest.rank:
            deltas[name] = rest
        else:
            del deltas[name]
    fingerprints = {name: whole.fingerprints.get(name, "") for name in deltas}
    return PatchContent(deltas, fingerprints, _provenance(whole.provenance, part))


def _without_columns(whole: Delta, part: Delta) -> LowRankDelta | None:
    """The factors without a block of neighbouring columns, the last that is equal; of rank 0 where they are all of it."""
    if not isinstance(whole, LowRankDelta) or not isinstance(part, LowRankDelta) or whole.shape != part.shape:
        same = isinstance(whole, type(part)) and all(
            tensor.shape == part.tensors()[key].shape and torch.equal(tensor.float(), part.tensors()[key].float())
            for key, tensor in whole.tensors().items()
        )
        return LowRankDelta(torch.zeros(whole.shape[0], 0), torch.zeros(whole.shape[1], 0)) if same else None
    left, right = part.left.to(whole.left), part.right.to(whole.right)
    for start in reversed(range(whole.rank - part.rank + 1)):
        stop = start + part.rank
        if torch.equal(whole.left[:, start:stop], left) and torch.equal(whole.right[:, start:stop], right):
            kept = [i for i in range(whole.rank) if not start <= i < stop]
            return LowRankDelta(whole.left[:, kept].contiguous(), whole.right[:, kept].contiguous())
    return None


def _provenance(known: dict[str, Any], part: PatchContent) -> dict[str, Any]:
    """The provenance of a merged patch without one of its parts; scores and answers were those of the whole."""
    kept = {key: value for key, value in known.items() if key not in ("before", "after", "scores")}
    lost = part.provenance
    for key, items in (("edits", lost.get("edits", [])), ("merged", [{**lost, "fingerprints": part.fingerprints}])):
        if key in kept:
            kept[key] = list(kept[key])
            for item in items:
                if item in kept[key]:
                    kept[key].remove(item)
    return kept
