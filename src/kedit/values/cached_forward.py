"""Running a wave without what cannot change: only blocks above the edit, only tokens from the subject's last token on.

δ is added at one token of one block. Blocks below it and tokens before it are the same at every step, so one pass
without gradient stores the hidden states entering the first affected block and the keys and values of the earlier
tokens in the blocks above; every step then runs the rest against them. The model's own forward does the work: blocks
below pass their input through, and a cache that never grows hands out the stored keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kedit.models import ModelArch, Site
from kedit.models.compat import cache_argument
from kedit.models.hooks import StopForward, by_prompt, of_this_thread, on_input, on_output, stops_early
from kedit.prompts.encode import Prompt
from kedit.prompts.tokenize import pad
from kedit.regularizers.base import Needs
from kedit.values.forward import Layout, Runner, Wave


class _Recording(DynamicLayer):
    """Keeps the keys and values of one pass, or forgets them at once."""

    def __init__(self, wanted: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted = wanted
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.wanted:
            self.seen = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Prefix(DynamicLayer):
    """Stored keys and values [P, heads, prefix, D] in front of those of the running tokens; nothing is added to it."""

    def __init__(self, length: int, stored: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.stored = stored
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.stored is not None
        keys, values = self.stored
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        return self.length


def _gain_above(arch: ModelArch, sites: Sequence[Site]) -> float | None:
    """The factor of δ when it is added to the input of the block above; ``None`` where that is not the same."""
    if len(sites) != 1 or sites[0].kind == "attention":
        return None
    return 1.0 if sites[0].kind == "block" else arch.gain(sites[0].layer)


def first_block(arch: ModelArch, sites: Sequence[Site]) -> int:
    """The lowest block that must run when only δ at ``sites`` changes; below it nothing can be read either."""
    above = _gain_above(arch, sites) is not None
    return sites[0].layer + 1 if above else min(site.layer for site in sites)


class CachedRunner(Runner):
    """A :class:`~kedit.values.forward.Runner` that computes only what depends on δ.

    Where the site's output joins the residual stream unchanged or times a constant, δ is added to the input of the block
    above and the edited block does not run either (``start`` is then the block above).
    """

    def __init__(
        self, arch: ModelArch, sites: Sequence[Site], wave: Wave, needs: Needs, *, width: int = 0, prefix: int = 0
    ) -> None:
        self._gain = _gain_above(arch, sites)
        self.start = first_block(arch, sites)
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._entering: Tensor | None = None
        self._initials: Tensor | None = None
        self._tuples: set[int] = set()  # blocks that return a tuple
        super().__init__(arch, sites, wave, needs, width=width, prefix=prefix)

    def _lay_out(self) -> Layout:
        prompts = self.wave.prompts
        skip = [prompt.row.subject_last for prompt in prompts]
        ids, mask = pad([prompt.tokens[prompt.row.subject_last :] for prompt in prompts], width=self.width)
        self.width, self.prefix = ids.shape[1], max(self.prefix, *skip)
        lengths = torch.tensor(skip)
        before = (
            torch.arange(self.prefix)[None] >= self.prefix - lengths[:, None]
        )  # right-aligned against the running tokens
        position = lengths[:, None] + torch.arange(ids.shape[1])
        last = torch.tensor([len(prompt.tokens) - 1 for prompt in prompts])
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.cat([before.long(), mask], 1),
            "position_ids": position.minimum(last[:, None]),
            "use_cache": True,
        }
        return Layout.of(self.wave, inputs, skip, self.prefix, self.width, self.device)

    def restrict(self, keep: Sequence[int]) -> list[int]:
        """Drop all edits but ``keep``, and what is stored for the others."""
        bare = self._layout.bare.tolist()
        stays = super().restrict(keep)
        if self._initials is not None:
            self._initials = self._initials[[number for number, prompt in enumerate(bare) if prompt in set(stays)]]
        if self._entering is not None:
            chosen = torch.tensor(stays, device=self._entering.device)
            self._entering = self._entering[chosen]
            for layer, (keys, values) in self._stored.items():
                at = chosen.to(keys.device)
                self._stored[layer] = (keys[at], values[at])
            self._attach_cache()
        return stays

    def length(self, prompt: Prompt) -> int:
        """Those from the subject's last token on."""
        return len(prompt.tokens) - prompt.row.subject_last

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of the stored hidden states, and of the stored keys and values."""
        entering = 0 if self._entering is None else self._entering.nbytes
        return entering, sum(keys.nbytes + values.nbytes for keys, values in self._stored.values())

    def _initial_values(self) -> Tensor:
        assert self._initials is not None
        return self._initials  # read once, by the storing pass

    def _install(self, stack: ExitStack) -> None:
        if self._entering is None:
            self._store()
        for layer in range(self.start):
            stack.enter_context(passing_through(self.arch.block(layer), as_tuple=layer in self._tuples))
        entry = self.arch.block(self.start) if self.start < self.arch.num_layers else self.arch.final_norm
        stack.enter_context(on_input(entry, self._enter))
        if self._gain is None:
            super()._install(stack)

    def _enter(self, _hidden: Tensor) -> Tensor:
        """The stored hidden states [P, Tq, H], with δ at the first token."""
        assert self._entering is not None
        assert self._delta is not None
        if self._gain is None:
            return self._entering
        added = self._delta[self._layout.edit, 0].to(self._entering)
        if self._gain != 1:
            added = added * self._gain
        return torch.cat([(self._entering[:, 0] + added)[:, None], self._entering[:, 1:]], 1)

    @torch.no_grad()
    def _store(self) -> None:
        """One pass over the whole prompts that keeps what the steps need."""
        arch, prompts = self.arch, self.wave.prompts
        ids, mask = pad([prompt.tokens for prompt in prompts])
        skip = torch.tensor([prompt.row.subject_last for prompt in prompts])
        layers = [_Recording(layer >= self.start) for layer in range(arch.num_layers)]
        initial: dict[Site, Tensor] = {}
        bare = self._layout.bare

        def read_initial(site: Site, output: Tensor) -> None:
            tokens = by_prompt(output, len(prompts))
            initial[site] = tokens[bare.to(output.device), skip[bare.cpu()].to(output.device)]

        def read_entering(hidden: Tensor) -> None:
            rows = torch.arange(len(skip), device=hidden.device)[:, None]
            columns = (skip[:, None] + torch.arange(self.width)).clamp(max=hidden.shape[1] - 1).to(hidden.device)
            self._entering = hidden[rows, columns]

        entry = arch.block(self.start) if self.start < arch.num_layers else arch.final_norm
        with stops_early(), ExitStack() as stack:
            stack.enter_context(on_input(entry, read_entering))
            stack.enter_context(on_input(arch.head, _stop))  # no logits are wanted
            for site in self.sites:
                stack.enter_context(on_output(arch.site(site), partial(read_initial, site)))
            for layer in range(self.start):
                stack.enter_context(noting_tuples(arch, layer, self._tuples))
            arch.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=True,
                **cache_argument(arch.model, Cache(layers=list(layers))),
                **({"logits_to_keep": 1} if arch.keeps_logits else {}),
            )
        self._initials = torch.stack([initial[site].to(self.device) for site in self.sites], dim=1)
        for layer in range(self.start, arch.num_layers):
            seen = layers[layer].seen
            assert seen is not None
            self._stored[layer] = (
                _right_aligned(seen[0], skip, self.prefix),
                _right_aligned(seen[1], skip, self.prefix),
            )
        self._attach_cache()

    def _attach_cache(self) -> None:
        cache = Cache(layers=[_Prefix(self.prefix, self._stored.get(layer)) for layer in range(self.arch.num_layers)])
        self._layout.inputs |= cache_argument(self.arch.model, cache)


def _stop(_hidden: Tensor) -> None:
    raise StopForward


def _right_aligned(stored: Tensor, lengths: Tensor, prefix: int) -> Tensor:
    """The first ``lengths[p]`` tokens of [P, heads, T, D], moved to the end of [P, heads, prefix, D]."""
    index = (torch.arange(prefix)[None] - (prefix - lengths[:, None])).clamp(min=0).to(stored.device)
    rows = torch.arange(len(lengths), device=stored.device)[:, None]
    return rearrange(stored[rows, :, index], "p t heads d -> p heads t d").contiguous()


@contextmanager
def noting_tuples(arch: ModelArch, layer: int, tuples: set[int]) -> Iterator[None]:
    """Add the block to ``tuples`` if it returns one inside."""

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            tuples.add(layer)

    handle = arch.block(layer).register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def passing_through(block: nn.Module, *, as_tuple: bool) -> Iterator[None]:
    """The block returns its input inside."""
    own, before, mine = block.__dict__.get("forward"), block.forward, of_this_thread()

    def forward(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        if not mine():
            return before(hidden_states, *args, **named)
        return (hidden_states, None) if as_tuple else hidden_states

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
