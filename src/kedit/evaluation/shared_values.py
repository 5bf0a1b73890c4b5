"""An engine that optimises the same values once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kedit.evaluation.provenance import digest
from kedit.models import Site
from kedit.models.fingerprint import bit_sum
from kedit.models.offload import stored
from kedit.regularizers import describe
from kedit.regularizers.base import Needs, Regularizer
from kedit.values.optimize import Objective, Values
from kedit.values.scheduler import Engine

if TYPE_CHECKING:
    from kedit.prompts.encode import Request


@dataclass
class RememberingEngine(Engine):
    """An engine that optimises the same values of the same weights once: closed forms differ, the values do not.

    ROME and R-ROME, or MEMIT, EMMET and AlphaEdit, ask for the same values where their hyper-parameters are the same.

    Attributes:
        kept: the values, by a hash of the weights, the edits, the objective and the regularizers.
    """

    kept: dict[str, Values] = field(default_factory=dict)

    def optimize(
        self,
        sites: Sequence[Site],
        requests: Sequence[Request],
        objective: Objective,
        regularizers: Sequence[Regularizer],
        needs: Needs,
    ) -> Values:
        """As of :class:`Engine`, or what the same call gave before."""
        prompts = [[[prompt.ids, prompt.subject_last] for prompt in request.rewrite] for request in requests]
        edits = [[edit.to_dict() for edit in request.edits] for request in requests]
        chosen = [describe(item) for item in regularizers]
        key = digest([self._weights(), repr(tuple(sites)), repr(objective), chosen, edits, repr(prompts)])
        if key not in self.kept:
            self.kept[key] = super().optimize(sites, requests, objective, regularizers, needs)
        values = self.kept[key]
        return replace(values, log=copy.deepcopy(values.log))  # the closed form adds its own column

    def _weights(self) -> list[int]:
        """Sums over the bits of all weights: an edited model has other values."""
        return [bit_sum(tensor) for _, tensor in stored(self.arch.model)]
