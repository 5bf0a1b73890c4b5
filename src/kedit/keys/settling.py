"""Telling when more text no longer changes what edits use of a second moment."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from kedit.errors import SingularMomentError
from kedit.keys.second_moment import Accumulator, SecondMoments
from kedit.utils.progress import logger

PROBES = 64  # keys of the first batch whose directions are watched
FIRST = 5  # keys per dimension before directions are looked at
SHUFFLED = 10_000  # texts that are put into a random order together


class Settling:
    """The direction that an edit writes along, C⁻¹k / (kᵀC⁻¹k), of some ordinary keys k, at n, 2n, 4n, ... tokens.

    It has no scale, so it does not matter that k itself is among the keys of C.

    Args:
        tolerance: the estimate is good enough if the median direction of every layer changes by less, relative to its norm, when
            the number of tokens doubles.
        width: of the keys.
        ridge: as of the moments that are wanted.
    """

    def __init__(self, tolerance: float, width: int, ridge: float) -> None:
        self.tolerance, self.ridge = tolerance, ridge
        self._due = FIRST * width
        self._probes: dict[int, Tensor] = {}
        self._directions: dict[int, Tensor] = {}

    def see(self, layer: int, keys: Tensor) -> None:
        """Keep some keys [n, I] of the layer's first batch."""
        if layer not in self._probes:
            chosen = torch.linspace(0, len(keys) - 1, min(PROBES, len(keys)), device=keys.device).long()
            self._probes[layer] = keys[chosen].to("cpu", torch.float64)

    def reached(self, sums: Mapping[int, Accumulator], tokens: int) -> bool:
        """Whether the estimate from so many tokens is good enough; looked at whenever they have doubled."""
        if tokens < self._due:
            return False
        self._due = 2 * tokens
        changes = []
        for layer, probes in self._probes.items():
            try:
                moment = sums[layer].moment(layer, self.ridge)
                along = SecondMoments({layer: moment.matrix.cpu()}).whiten(layer, probes)
            except SingularMomentError:  # so far
                return False
            along = along / (along * probes).sum(-1, keepdim=True)
            if layer in self._directions:
                change = (along - self._directions[layer]).norm(dim=-1) / along.norm(dim=-1)
                changes.append(float(change.median()))
            self._directions[layer] = along
        if changes:
            logger.info("At %s tokens, doubling the text changed directions by %.2f.", f"{tokens:,}", max(changes))
        return len(changes) == len(self._probes) and max(changes) < self.tolerance


def shuffled(texts: Iterable[str]) -> Iterator[str]:
    """The texts in a seeded random order, :data:`SHUFFLED` at a time: the first ones then stand for all."""
    generator, held = random.Random(0), list[str]()
    for text in texts:
        held.append(text)
        if len(held) == SHUFFLED:
            generator.shuffle(held)
            yield from held
            held.clear()
    generator.shuffle(held)
    yield from held
