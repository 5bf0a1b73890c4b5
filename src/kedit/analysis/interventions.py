"""Changing activations of single prompts of a batch, at single tokens, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.models import ModelArch, Site
from kedit.models.arch import SiteKind
from kedit.models.hooks import by_prompt, on_output
from kedit.utils.validation import check_whole

# The names in results and plots -> the kind of site.
ACTIVATIONS: dict[str, SiteKind] = {"hidden": "block", "mlp": "mlp", "attention": "attention"}
LABELS = {
    "hidden": "hidden state",
    "mlp": "MLP output",
    "attention": "attention output",
    "weights": "attention weights",
}
_WINDOW_SHARE = 10 / 48  # ROME's window of 10 blocks in GPT-2 XL's 48


@dataclass(frozen=True)
class Change:
    """New values for some tokens of a site's output [B, T, H].

    Attributes:
        rows: prompts of the batch, int64 [N].
        columns: their tokens, int64 [N].
        values: given the output, the new values [N, H].
    """

    rows: Tensor
    columns: Tensor
    values: Callable[[Tensor], Tensor]

    def __call__(self, output: Tensor, prompts: int) -> Tensor:
        """The changed output of so many prompts, [B, T, H] or [B · T, H]; the old one stays as it is."""
        split = by_prompt(output, prompts)
        where = (self.rows.to(output.device), self.columns.to(output.device))
        return split.index_put(where, self.values(split).to(output.device, output.dtype)).view_as(output)


def copy_rows(rows: Tensor, columns: Tensor, sources: Tensor) -> Change:
    """Give the prompts ``rows`` the values that the prompts ``sources`` [N] of the same batch have at ``columns``."""
    return Change(rows, columns, lambda output: output[sources.to(output.device), columns.to(output.device)])


def put_values(rows: Tensor, columns: Tensor, values: Tensor) -> Change:
    """Give the prompts ``rows`` the stored ``values`` [N, H] at ``columns``."""
    return Change(rows, columns, lambda _: values)


@contextmanager
def changing(arch: ModelArch, changes: Mapping[Site, Change]) -> Iterator[None]:
    """The outputs of some sites are changed inside."""
    prompts = 0

    def count(embedded: Tensor) -> None:
        nonlocal prompts
        prompts = len(embedded)

    def run(change: Change) -> Callable[[Tensor], Tensor]:
        return lambda output: change(output, prompts)

    embeddings: Any = arch.model.get_input_embeddings()
    with ExitStack() as stack:
        stack.enter_context(on_output(embeddings, count))
        for site, change in changes.items():
            stack.enter_context(on_output(arch.site(site), run(change)))
        yield


@contextmanager
def reading(arch: ModelArch, sites: list[Site], columns: Tensor) -> Iterator[dict[Site, Tensor]]:
    """Collects the outputs of sites at the tokens ``columns`` [B, R]; column -1 gives what is never used."""
    outputs: dict[Site, Tensor] = {}

    def read(site: Site) -> Callable[[Tensor], None]:
        def take(output: Tensor) -> None:
            at = columns.clamp(min=0).to(output.device)
            split = by_prompt(output, len(at))
            outputs[site] = split[torch.arange(len(at), device=output.device)[:, None], at].cpu()

        return take

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(on_output(arch.site(site), read(site)))
        yield outputs


def window_width(window: int | None, num_layers: int) -> int:
    """The width of windows; by default ROME's, 10 of GPT-2 XL's 48 blocks, in proportion: 1 of 6, 6 of 28.

    Raises:
        ConfigError: it is no whole number from 1 to ``num_layers``.
    """
    return max(1, round(num_layers * _WINDOW_SHARE)) if window is None else check_whole("window", window, 1, num_layers)


def window_of(layer: int, width: int, num_layers: int) -> range:
    """The blocks of a window of ``width`` around ``layer``, cut off at the ends of the model."""
    return range(max(0, layer - width // 2), min(num_layers, layer - (-width // 2)))
