"""Follow which experts serve the edited facts, before and after an edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kedit.keys import read
from kedit.models import ModelArch
from kedit.prompts.encode import Request
from kedit.utils.warning import warn_user

Shares = dict[int, float]  # the router's weight of every chosen expert, by its number


@dataclass(frozen=True)
class Route:
    """The router's weights for the subject's last token in an edit's bare prompt.

    Attributes:
        layer: the block.
        edit: number of the edit.
        before: the chosen experts with their weights, before the edit.
        after: the same after it.
        written: experts of the block that were changed for this edit (not those that others of a batch have written).
    """

    layer: int
    edit: int
    before: Shares
    after: Shares
    written: frozenset[int]

    @property
    def reached(self) -> float:
        """The share of the router's weight that goes to experts that hold this edit, after it."""
        total = sum(self.after.values())
        return sum(share for expert, share in self.after.items() if expert in self.written) / total

    def __str__(self) -> str:
        text = f"block {self.layer}, edit {self.edit}: served by {_listed(self.after)}"
        return (
            f"{text}, as before" if set(self.before) == set(self.after) else f"{text}; before by {_listed(self.before)}"
        )


def shares(
    arch: ModelArch, requests: Sequence[Request], layers: Iterable[int], *, contexts: bool = False
) -> dict[int, list[Shares]]:
    """Per mixture among ``layers`` and per edit, the experts that serve the subject's last token, with their weights.

    Those of the bare prompt; with ``contexts`` per edit and context.
    """
    rows = [row for request in requests for row in (request.rewrite if contexts else request.rewrite[:1])]
    mixtures = [layer for layer in layers if arch.experts(layer) is not None]
    return {layer: read.routing(arch, rows, layer).shares() for layer in mixtures}


def check(
    arch: ModelArch, requests: Sequence[Request], before: dict[int, list[Shares]], names: Iterable[str]
) -> list[Route]:
    """The routes after the weights ``names`` were edited; warns of facts that the router no longer sends where they are.

    An edit is written into the experts that serve its subject when it is solved for. In the lowest edited block these are
    the experts of ``before``: what the router sees there depends on blocks below alone. Above it they are those of the
    model whose lower blocks are edited already, so there the experts that serve it now count too, if they were changed.
    """
    changed = set(names)
    after = shares(arch, requests, before)
    lowest = next((i for i in range(arch.num_layers) if any(w.name in changed for w in arch.weights(i))), -1)
    routes = []
    for layer, routes_before in before.items():
        written = {weight.index for weight in arch.weights(layer) if weight.name in changed}
        for edit, old in enumerate(routes_before):
            now = after[layer][edit]
            own = set(old) if layer == lowest else {*old, *now}
            routes.append(Route(layer, edit, old, now, frozenset(own & written)))
    for route in routes:
        if route.reached < 1 - 1e-6:
            warn_user(
                f"In block {route.layer} the router now sends the subject of {requests[route.edit].edit.text!r} to experts "
                f"that hold nothing of the edit: {1 - route.reached:.0%} of its weight. The fact may not be recalled. Edit "
                "fewer layers, or one edit at a time."
            )
    return routes


def _listed(used: Shares) -> str:
    return ", ".join(f"expert {expert} ({share:.2f})" for expert, share in used.items())
