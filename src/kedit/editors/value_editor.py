"""The base class of editors that optimise a value and then solve for the update that writes it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kedit.edit import Edit
from kedit.editors import presets
from kedit.editors.base import Editor
from kedit.editors.config import EditorConfig, Settings, check_sites
from kedit.editors.memory import DOUBLE, MemoryEstimate, closed_form_memory
from kedit.editors.solve_layers import LayerProblem, Timer, solve_layers, warn_of_known
from kedit.keys.estimate import estimate_moments
from kedit.keys.second_moment import RIDGE, Moment, SecondMoments
from kedit.models import ModelArch, Site
from kedit.patch.delta import Delta
from kedit.prompts.encode import Request
from kedit.regularizers import Choice
from kedit.utils.progress import Progress
from kedit.values.memory import Footprint
from kedit.values.optimize import StepLog, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ValueEditor(Editor):
    """Optimises a value per edit, then writes it into each layer by a closed form.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        config: all hyper-parameters; missing: the model's preset.
        moments: second moments by layer, used as they are; missing: estimated from the default corpus and cached.
        contexts: templates with one ``{}`` each, the first of them ``"{}"``; missing: sampled from the model, seeded.
        overrides: single hyper-parameters, before preset and ``config``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditorConfig | None = None,
        *,
        moments: SecondMoments | Mapping[int, Moment | Tensor] | None = None,
        contexts: Sequence[str] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, contexts=contexts, **overrides)
        self._moments: SecondMoments | None = None
        if moments is not None:
            self.moments = moments

    # What a child supplies

    @abstractmethod
    def sites(self, config: Any) -> tuple[Site, ...]:
        """Where values are optimised; the first is where the residual is measured."""

    @abstractmethod
    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The closed form: the update of one layer's weight."""

    def residual_divisor(self, config: Any, layer: int) -> float:
        """What the residual is divided by at ``layer``: 1 unless a child spreads it over several layers."""
        return 1.0

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """Layers whose second moments the closed form reads: those that are edited, unless a child says ``()``."""
        return self.config.layers

    # What users call

    @property
    def moments(self) -> SecondMoments:
        """Second moments of :attr:`moment_layers`; estimated on first use."""
        if self._moments is None:
            layers, ridge = self.moment_layers, presets.ridge(self.arch) or RIDGE
            known = estimate_moments(self.arch, self.tokenizer, layers, ridge=ridge) if layers else SecondMoments({})
            self._moments = known
        return self._moments

    @moments.setter
    def moments(self, moments: SecondMoments | Mapping[int, Moment | Tensor]) -> None:
        found = moments if isinstance(moments, SecondMoments) else SecondMoments(moments)
        found.check(self.arch, self.moment_layers)
        self._moments = found

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """Hyper-parameters for a model without a preset, those of the value among them."""
        return {**super().rule(arch), **presets.VALUE_RULE}

    # What a child may replace

    def solving_bytes(self, shape: tuple[int, int], edits: int, contexts: int) -> tuple[int, int]:
        """Bytes that the closed form of one weight [O, I] keeps for later edits, and those it holds meanwhile besides."""
        square, keys = DOUBLE * shape[1] ** 2, DOUBLE * edits * shape[1]
        if edits < shape[1]:  # the moment in float64 on the way to its factor; or systems in the number of edits
            return square, max(square, 4 * keys + 3 * DOUBLE * edits**2)
        return 0, 4 * square + 3 * keys

    def largest_wave(self, requests: Sequence[Request], settings: Settings) -> Footprint:
        """The memory that the optimisation holds at its peak."""
        together = [requests] if self.batched else [[request] for request in requests]
        found = (self.engine.largest_footprint(settings.sites, group, settings.needs) for group in together)
        return max(found, key=lambda footprint: footprint.total)

    def write(
        self, requests: Sequence[Request], settings: Settings, timer: Timer
    ) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """The updates that write ``requests`` into the model as it is, and the log; the weights are left as they are."""
        with timer.stage("optimise"):
            values = self._optimize(requests, settings)
        with timer.stage("solve"):
            return self._solve_layers(requests, values, settings), values.log

    def propose_deltas(self, requests: Sequence[Request], settings: Settings) -> list[dict[str, Delta]]:
        """The updates that write each request alone."""
        values = self._optimize(requests, settings)
        found = []
        with Progress(len(requests), "solving") as progress:
            for number, request in enumerate(requests):
                found.append(self._solve_layers([request], values.only(number), settings))
                progress.advance()
        return found

    def memory_of(self, requests: Sequence[Request], settings: Settings) -> MemoryEstimate:
        """The memory that writing ``requests`` takes: the optimisation, the moments and the closed forms."""
        return closed_form_memory(self, requests, settings.config.layers, self.largest_wave(requests, settings))

    # Inside

    def _settings(self, regularizer: Choice) -> Settings:
        settings = super()._settings(regularizer)
        return replace(settings, sites=check_sites(type(self).__name__, self.sites(settings.config)))

    def _prepare(self, timer: Timer) -> None:
        if self.moment_layers:
            with timer.stage("moments"):
                moments = self.moments
            moments.check(self.arch, self.moment_layers)

    def _optimize(self, requests: Sequence[Request], settings: Settings) -> Values:
        values = self.engine.optimize(
            settings.sites, requests, settings.config.objective, settings.regularizers, settings.needs
        )
        warn_of_known(requests, values)
        return values

    def _solve_layers(self, requests: Sequence[Request], values: Values, settings: Settings) -> dict[str, Delta]:
        return solve_layers(self.arch, self, requests, values, settings.config, self.moments)

    def _provenance(self, edits: Sequence[Edit], settings: Settings) -> dict[str, Any]:
        known = {} if self._moments is None else {str(i): m.figures() for i, m in self._moments.items()}
        return {**super()._provenance(edits, settings), "moments": known}
