"""Running the prompts of several edits with a value δ injected at each subject's last token.

:class:`Wave` says which prompts run and what is read of them; :class:`Runner` executes it as full forward passes,
and :mod:`kedit.values.cached_forward` as prefix-cached ones, without what cannot change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kedit.errors import CaptureError, UnsupportedError
from kedit.models import ModelArch, Site
from kedit.models.hooks import by_prompt, inference_state, on_output
from kedit.prompts.encode import Prompt, Role
from kedit.prompts.tokenize import pad
from kedit.regularizers.base import Activations, Needs, mean_by_edit

if TYPE_CHECKING:
    from kedit.capture import AttentionCapture


@dataclass(frozen=True)
class Wave:
    """The prompts of E edits that are optimised together, ordered by edit."""

    prompts: tuple[Prompt, ...]
    num_edits: int

    @property
    def facts(self) -> Tensor:
        """Number of facts of each edit, [E]."""
        counts = [1] * self.num_edits
        for prompt in self.prompts:
            counts[prompt.edit] = max(counts[prompt.edit], prompt.fact + 1)
        return torch.tensor(counts)

    def select(self, keep: Sequence[int]) -> tuple[Wave, list[int]]:
        """The wave of the edits ``keep`` (renumbered in order), and the indices of the prompts that stay."""
        number = {old: new for new, old in enumerate(keep)}
        stays = [i for i, prompt in enumerate(self.prompts) if prompt.edit in number]
        prompts = tuple(replace(self.prompts[i], edit=number[self.prompts[i].edit]) for i in stays)
        return Wave(prompts, len(number)), stays


@dataclass(frozen=True)
class Reading:
    """The result of one forward pass.

    Attributes:
        logits: [N, V] at every wanted position, prompt by prompt, position by position.
        rewrite: what the regularizers asked for of the edits' prompts.
        extra: the same of the regularizers' own prompts.
        initial: [E, S, H], the sites' output at the bare prompt's subject-last token, before δ; of several facts, the mean.
    """

    logits: Tensor
    rewrite: Activations
    extra: Activations
    initial: Tensor


@dataclass(frozen=True)
class Reads:
    """Indices of the N read positions, by what each is read for.

    Attributes:
        target: the positions that predict target tokens, as indices into N; the next four belong to these.
        label: the token to predict.
        edit: its edit.
        weight: its share of the edit's NLL: 1 / (tokens of the target · contexts of the fact).
        bare: whether it belongs to a bare prompt.
        subject: [E], the positions that end the KL prompts.
        last: [P], the position of each prompt at which regularizers read.
        further: the positions that predict target tokens after prompts about other subjects; the next three belong to these.
        further_label: the token to predict.
        further_prompt: its prompt.
        further_weight: 1 / (tokens of the target).
    """

    target: Tensor
    label: Tensor
    edit: Tensor
    weight: Tensor
    bare: Tensor
    subject: Tensor
    last: Tensor
    further: Tensor
    further_label: Tensor
    further_prompt: Tensor
    further_weight: Tensor

    @classmethod
    def of(cls, wave: Wave, device: torch.device) -> Reads:
        """Number the read positions of a wave, prompt by prompt."""
        target: list[int] = []
        label: list[int] = []
        edit: list[int] = []
        weight: list[float] = []
        bare: list[bool] = []
        subject: list[int] = []
        last: list[int] = []
        further: list[int] = []
        further_label: list[int] = []
        further_prompt: list[int] = []
        further_weight: list[float] = []
        contexts = Counter((prompt.edit, prompt.fact) for prompt in wave.prompts if prompt.role is Role.REWRITE)
        count = 0
        for number, prompt in enumerate(wave.prompts):
            first = count + prompt.reads.index(prompt.last)
            last.append(first)
            if prompt.role is Role.REWRITE:
                labels = prompt.row.labels
                target += range(first, first + len(labels))
                label += labels
                edit += [prompt.edit] * len(labels)
                weight += [1 / (len(labels) * contexts[prompt.edit, prompt.fact])] * len(labels)
                bare += [prompt.context == 0] * len(labels)
            elif prompt.role is Role.EXTRA and prompt.row.labels:
                labels = prompt.row.labels
                further += range(first, first + len(labels))
                further_label += labels
                further_prompt += [number] * len(labels)
                further_weight += [1 / len(labels)] * len(labels)
            if prompt.role is Role.KL or prompt.subject:
                subject.append(count)
            count += len(prompt.reads)

        def tensor(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)  # with its dtype also where there are none

        return cls(
            tensor(target),
            tensor(label),
            tensor(edit),
            tensor(weight, torch.float64),
            tensor(bare, torch.bool),
            tensor(subject),
            tensor(last),
            tensor(further),
            tensor(further_label),
            tensor(further_prompt),
            tensor(further_weight, torch.float64),
        )


@dataclass
class Layout:
    """A wave as tensors, on the device of the model's input.

    Attributes:
        inputs: keyword arguments of the model's forward.
        keep: [P, Tq] bool, positions whose logits are read.
        subject_last: [P], position of the subject's last token among the queries.
        last: [P], position at which regularizers read, among the queries.
        column: [P], column of the subject's last token among the keys.
        edit: [P], the edit of each prompt.
        context: [P], number of the context (or extra prompt).
        bare: [B], the bare prompts: one per edit, or of an edit with several facts one per fact.
        roles: the prompts with each role.
    """

    inputs: dict[str, Any]
    keep: Tensor
    subject_last: Tensor
    last: Tensor
    column: Tensor
    edit: Tensor
    context: Tensor
    bare: Tensor
    roles: dict[Role, Tensor]
    _moved: dict[torch.device, Layout] = field(default_factory=dict)

    def on(self, device: torch.device) -> Layout:
        """The same for a module on another device; the inputs and the roles stay."""
        if device == self.subject_last.device:
            return self
        if device not in self._moved:
            names = ("keep", "subject_last", "last", "column", "edit", "context", "bare")
            self._moved[device] = replace(self, **{name: getattr(self, name).to(device) for name in names})
        return self._moved[device]

    @classmethod
    def of(
        cls,
        wave: Wave,
        inputs: dict[str, Any],
        skip: Sequence[int],
        prefix: int,
        width: int,
        device: torch.device,
    ) -> Layout:
        """Lay ``wave`` out when ``skip[i]`` tokens of prompt i are left out and ``prefix`` stored keys stand first."""
        keep = torch.zeros((len(wave.prompts), width), dtype=torch.bool)
        for i, prompt in enumerate(wave.prompts):
            keep[i, [position - skip[i] for position in prompt.reads]] = True

        def tensor(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        numbered = list(enumerate(wave.prompts))
        lookup = tensor(p.row.subject_last - skip[i] for i, p in numbered)
        return cls(
            inputs={k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()},
            keep=keep.to(device),
            subject_last=lookup,
            last=tensor(p.last - skip[i] for i, p in numbered),
            column=lookup + prefix,
            edit=tensor(p.edit for p in wave.prompts),
            context=tensor(p.context for p in wave.prompts),
            bare=tensor(i for i, p in numbered if p.role is Role.REWRITE and p.context == 0),
            roles={role: tensor(i for i, p in numbered if p.role is role) for role in Role},
        )


class Runner:
    """Full forward passes: whole prompts through the whole model at every step, which every model supports.

    Of a model that lies on several devices, everything read is brought to the one that its input goes to (``device``).

    Use: ``with runner.installed(): reading = runner.run(delta)``, as often as wanted.
    """

    def __init__(
        self, arch: ModelArch, sites: Sequence[Site], wave: Wave, needs: Needs, *, width: int = 0, prefix: int = 0
    ) -> None:
        self.arch = arch
        self.sites = tuple(sites)
        self.wave = wave
        self.needs = needs
        self.device = arch.input_device
        self._delta: Tensor | None = None
        self._initial: dict[Site, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        self._capture: AttentionCapture | None = None
        # Tokens per prompt and stored keys before them; they stay when edits leave, so that rows captured at
        # different steps line up. Given, they are at least so many.
        self.width, self.prefix = width, prefix
        self.lay_out()

    def lay_out(self) -> None:
        """Turn the wave into tensors."""
        self._layout = self._lay_out()
        self.reads = Reads.of(self.wave, self.device)

    def length(self, prompt: Prompt) -> int:
        """How many of a prompt's tokens run at each step."""
        return len(prompt.tokens)

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of stored hidden states, and of stored keys and values: none, as everything is computed anew."""
        return 0, 0

    def _lay_out(self) -> Layout:
        ids, mask = pad([prompt.tokens for prompt in self.wave.prompts], width=self.width)
        self.width = ids.shape[1]
        skip = [0] * len(self.wave.prompts)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return Layout.of(self.wave, inputs, skip, self.prefix, self.width, self.device)

    def restrict(self, keep: Sequence[int]) -> list[int]:
        """Drop all edits but ``keep`` (renumbered in order); returns the indices of the prompts that stay."""
        self.wave, stays = self.wave.select(keep)
        self.lay_out()
        return stays

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks and attention capture in place, weights without gradient; everything is put back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(inference_state(self.arch.model))
            self._install(stack)
            for layer in self._layers(self.needs.hidden):
                stack.enter_context(on_output(self.arch.block(layer), partial(self._read_hidden, layer)))
            wanted = {*self._layers(self.needs.attention), *self._layers(self.needs.keys)}
            layers = sorted(filter(self.arch.has_attention, wanted))
            if layers:
                from kedit.capture import capture_attention

                capture = capture_attention(self.arch.model, self._layout.last[:, None], layers=layers)
                self._capture = stack.enter_context(capture)
            try:
                yield
            finally:
                self._capture = None

    def pause_capture(self, paused: bool) -> None:
        """Whether the next passes leave out attention rows and keys, which take a fifth of their time."""
        if self._capture is not None:
            self._capture.paused = paused

    def _install(self, stack: ExitStack) -> None:
        for number, site in enumerate(self.sites):
            stack.enter_context(on_output(self.arch.site(site), partial(self._inject, number, site)))

    def run(self, delta: Tensor) -> Reading:
        """One forward pass with δ [E, S, H] added at each edit's subject-last tokens; gradient flows to δ."""
        logits, rows, initial = self.forward(delta)
        roles, edit = self._layout.roles, self._layout.edit[self._layout.bare]
        if len(edit) > self.wave.num_edits:
            initial = mean_by_edit(initial, edit, self.wave.num_edits)
        return Reading(logits, rows.take(roles[Role.REWRITE]), rows.take(roles[Role.EXTRA]), initial)

    def forward(self, delta: Tensor) -> tuple[Tensor, Activations, Tensor]:
        """The same before it is taken apart by roles: logits, what was captured of all prompts, and v₀ of every bare prompt."""
        layout = self._layout
        self._delta = delta
        self._hidden.clear()
        if self._capture is not None:
            self._capture.positions = layout.last[:, None]
            self._capture.columns = layout.column if self.needs.keys else None
        logits = self.arch.logits(layout.keep, **layout.inputs)
        attention, keys = self._captured()
        rows = Activations(
            edit=layout.edit,
            context=layout.context,
            subject=layout.column,
            attention=attention,
            hidden={layer: hidden.to(self.device) for layer, hidden in self._hidden.items()},
            keys=keys,
            **self.read_logits(logits),
        )
        return logits, rows, self._initial_values()

    def read_logits(self, logits: Tensor) -> dict[str, Any]:
        """What regularizers ask for of the logits [N, V], as fields of ``Activations``."""
        read: dict[str, Any] = {}
        if self.needs.logits:
            read["logits"] = logits[self.reads.last]
        if self.needs.neighbours:
            reads = self.reads
            rows = logits[reads.further].to(torch.promote_types(logits.dtype, torch.float32))
            nll = cross_entropy(rows, reads.further_label, reduction="none") * reads.further_weight.to(rows)
            read["target_nll"] = nll.new_zeros(len(self.wave.prompts)).index_add(0, reads.further_prompt, nll)
        return read

    def backward_chunks(self) -> None:
        """Called after the backward pass of what :meth:`run` gave, to get the gradient to δ where that has not happened."""

    def _captured(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Attention rows [P, A, Tk] and the subject's keys [P, A / G, D] of the last pass, by block."""
        if self._capture is None or self._capture.paused:
            return {}, {}
        captured = self._capture.rows.items()
        rows = {layer: rows[:, :, 0].to(self.device) for layer, rows in captured if layer in self.needs.attention}
        keys = self._capture.keys
        missing = [layer for layer in self._layers(self.needs.keys) if layer not in keys]
        if missing:
            raise CaptureError(
                f"The attention keys of {self.arch.model_type} cannot be read (blocks {missing}): its attention calls no "
                "function that is handed them. Use a regularizer that needs none."
            )
        return rows, {layer: keys[layer].to(self.device) for layer in self._layers(self.needs.keys)}

    def _initial_values(self) -> Tensor:
        """v₀ [B, S, H] of the bare prompts at work, as the last pass saw it."""
        return torch.stack([self._initial[site].to(self.device) for site in self.sites], dim=1)

    def _layers(self, wanted: range) -> list[int]:
        return [layer for layer in range(self.arch.num_layers) if layer in wanted]

    def _inject(self, number: int, site: Site, output: Tensor) -> Tensor:
        assert self._delta is not None
        layout = self._layout.on(output.device)
        tokens = by_prompt(output, len(layout.subject_last))
        where = (torch.arange(len(layout.subject_last), device=output.device), layout.subject_last)
        self._initial[site] = tokens[layout.bare, layout.subject_last[layout.bare]].detach()
        added = self._delta[self._layout.edit, number].to(output.device, output.dtype)
        return tokens.index_put(where, added, accumulate=True).view_as(output)

    def _read_hidden(self, layer: int, output: Tensor) -> None:
        layout = self._layout.on(output.device)
        self._hidden[layer] = output[torch.arange(len(layout.last), device=output.device), layout.last]


def check_gradient(logits: Tensor) -> None:
    """Raise where logits do not depend on δ.

    Raises:
        UnsupportedError: a layer on the way was computed without gradient.
    """
    if not logits.requires_grad:
        raise UnsupportedError(
            "No gradient of the loss reaches the value, so it cannot be optimised: a layer above the edit is computed without "
            "gradient, as quantized layers of some backends are. Load the model in full precision, edit it there, and quantize "
            "the edited model."
        )
