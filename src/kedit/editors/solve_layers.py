"""From values to updates: the closed forms, layer by layer."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kedit.editors.closed_forms import ridge, ridge_whitened
from kedit.errors import ConfigError, KEditWarning, UnsupportedError
from kedit.keys import read
from kedit.keys.second_moment import SecondMoments
from kedit.models import ModelArch, Site, Weight
from kedit.patch.delta import Delta, DenseDelta, LowRankDelta, check_finite
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import Request
from kedit.regularizers.base import needs_of as needs_of
from kedit.utils.progress import logger
from kedit.values.optimize import Values


@dataclass(frozen=True)
class LayerProblem:
    """What a closed form sees of one layer: a linear memory, be it one matrix or a mixture of experts.

    Attributes:
        layer: the block.
        keys: the block's keys at the subject's last token, per edit and context, [E, C, I]: down-projection inputs, or those
            of all experts together (:mod:`kedit.models.experts`); context 0 is the bare prompt.
        residual: what the MLP's output shall change by on the bare prompt, this layer's share, [E, O].
        weights: W as it is now: one matrix, or one per expert.
        moments: second moments of the edited layers.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    weights: tuple[Weight, ...]
    moments: SecondMoments

    def project(self, keys: Tensor) -> Tensor:
        """W k for each key [n, I], without the bias: [n, O], in the keys' dtype."""
        parts = keys.split(keys.shape[1] // len(self.weights), dim=1)
        pairs = [pair for pair in zip(self.weights, parts, strict=True) if len(parts) == 1 or bool(pair[1].any())]
        return torch.stack([part @ weight.matrix.to(keys).T for weight, part in pairs]).sum(0)

    def whiten(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for each key, [n, I] float64; of a mixture expert by expert."""
        return self.moments.whiten(self.layer, keys)

    def ridge(self, keys: Tensor, weight: float) -> LowRankDelta:
        """The ridge solution Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ for one key per edit, [E, I] (:func:`kedit.editors.closed_forms.ridge`)."""
        if len(self.weights) > 1:
            return ridge_whitened(keys.to(torch.float64), self.whiten(keys), self.residual, weight)
        matrix = self.moments[self.layer].matrix
        return ridge(keys, self.residual, matrix, weight, lambda: self.moments.factor(self.layer, keys.device))

    def split(self, delta: Delta) -> dict[str, Delta]:
        """A solution [O, I] as updates by name: of a mixture, one for every expert that it changes."""
        if len(self.weights) == 1:
            return {self.weights[0].name: delta}
        assert isinstance(delta, LowRankDelta), "closed forms give factors"
        parts = zip(self.weights, delta.right.chunk(len(self.weights)), strict=True)
        return {weight.name: LowRankDelta(delta.left, part.clone()) for weight, part in parts if bool(part.any())}


class Method(Protocol):
    """What the pipeline asks of an editor."""

    def sites(self, config: Any) -> tuple[Site, ...]:
        """Where values are optimised."""
        ...

    def residual_divisor(self, config: Any, layer: int) -> float:
        """The residual is divided by this at ``layer``."""
        ...

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
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


def solve_layers(
    arch: ModelArch, method: Method, requests: Sequence[Request], values: Values, config: Any, moments: SecondMoments
) -> dict[str, Delta]:
    """Write the values into the layers, lowest first, each seeing the layers below it as already changed.

    The weights are changed on the way and are as before when this returns or raises. The last step of each edit's log gets
    a column ``written``: the share of the wanted change that arrives.

    Returns:
        The updates by parameter name, in the work dtype.
    """
    deltas: dict[str, Delta] = {}
    site = method.sites(config)[0]
    bare = [request.rewrite[0] for request in requests]
    rows = [row for request in requests for row in request.rewrite]
    layers: tuple[int, ...] = config.layers
    with Ledger.of(arch.model).scratch() as keep:
        for number, layer in enumerate(layers):
            keys = read.keys(arch, rows, layer).unflatten(0, (len(requests), -1))
            residual = values.delta[:, 0]
            if number > 0:  # what is below has changed the site's output; measure what is left to write
                residual = values.value[:, 0] - read.outputs(arch, bare, site).to(residual.device)
            gain, weights = _gain(arch, site, layer), arch.weights(layer)
            share = residual / (method.residual_divisor(config, layer) * gain)
            insertion = LayerProblem(layer, keys, share.to(keys.device), weights, moments)
            solution = check_solution(method, _solved(method, insertion, config))
            found = insertion.split(solution.to(arch.device(layer), arch.work_dtype))
            deltas |= {name: check_finite(name, delta) for name, delta in found.items()}
            if layer == layers[-1]:
                _note_written(values, residual, gain * change_at(solution, keys[:, 0]).to(residual))
            else:
                keep([arch.weight_of(name) for name in found])
                overwrite(arch, found)
    return deltas


def change_at(delta: Delta, keys: Tensor) -> Tensor:
    """ΔW k for each key [n, I]: [n, O], float64."""
    keys = keys.to(torch.float64)
    if isinstance(delta, DenseDelta):
        return keys @ delta.matrix.to(keys).T
    return (keys @ delta.right.to(keys)) @ delta.left.to(keys).T


def _note_written(values: Values, left: Tensor, change: Tensor) -> None:
    """Log, per edit, how much of the wanted change δ arrives at the bare prompt: 1 − ‖what is missing‖ / ‖δ‖."""
    wanted = values.delta[:, 0].norm(dim=-1).clamp_min(torch.finfo(values.delta.dtype).tiny)
    shares = (1 - (left - change).norm(dim=-1) / wanted).clamp_min(0).tolist()
    for steps, share in zip(values.log, shares, strict=True):
        if steps:
            steps[-1]["written"] = share


def _solved(method: Method, insertion: LayerProblem, config: Any) -> Delta:
    """The method's solution, in main memory where the layer's device has no room for it."""
    try:
        return method.solve(insertion, config)
    except torch.OutOfMemoryError:
        if insertion.keys.device.type == "cpu":
            raise
    logger.warning(
        "%s has no room to solve for layer %d: solved in main memory.", insertion.keys.device, insertion.layer
    )
    torch.cuda.empty_cache()
    here = replace(insertion, keys=insertion.keys.cpu(), residual=insertion.residual.cpu())
    return method.solve(here, config)


def check_solution(method: Method, solution: object) -> Delta:
    """What a closed form returned, or :class:`ConfigError` where it is no update."""
    if isinstance(solution, LowRankDelta | DenseDelta):
        return solution
    raise ConfigError(
        f"{type(method).__name__}.solve() must return a kedit.patch.delta.LowRankDelta or DenseDelta, not "
        f"{type(solution).__name__}."
    )


def _gain(arch: ModelArch, site: Site, layer: int) -> float:
    """What a change of the MLP's output at ``layer`` is multiplied by on its way to where the residual is measured."""
    if site.kind != "block":
        return 1.0
    gain = arch.gain(layer)
    if gain is None:
        raise UnsupportedError(
            f"Block {layer} of this {arch.model_type} normalises its MLP's output, so no change of the MLP gives a wanted change "
            "of the block. Let sites() return the MLP's site: arch.output_site(layer)."
        )
    return gain


@torch.no_grad()
def overwrite(arch: ModelArch, deltas: Mapping[str, Delta]) -> None:
    """Add updates to the weights inside :meth:`Ledger.scratch`, without bookkeeping."""
    for name, delta in deltas.items():
        weight = arch.weight_of(name)
        weight.matrix.copy_(weight.matrix.to(arch.work_dtype) + delta.dense.to(weight.stored.device))


def describe(value: Any) -> dict[str, Any]:
    """A regularizer as JSON: its name, class and fields."""
    fields = vars(value) if dataclasses.is_dataclass(value) else {}
    plain = {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in fields.items()}
    return {"name": value.name, "class": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
