"""From values to updates: the closed forms, layer by layer."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kedit import locate
from kedit.arch import ModelArch, Site
from kedit.delta import Delta, check_finite
from kedit.errors import KEditWarning
from kedit.ledger import Ledger
from kedit.moments import SecondMoments
from kedit.optimise import Values
from kedit.regularizers.base import needs_of as needs_of
from kedit.request import Request


@dataclass(frozen=True)
class Insertion:
    """What a closed form sees of one layer.

    Attributes:
        layer: the block.
        keys: down-projection inputs at the subject's last token, per edit and context, [E, C, I]; context 0 is the
            bare prompt.
        residual: what the site's output shall change by on the bare prompt, this layer's share, [E, O].
        weight: W as it is now, [O, I].
        moments: second moments of the edited layers.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    weight: Tensor
    moments: SecondMoments


class Method(Protocol):
    """What the pipeline asks of an editor."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """Where values are optimised."""
        ...

    def share(self, config: Any, layer: int) -> float:
        """The residual is divided by this at ``layer``."""
        ...

    def solve(self, insertion: Insertion, config: Any) -> Delta:
        """The update of one layer's weight."""
        ...


@dataclass
class Timer:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def warn_of_known(requests: Sequence[Request], values: Values) -> None:
    """Warn of edits whose target the model says already."""
    for request, known in zip(requests, values.known, strict=True):
        if known:
            warnings.warn(
                f"The model already continues {request.edit.text!r} with {request.edit.target_new!r}; the edit changes "
                "little.",
                KEditWarning,
                stacklevel=3,
            )


def spread(
    arch: ModelArch, method: Method, requests: Sequence[Request], values: Values, config: Any, moments: SecondMoments
) -> dict[str, Delta]:
    """Write the values into the layers, lowest first, each seeing the layers below it as already changed.

    The weights are changed on the way and are as before when this returns or raises.

    Returns:
        The updates by parameter name, in the work dtype.
    """
    deltas: dict[str, Delta] = {}
    site = method.sites(config)[0]
    bare = [request.rewrite[0] for request in requests]
    rows = [row for request in requests for row in request.rewrite]
    layers: tuple[int, ...] = config.layers
    with Ledger.of(arch.model).scratch([arch.weight(layer) for layer in layers[:-1]]):
        for number, layer in enumerate(layers):
            keys = locate.keys(arch, rows, layer).unflatten(0, (len(requests), -1))
            residual = values.delta[:, 0]
            if number > 0:  # what is below has changed the site's output; measure what is left to write
                residual = values.value[:, 0] - locate.outputs(arch, bare, site).to(residual.device)
            weight = arch.weight(layer)
            insertion = Insertion(layer, keys, residual / method.share(config, layer), weight.matrix, moments)
            delta = method.solve(insertion, config).to(weight.parameter.device, arch.work_dtype)
            deltas[weight.name] = check_finite(weight.name, delta)
            if layer != layers[-1]:
                overwrite(arch, {weight.name: delta})
    return deltas


@torch.no_grad()
def overwrite(arch: ModelArch, deltas: Mapping[str, Delta]) -> None:
    """Add updates to the weights inside :meth:`Ledger.scratch`, without bookkeeping."""
    for name, delta in deltas.items():
        weight = arch.weight_of(name)
        total = weight.matrix.to(arch.work_dtype) + delta.dense
        weight.parameter.copy_(total.T if weight.transposed else total)


def describe(value: Any) -> dict[str, Any]:
    """A regularizer as JSON: its name, class and fields."""
    fields = vars(value) if dataclasses.is_dataclass(value) else {}
    plain = {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in fields.items()}
    return {"name": value.name, "class": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
