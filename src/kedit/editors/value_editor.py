"""The base classes of editors that optimise a value and then solve for the update that writes it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from kedit.edit import Edit
from kedit.editors import presets
from kedit.editors.base import Call, Editor
from kedit.editors.config import EditorConfig
from kedit.editors.memory import MemoryEstimate, closed_form_bytes, closed_form_memory
from kedit.editors.result import Timer
from kedit.editors.solve_layers import LayerProblem, solve_layers
from kedit.errors import ConfigError
from kedit.keys.estimate import estimate_moments
from kedit.keys.second_moment import Moment, SecondMoments
from kedit.models import ModelArch, Site
from kedit.patch.delta import Delta
from kedit.prompts.encode import Request
from kedit.regularizers.base import Needs, Regularizer, in_closed_form, needs_of
from kedit.utils.progress import Progress
from kedit.utils.warning import warn_user
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
        contexts: templates with one ``{}`` each, the first of them ``"{}"``; missing: sampled from the model, seeded;
            ``"mixed"``: sampled, and every second one in the model's chat template.
        preset: a file of presets to use in place of those found for the model (docs/defaults.md).
        overrides: single hyper-parameters, before preset and ``config``.
    """

    rounds: ClassVar[int] = 3

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditorConfig | None = None,
        *,
        moments: SecondMoments | Mapping[int, Moment | Tensor] | None = None,
        contexts: Sequence[str] | Literal["mixed"] | None = None,
        preset: str | Path | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, contexts=contexts, preset=preset, **overrides)
        self._moments: SecondMoments | None = None
        if moments is not None:
            self.moments = moments

    # What a child supplies

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Delta:
        """The closed form: the update of one layer's weight, by the hyper-parameters of :attr:`config`."""

    # What a child may replace

    def sites(self) -> tuple[Site, ...]:
        """Name the sites at which values are optimised: the MLP's output of the last edited block. The first is the residual's."""
        return (Site(self.config.layers[-1], "mlp"),)

    def residual_divisor(self, remaining: int) -> float:
        """The number that the residual is divided by where so many layers are left to write, this one included."""
        return 1.0

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """Layers whose second moments the closed form reads: those that are edited, unless a child says ``()``."""
        return self.config.layers

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """Hyper-parameters for a model without a preset, those of the value among them."""
        return {**super().rule(arch), **presets.VALUE_RULE}

    def solving_bytes(self, shape: tuple[int, int], edits: int) -> tuple[int, int]:
        """Bytes that the closed form of one weight [O, I] keeps for later edits, and those it holds meanwhile besides."""
        return closed_form_bytes(shape, edits)

    # What users call

    @property
    def moments(self) -> SecondMoments:
        """Second moments of :attr:`moment_layers`; estimated on first use."""
        if self._moments is None:
            layers, ridge, dtype = self.moment_layers, presets.ridge(self.arch), self.config.compute_dtype
            moments = SecondMoments({})
            if layers:
                moments = estimate_moments(self.arch, self.tokenizer, layers, ridge=ridge, compute_dtype=dtype)
            self._moments = moments  # not before: an interrupted estimate must begin again
        return self._moments

    @moments.setter
    def moments(self, moments: SecondMoments | Mapping[int, Moment | Tensor]) -> None:
        given = moments if isinstance(moments, SecondMoments) else SecondMoments(moments)
        given.check(self.arch, self.moment_layers)
        self._moments = given

    # The steps of an edit

    def updates(self, requests: Sequence[Request], call: Call) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """Optimise the values and solve for the updates that write them; the weights stay as they are."""
        with call.timer.stage("optimise"):
            values = self._optimize(requests, call)
        with call.timer.stage("solve"):
            return solve_layers(self, self.sites()[0], requests, values, call.needs.hold), values.log

    def updates_of_each(self, requests: Sequence[Request], call: Call) -> list[dict[str, Delta]]:
        """The updates that write each request alone; the values are optimised together."""
        values, site = self._optimize(requests, call), self.sites()[0]
        updates = []
        with Progress(len(requests), "solving") as progress:
            for number, request in enumerate(requests):
                updates.append(solve_layers(self, site, [request], values.only(number), call.needs.hold))
                progress.advance()
        return updates

    def _optimize(self, requests: Sequence[Request], call: Call) -> Values:
        chosen = [item for item in call.regularizers if not in_closed_form(item)]
        values = self.engine.optimize(self.sites(), requests, self.config.objective, chosen, call.needs)
        for request, known in zip(requests, values.known, strict=True):
            if known:
                text, target = request.edit.text, request.edit.target_new
                warn_user(f"The model already continues {text!r} with {target!r}; the edit changes little.")
        return values

    def needs(self, regularizers: Sequence[Regularizer]) -> Needs:
        """The activations that some regularizers want to see at :meth:`sites`."""
        sites: object = self.sites()
        if not (isinstance(sites, tuple) and sites and all(isinstance(site, Site) for site in sites)):
            raise ConfigError(
                f"{type(self).__name__}.sites() must return a tuple of kedit.models.Site, at least one; it returned {sites!r}."
            )
        return needs_of(regularizers, sites)

    def largest_wave(self, requests: Sequence[Request], call: Call) -> Footprint:
        """The memory that the optimisation holds at its peak."""
        groups = self._groups(requests)
        dtype = self.config.compute_dtype
        waves = (self.engine.largest_footprint(self.sites(), group, call.needs, dtype) for group in groups)
        return max(waves, key=lambda footprint: footprint.total)

    def memory_of(self, requests: Sequence[Request], call: Call) -> MemoryEstimate:
        """The memory that writing ``requests`` takes: the optimisation, the moments and the closed forms."""
        return closed_form_memory(self, requests, self.config.layers, self.largest_wave(requests, call))

    def _prepare(self, timer: Timer) -> None:
        if self.moment_layers:
            with timer.stage("moments"):
                moments = self.moments
            moments.check(self.arch, self.moment_layers)

    def _provenance(self, edits: Sequence[Edit], call: Call) -> dict[str, Any]:
        known = {} if self._moments is None else {str(i): m.statistics() for i, m in self._moments.items()}
        return {**super()._provenance(edits, call), "moments": known}


class MultiLayerEditor(ValueEditor):
    """Writes a batch of edits into several layers, each of which takes its part of the residual (MEMIT, arXiv:2210.07229)."""

    batched: ClassVar[bool] = True

    def sites(self) -> tuple[Site, ...]:
        """The output of the last edited block, or its MLP's where the block normalises that."""
        return (self.arch.output_site(self.config.layers[-1]),)

    def residual_divisor(self, remaining: int) -> float:
        """The number of layers left to write."""
        return float(remaining)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """The blocks around ROME's, up to five of them."""
        return {**super().rule(arch), "layers": presets.layer_span_rule(arch)}
