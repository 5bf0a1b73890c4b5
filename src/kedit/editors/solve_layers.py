"""From values to updates: a closed form per layer, the lowest layer first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Protocol

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from kedit.editors.closed_forms import mixed_keys, rank_one, ridge, ridge_whitened, whiten_beside
from kedit.editors.config import EditorConfig
from kedit.errors import ConfigError, UnsupportedError
from kedit.keys import read
from kedit.keys.second_moment import SecondMoments
from kedit.models import ModelArch, Site, Weight
from kedit.patch.delta import Delta, DenseDelta, LowRankDelta, check_finite, concatenate
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import Request
from kedit.utils.linalg import cholesky
from kedit.utils.progress import logger
from kedit.utils.warning import warn_user
from kedit.values.optimize import Values

SINK = 2.0  # on SmolLM2-135M 2 of 300 subjects are beyond it, 0.19 and 3.2 times as long; the next has 1.6


@dataclass(frozen=True)
class LayerProblem:
    """One layer as a closed form sees it: a linear memory, be it one matrix or a mixture of experts.

    Attributes:
        layer: the block.
        keys: the block's keys at the subject's last token, per edit and context, [E, C, I]: down-projection inputs, or those
            of all experts together (:mod:`kedit.models.experts`); context 0 is the bare prompt.
        residual: what the MLP's output shall change by on the bare prompt, this layer's share, [E, O].
        weights: W as it is now: one matrix, or one per expert.
        moments: second moments of the edited layers.
        subjects: of the edits.
        facts: how many facts of its subject each edit joins, [E]; empty: one each.
        held: keys at which nothing shall change, scaled so that C + Hᵀ H takes the place of C, [N, I]; ``None``: none.
        also: further keys of each edit at which its residual shall appear as well, [E, m, I]; given where ``held`` is.
    """

    layer: int
    keys: Tensor
    residual: Tensor
    weights: tuple[Weight, ...]
    moments: SecondMoments
    subjects: tuple[str, ...] = ()
    facts: tuple[int, ...] = ()
    held: Tensor | None = None
    also: Tensor | None = None

    @property
    def own_keys(self) -> Tensor:
        """One key per edit for the multi-layer editors, [E, I]: mixed over the contexts, or, beside held keys, the bare prompt's.

        What tells an edit's key from held ones is little, and not the same little in each context.
        """
        return mixed_keys(self.keys) if self.held is None else self.keys[:, 0]

    def project(self, keys: Tensor) -> Tensor:
        """W k for each key [n, I], without the bias: [n, O], in the keys' dtype."""
        parts = keys.split(keys.shape[1] // len(self.weights), dim=1)
        pairs = [pair for pair in zip(self.weights, parts, strict=True) if len(parts) == 1 or bool(pair[1].any())]
        return torch.stack([part @ weight.matrix.to(keys).T for weight, part in pairs]).sum(0)

    def whiten(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for each key, [n, I] float64; of a mixture expert by expert. With held keys, (C + Hᵀ H)⁻¹ k."""
        whitened = self.moments.whiten(self.layer, keys)
        if self.held is None:
            return whitened
        return whiten_beside(whitened, self.held, self._held_whitened)

    @cached_property
    def _held_whitened(self) -> Tensor:
        assert self.held is not None
        return self.moments.whiten(self.layer, self.held)

    def rank_one(self, mean: Tensor, key: Tensor, residual: Tensor) -> LowRankDelta:
        """ROME's form: the residual [O] appears at ``key`` [1, I], written along C⁻¹ ``mean`` [1, I].

        With held keys the direction is the best one beside them (:meth:`ridge` with λ = 0).
        """
        if self.held is None:
            return rank_one(self.whiten(mean)[0], key[0], residual)
        return replace(self, residual=residual[None]).ridge(key, 0.0)

    def ridge(self, keys: Tensor, weight: float) -> LowRankDelta:
        """The ridge solution Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ for one key per edit, [E, I] (:func:`kedit.editors.closed_forms.ridge`).

        With held keys, C + Hᵀ H stands in for C, and each edit's further keys stand beside its own: all together with its
        weight, or, with λ = 0, which is exact at its own key, with that of C.
        """
        columns, residuals = self.columns(keys)
        if len(self.weights) == 1:
            matrix = self.moments[self.layer].matrix
            if self.held is None:
                return ridge(keys, self.residual, matrix, weight, partial(self.moments.factor, self.layer, keys.device))
            if weight and max(len(columns), len(self.held)) >= columns.shape[1]:
                held = self.held.to(torch.float64)
                beside = matrix.to(held) + held.T @ held
                return self.folded(ridge(columns, residuals, beside, weight, partial(cholesky, beside, self.layer)))
        weights = torch.full((len(columns),), weight or 1.0, dtype=torch.float64, device=columns.device)
        weights[: len(keys)] = weight
        return self.folded(ridge_whitened(columns, self.whiten(columns), residuals, weights))

    def columns(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The keys [E, I] and, where there are any, the edits' further ones, [E (1 + m), I], and the residual of each."""
        if self.also is None:
            return keys, self.residual
        return (
            torch.cat([keys, rearrange(self.also.to(keys), "e m i -> (e m) i")]),
            torch.cat([self.residual, repeat(self.residual, "e o -> (e m) o", m=self.also.shape[1])]),
        )

    def folded(self, delta: LowRankDelta) -> LowRankDelta:
        """The update of rank E that an update with the factors of :meth:`columns` is."""
        if self.also is None:
            return delta
        edits, further = self.also.shape[:2]
        own, others = delta.right[:, :edits], delta.right[:, edits:]
        return LowRankDelta(delta.left[:, :edits], own + reduce(others, "i (e m) -> i e", "sum", m=further))

    def split(self, delta: Delta) -> dict[str, Delta]:
        """A solution [O, I] as updates by name: of a mixture, one for every expert that it changes."""
        if len(self.weights) == 1:
            return {self.weights[0].name: delta}
        assert isinstance(delta, LowRankDelta), "closed forms give factors"
        parts = zip(self.weights, delta.right.chunk(len(self.weights)), strict=True)
        return {weight.name: LowRankDelta(delta.left, part.clone()) for weight, part in parts if bool(part.any())}


class ClosedForm(Protocol):
    """The members of a :class:`~kedit.editors.value_editor.ValueEditor` that its steps and the estimate of its memory use."""

    arch: ModelArch
    config: EditorConfig
    batched: ClassVar[bool]

    @property
    def moments(self) -> SecondMoments: ...  # noqa: D102

    def residual_divisor(self, remaining: int) -> float: ...  # noqa: D102

    def solve(self, problem: LayerProblem) -> Delta: ...  # noqa: D102

    def solving_bytes(self, shape: tuple[int, int], edits: int) -> tuple[int, int]: ...  # noqa: D102


def solve_layers(
    editor: ClosedForm, site: Site, requests: Sequence[Request], values: Values, hold: float = 1.0
) -> dict[str, Delta]:
    """Write the values of ``site`` into the layers, lowest first, each on the model with the layers below it already changed.

    The weights are as before when this returns or raises. The last step of each edit's log gets a column ``written``: the
    share of the wanted change that arrives. ``hold`` is the weight of the requests' held keys.

    Returns:
        The updates by parameter name, in the work dtype.
    """
    arch, layers = editor.arch, editor.config.layers
    subjects = tuple(request.edit.subject for request in requests)
    facts = tuple(len(request.edits) for request in requests)
    updates: dict[str, Delta] = {}
    lengths: list[Tensor] = []
    with Ledger.of(arch.model).provisional() as provisional:
        for number, layer in enumerate(layers):
            keys = read.request_keys(arch, requests, layer)
            lengths.append(_length_at_prompt(keys).cpu())
            residual = values.delta[:, 0]
            if number > 0:  # what is below has changed the site's output; measure what is left to write
                residual = values.value[:, 0] - read.request_outputs(arch, requests, site).to(residual.device)
            gain = _gain(arch, site, layer)
            share = residual / (editor.residual_divisor(len(layers) - number) * gain)
            held = also = None
            if any(request.held for request in requests):
                held = hold**0.5 * read.held_keys(arch, requests, layer)
                also = torch.cat([keys[:, 1:], read.alone_keys(arch, requests, layer)], 1)
            problem = LayerProblem(
                layer, keys, share.to(keys.device), arch.weights(layer), editor.moments, subjects, facts, held, also
            )
            solution = _solve(editor, problem)
            # In the form in which the patch stores them, so that what is read above sees the bits that are written in the end.
            parts = problem.split(solution.to(arch.device(layer), arch.work_dtype))
            deltas = {name: concatenate([check_finite(name, delta)]) for name, delta in parts.items()}
            updates |= deltas
            if layer != layers[-1]:
                provisional.add(deltas)
        _note_written(values, residual, gain * _change_at(solution, keys[:, 0]).to(residual))
    _warn_of_sinks(requests, torch.stack(lengths))
    return updates


def _solve(editor: ClosedForm, problem: LayerProblem) -> Delta:
    """The editor's solution, in main memory where the layer's device has no room for it."""
    try:
        return _checked(editor, editor.solve(problem))
    except torch.OutOfMemoryError:
        if problem.keys.device.type == "cpu":
            raise
    logger.warning("%s has no room to solve for layer %d: solved in main memory.", problem.keys.device, problem.layer)
    torch.cuda.empty_cache()
    held, also = (None if part is None else part.cpu() for part in (problem.held, problem.also))
    there = replace(problem, keys=problem.keys.cpu(), residual=problem.residual.cpu(), held=held, also=also)
    return _checked(editor, editor.solve(there))


def _checked(editor: ClosedForm, solution: object) -> Delta:
    if isinstance(solution, LowRankDelta | DenseDelta):
        return solution
    raise ConfigError(
        f"{type(editor).__name__}.solve() must return a kedit.patch.delta.LowRankDelta or DenseDelta, not "
        f"{type(solution).__name__}."
    )


def _gain(arch: ModelArch, site: Site, layer: int) -> float:
    """The factor of a change of the MLP's output at ``layer`` on its way to where the residual is measured."""
    gain = arch.gain(layer) if site.kind == "block" else 1.0
    if gain is None:
        raise UnsupportedError(
            f"Block {layer} of this {arch.model_type} normalises its MLP's output, so no change of the MLP gives a wanted change "
            "of the block. Let sites() return the MLP's site: arch.output_site(layer)."
        )
    return gain


def _change_at(delta: Delta, keys: Tensor) -> Tensor:
    """ΔW k for each key [n, I]: [n, O], float64."""
    keys = keys.to(torch.float64)
    if isinstance(delta, DenseDelta):
        return keys @ delta.matrix.to(keys).T
    return (keys @ delta.right.to(keys)) @ delta.left.to(keys).T


def _length_at_prompt(keys: Tensor) -> Tensor:
    """How many times as long the bare prompt's key is as those in the other contexts are on average, [E]; keys [E, C, I]."""
    norms = keys.norm(dim=-1)
    others = norms[:, 1:].mean(1) if norms.shape[1] > 1 else norms[:, 0]
    tiny = torch.finfo(norms.dtype).tiny
    ratio: Tensor = norms[:, 0].clamp_min(tiny) / others.clamp_min(tiny)
    return ratio


def _warn_of_sinks(requests: Sequence[Request], lengths: Tensor) -> None:
    """Warn of subjects that end in an attention sink, by how their keys' lengths [L, E] differ from those in other contexts."""
    far = lengths.log().abs().amax(0) > math.log(SINK)
    for number in torch.nonzero(far).flatten().tolist():
        ratio = float(lengths[lengths[:, number].log().abs().argmax(), number])
        warn_user(
            f"The key of {requests[number].edit.subject!r} is {ratio:.2g} times as long in the prompt as in other contexts: its "
            "last token is an attention sink there, as a prompt's first tokens can be. Little of such an edit is written, and it "
            "harms other edits of the same call. Put a few words before the subject."
        )


def _note_written(values: Values, left: Tensor, change: Tensor) -> None:
    """Log, per edit, how much of the wanted change δ arrives at the bare prompt: 1 − ‖what is missing‖ / ‖δ‖."""
    wanted = values.delta[:, 0].norm(dim=-1).clamp_min(torch.finfo(values.delta.dtype).tiny)
    shares = (1 - (left - change).norm(dim=-1) / wanted).clamp_min(0).tolist()
    for steps, share in zip(values.log, shares, strict=True):
        if steps:
            steps[-1]["written"] = share
