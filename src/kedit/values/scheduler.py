"""Packing edits into waves, choosing how they run, and surviving a lack of memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from kedit.errors import KEditError
from kedit.keys.read import request_outputs
from kedit.models import ModelArch, Site
from kedit.models.compute_copy import compute_dtype, copy_in
from kedit.prompts.prefixes import CANNOT_RUN, disagreement
from kedit.regularizers.base import Needs, Regularizer
from kedit.utils.device_memory import SHARE, TRIM_ABOVE, HeapTrim, free_memory
from kedit.utils.distributed import current_group
from kedit.utils.packing import cut_by_length, fixed_cost
from kedit.utils.progress import Progress, logger
from kedit.utils.validation import check_choice
from kedit.values.cached_forward import CachedRunner, first_block
from kedit.values.chunked_forward import ChunkedForward
from kedit.values.forward import Runner, Wave
from kedit.values.memory import Footprint, UnitCosts
from kedit.values.optimize import Objective, Values, optimize
from kedit.values.split_forward import SplitForward

if TYPE_CHECKING:
    from kedit.prompts.encode import Request

Mode = Literal["auto", "cached", "full"]
TOKENS_PER_WAVE = 8_192


@dataclass
class Engine:
    """Settings of a model's value optimisation.

    Attributes:
        arch: the model.
        mode: ``"cached"`` runs only what depends on δ, ``"full"`` everything; ``"auto"`` is ``"cached"`` where a check
            on the model's first wave finds both to agree, and says so where they do not. Hybrids run everything.
        budget: tokens per wave, padding included. Running out of memory lowers it for good.
        used: the budget of the latest edits, lower where little memory was free; recorded in the patch, as results are
            bit-equal for one budget only.
        halved: how often a lack of memory halved a budget.
    """

    arch: ModelArch
    mode: Mode = "auto"
    budget: int = TOKENS_PER_WAVE
    used: int = TOKENS_PER_WAVE
    halved: int = 0
    _verdicts: dict[tuple[object, ...], bool] = field(default_factory=dict)
    _costs: dict[tuple[object, ...], UnitCosts] = field(default_factory=dict)

    def optimize(
        self,
        sites: Sequence[Site],
        requests: Sequence[Request],
        objective: Objective,
        regularizers: Sequence[Regularizer],
        needs: Needs,
    ) -> Values:
        """The values of all edits, in the order of ``requests``; of several processes each optimises its share.

        Edits of similar length go into one wave, which stays together for all its steps. Where memory runs out, the
        budget is halved and the wave begins again in smaller ones; an edit that exceeds it alone runs in parts.

        With another ``objective.compute_dtype`` than the model's, the passes run on a copy of the model in that dtype; v₀ is
        read of the model itself.

        Raises:
            NonFiniteError: a loss is not finite.
            KEditError: a single prompt does not fit into memory.
        """
        group = current_group()
        order = group.share(_by_span(requests))

        def mine() -> list[tuple[list[int], Values]]:
            if not order:
                return []
            engine = self._computing_in(compute_dtype(self.arch, objective.compute_dtype))
            waves = engine._optimise(sites, requests, order, objective, regularizers, needs)
            if engine is self:
                return waves
            self.budget, self.used, self.halved = engine.budget, engine.used, engine.halved
            return [(numbers, self._with_initial(sites, requests, numbers, values)) for numbers, values in waves]

        if group.size == 1:
            return _in_order(mine())
        device = self.arch.input_device
        shares = group.run_on_all(lambda: [(numbers, values.to("cpu")) for numbers, values in mine()])
        return _in_order([wave for share in shares for wave in share]).to(device)

    def _computing_in(self, dtype: torch.dtype) -> Engine:
        """This engine, or one of a copy of the model in ``dtype``."""
        copied = None if dtype == self.arch.dtype else copy_in(self.arch, dtype)
        return self if copied is None else replace(self, arch=copied)

    def _with_initial(
        self, sites: Sequence[Site], requests: Sequence[Request], numbers: Sequence[int], values: Values
    ) -> Values:
        """Values with v₀ as the model itself computes it: what the closed form measures is rounded no further than its weights."""
        chosen = [requests[number] for number in numbers]
        outputs = [request_outputs(self.arch, chosen, site).to(values.delta) for site in sites]
        return replace(values, initial=torch.stack(outputs, dim=1))

    def _optimise(
        self,
        sites: Sequence[Site],
        requests: Sequence[Request],
        order: Sequence[int],
        objective: Objective,
        regularizers: Sequence[Regularizer],
        needs: Needs,
    ) -> list[tuple[list[int], Values]]:
        """The edits ``order``, wave by wave."""
        self.used = self.budget
        pending: list[list[int]] | None = None  # not packed yet
        rest = list(order)
        footprint: Footprint | None = None
        done: list[tuple[list[int], Values]] = []
        with Progress(len(order), "optimising") as progress:
            while rest:
                numbers = rest[:1]
                try:
                    if pending is None:
                        footprint = self._fit(sites, requests, rest, needs)
                        pending = self._waves(requests, rest)
                    numbers = pending[0]
                    runner = self.runner(sites, _wave(requests, numbers), needs)
                    values = optimize(runner, objective, regularizers, numbers=numbers, progress=progress)
                except torch.OutOfMemoryError as error:
                    alone = len(numbers) == 1
                    if alone and self.used <= requests[numbers[0]].span:  # its prompts run one by one already
                        tokens = max(len(prompt.tokens) for prompt in requests[numbers[0]].prompts(0))
                        raise KEditError(
                            f"Edit {numbers[0]} does not fit into the device's memory, not even one prompt after the other (the "
                            f"longest has {tokens} tokens). Use shorter contexts, or a dtype of 16 bits."
                        ) from error
                else:
                    done.append((numbers, values))
                    rest = [number for wave in pending[1:] for number in wave]
                    pending = pending[1:]
                    if footprint is not None and footprint.total > TRIM_ABOVE:
                        HeapTrim.now()  # or the next stage would come on top of what this one no longer needs
                    continue
                self._halve("Out of memory", _tokens(requests[numbers[0]]) if alone else None)
                self.budget = self.used
                torch.cuda.empty_cache()
                pending = None
        return done

    def _fit(self, sites: Sequence[Site], requests: Sequence[Request], order: Sequence[int], needs: Needs) -> Footprint:
        """Say what the largest wave will hold and return it; halve the budget until that is a fair share of the free memory."""
        # Of a model on several devices, the fullest one decides: how a wave spreads over them is not known.
        free = min(map(free_memory, self.arch.devices))
        while True:
            waves = self._waves(requests, order)
            largest = _largest(requests, waves)
            footprint = self.footprint(sites, _wave(requests, largest), needs)
            alone = requests[largest[0]] if len(largest) == 1 else None
            if footprint.total <= SHARE * free or (alone is not None and self.used <= alone.span):
                break
            reason = f"{footprint} is more than {SHARE:.0%} of the {free / 2**20:,.0f} MiB that are free"
            self._halve(reason, None if alone is None else _tokens(alone))
        level = logging.INFO if footprint.total > 1 << 28 else logging.DEBUG
        logger.log(level, "%d edits in %d wave(s); the largest holds %s.", len(requests), len(waves), footprint)
        return footprint

    def largest_footprint(
        self, sites: Sequence[Site], requests: Sequence[Request], needs: Needs, dtype: str | None = None
    ) -> Footprint:
        """The memory that the largest of the waves of ``requests`` takes, with the copy of the model in ``dtype`` if any."""
        engine = self._computing_in(compute_dtype(self.arch, dtype))
        engine.used = engine.budget
        waves = engine._waves(requests, _by_span(requests))
        footprint = engine.footprint(sites, _wave(requests, _largest(requests, waves)), needs)
        if engine is self:
            return footprint
        return replace(footprint, copy=sum(parameter.nbytes for parameter in engine.arch.model.parameters()))

    def footprint(self, sites: Sequence[Site], wave: Wave, needs: Needs) -> Footprint:
        """The memory that ``wave`` takes at its peak, beside the model."""
        runner = self.runner(sites, wave, needs)
        if isinstance(runner, ChunkedForward):
            return Footprint.in_parts([self._footprint(sites, part) for part in runner.parts])
        return self._footprint(sites, runner)

    def _footprint(self, sites: Sequence[Site], runner: Runner) -> Footprint:
        if isinstance(runner, SplitForward):
            runner = runner.whole
        wave, needs = runner.wave, runner.needs
        # What a token costs depends on how many it attends to, so lengths that differ by more are measured anew.
        length = round(math.log(runner.width + runner.prefix, 1.2))
        key = (self.arch.dtype, tuple(sites), type(runner), needs, length)
        if key not in self._costs:
            self._costs[key] = UnitCosts.measure(self.arch, sites, wave, needs, type(runner))
        return self._costs[key].footprint(wave, runner.width, runner.prefix)

    def _halve(self, reason: str, tokens: int | None = None) -> None:
        """Halve the budget; where one edit of so many tokens runs already, at least so that it runs in two parts."""
        self.used = (self.used if tokens is None else min(self.used, tokens)) // 2
        self.halved += 1
        logger.warning("%s: waves now hold %d tokens.", reason, self.used)

    def runner(self, sites: Sequence[Site], wave: Wave, needs: Needs) -> Runner:
        """The runner that executes ``wave``, by the mode and, for ``"auto"``, by the check of the model.

        One edit that exceeds the budget alone runs in parts.
        """
        whole = self._whole(sites, wave, needs)
        rows = max(1, self.used // whole.width)
        if wave.num_edits == 1 and rows < len(wave.prompts):
            return ChunkedForward(whole, rows)
        return SplitForward(whole) if SplitForward.pays(whole) else whole

    def _whole(self, sites: Sequence[Site], wave: Wave, needs: Needs) -> Runner:
        check_choice("engine.mode", self.mode, get_args(Mode))
        if self.mode == "full" or self.arch.hybrid:
            return Runner(self.arch, sites, wave, needs)
        first = first_block(self.arch, sites)
        if any(wanted and wanted.start < first for wanted in (needs.attention, needs.hidden, needs.keys)):
            logger.info("A regularizer reads blocks below %d, so every prompt runs whole at every step.", first)
            return Runner(self.arch, sites, wave, needs)
        key = (self.arch.dtype, *sites)
        if self.mode == "auto" and key not in self._verdicts:
            self._verdicts[key] = self._check(sites, wave)
        if self.mode == "auto" and not self._verdicts[key]:
            return Runner(self.arch, sites, wave, needs)
        return CachedRunner(self.arch, sites, wave, needs)

    def _waves(self, requests: Sequence[Request], order: Sequence[int]) -> list[list[int]]:
        """Numbers of the edits that run together: of similar length, at most ``budget`` padded tokens (one edit at least)."""
        fixed = fixed_cost(self.arch.input_device.type)
        waves: list[list[int]] = []
        for alike in _alike(requests, order, fixed):
            width = rows = 0
            for number in alike:
                span, count = requests[number].span, len(requests[number].prompts(0))
                if rows and max(width, span) * (rows + count) <= self.used:
                    waves[-1].append(number)
                    width, rows = max(width, span), rows + count
                else:
                    waves.append([number])
                    width, rows = span, count
        return waves

    def _check(self, sites: Sequence[Site], wave: Wave) -> bool:
        """Return whether prefix-cached passes give the logits of full ones on the wave's first edit, with a δ of some size."""
        first, _ = wave.select([0])
        generator = torch.Generator().manual_seed(0)
        shape = (1, len(sites), self.arch.hidden)
        delta = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.arch.input_device)
        logits: list[torch.Tensor] = []
        reason = ""
        try:
            for kind in (Runner, CachedRunner):
                runner = kind(self.arch, sites, first, Needs())
                with runner.installed(), torch.no_grad():
                    if not logits:
                        reading = runner.run(delta.to(self.arch.work_dtype) * 0)
                        delta = delta / delta.norm(dim=-1, keepdim=True) * reading.initial.norm(dim=-1, keepdim=True)
                    logits.append(runner.run(delta.to(self.arch.work_dtype)).logits.to(torch.float64))
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = disagreement(logits[0], logits[1], self.arch.dtype)
        if reason:
            logger.warning(
                "This %s runs full forward passes at every step: prefix-cached passes failed their check (%s).",
                self.arch.model_type,
                reason,
            )
        return not reason


def _alike(requests: Sequence[Request], order: Sequence[int], fixed: int) -> list[list[int]]:
    """``order`` (by span) cut where the padding saved is worth the fixed cost of one more wave, both in tokens."""
    spans = [requests[number].span for number in order]
    rows = [len(requests[number].prompts(0)) for number in order]
    return [[order[i] for i in alike] for alike in cut_by_length(spans, rows, fixed)]


def _by_span(requests: Sequence[Request]) -> list[int]:
    """The edits' numbers, those of similar length side by side."""
    return sorted(range(len(requests)), key=lambda number: (requests[number].span, number))


def _tokens(request: Request) -> int:
    """Tokens that one edit runs, padding included."""
    return request.span * len(request.prompts(0))


def _largest(requests: Sequence[Request], waves: Sequence[list[int]]) -> list[int]:
    return max(waves, key=lambda numbers: len(numbers) * max(requests[number].span for number in numbers))


def _wave(requests: Sequence[Request], numbers: Sequence[int]) -> Wave:
    prompts = [prompt for i, number in enumerate(numbers) for prompt in requests[number].prompts(i)]
    return Wave(tuple(prompts), len(numbers))


def _in_order(done: Sequence[tuple[list[int], Values]]) -> Values:
    """Put the waves' values together in the order of the edits' numbers."""
    numbers = [number for wave, _ in done for number in wave]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    log = [steps for _, values in done for steps in values.log]
    known = [flag for _, values in done for flag in values.known]
    return Values(
        torch.cat([values.delta for _, values in done])[order],
        torch.cat([values.initial for _, values in done])[order],
        [log[i] for i in order],
        [known[i] for i in order],
    )
