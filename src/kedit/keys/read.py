"""Reading keys and outputs at the subject's last token, no further up and no further right than needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from kedit.errors import ArchitectureError
from kedit.models import ModelArch, Site
from kedit.models.hooks import StopForward, by_prompt, inference_state, on_arguments, on_input, on_output, stops_early
from kedit.prompts.encode import Request
from kedit.prompts.tokenize import TokenizedPrompt, pad

TOKENS_PER_PASS = 16_384


@dataclass(frozen=True)
class Routing:
    """The experts that serve some tokens.

    Attributes:
        hidden: what the experts see, [P, H].
        chosen: the router's choice, [P, k].
        weights: the router's weights, [P, k].
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor

    def shares(self) -> list[dict[int, float]]:
        """Per token, the weight of every chosen expert, by its number."""
        pairs = zip(self.chosen.tolist(), self.weights.tolist(), strict=True)
        return [dict(sorted(zip(chosen, weights, strict=True))) for chosen, weights in pairs]


def keys(arch: ModelArch, rows: Sequence[TokenizedPrompt], layer: int) -> Tensor:
    """The down-projection's input at the subject's last token of every row, [P, I], in the work dtype.

    In a mixture of experts, the key of all experts together (:mod:`kedit.models.experts`), [P, N · I].
    """
    experts = arch.experts(layer)
    if experts is None:
        [inputs] = _read(arch, rows, arch.down(layer), on_input)
        return inputs.to(arch.work_dtype)
    routed = routing(arch, rows, layer)
    return experts.keys(routed.hidden, routed.chosen, routed.weights, arch.work_dtype)


def outputs(arch: ModelArch, rows: Sequence[TokenizedPrompt], site: Site) -> Tensor:
    """The site's output at the subject's last token of every row, [P, H], in the work dtype."""
    [vectors] = _read(arch, rows, arch.site(site), on_output)
    return vectors.to(arch.work_dtype)


def request_keys(arch: ModelArch, requests: Sequence[Request], layer: int) -> Tensor:
    """:func:`keys` of every edit in every context, [E, C, I]; of several facts of one subject, their mean."""
    vectors = keys(arch, [row for request in requests for row in request.rewrite], layer)
    if all(len(request.edits) == 1 for request in requests):
        return rearrange(vectors, "(e c) i -> e c i", e=len(requests))
    parts = vectors.split([len(request.rewrite) for request in requests])
    return torch.stack(
        [reduce(p, "(f c) i -> c i", "mean", f=len(r.edits)) for p, r in zip(parts, requests, strict=True)]
    )


def held_keys(arch: ModelArch, requests: Sequence[Request], layer: int) -> Tensor:
    """:func:`keys` of the prompts at which nothing shall change, one after the other, each edit's divided by √n: [E · n, I]."""
    vectors = keys(arch, [row for request in requests for row in request.held], layer)
    counts = torch.tensor([len(request.held) for request in requests for _ in request.held])
    return vectors / counts.to(vectors).sqrt()[:, None]


def alone_keys(arch: ModelArch, requests: Sequence[Request], layer: int) -> Tensor:
    """:func:`keys` of the subject alone in every context, [E, C, I]."""
    vectors = keys(arch, [row for request in requests for row in request.alone], layer)
    return rearrange(vectors, "(e c) i -> e c i", e=len(requests))


def request_outputs(arch: ModelArch, requests: Sequence[Request], site: Site) -> Tensor:
    """:func:`outputs` of every edit's bare prompt, [E, H]; of several facts of one subject, their mean."""
    vectors = outputs(arch, [row for request in requests for row in request.bare], site)
    return torch.stack([part.mean(0) for part in vectors.split([len(request.edits) for request in requests])])


def routing(arch: ModelArch, rows: Sequence[TokenizedPrompt], layer: int) -> Routing:
    """Find the experts of a mixture that serve the subject's last token of every row."""
    experts = arch.experts(layer)
    assert experts is not None, "only mixtures route"
    return Routing(*_read(arch, rows, experts.module, on_arguments))


@torch.no_grad()
def _read(
    arch: ModelArch, rows: Sequence[TokenizedPrompt], module: torch.nn.Module, hook: Callable[..., Any]
) -> list[Tensor]:
    """Read what ``hook`` sees of ``module`` at the subject's last token of each row: per tensor, [P, ...].

    Later tokens cannot change it, so rows end there; the pass ends at the module.
    """
    device = arch.input_device
    batches: list[list[Tensor]] = []
    with inference_state(arch.model):
        for part in packed(rows, TOKENS_PER_PASS):
            ids, mask = pad([row.ids[: row.subject_last + 1] for row in part])
            last = torch.tensor([row.subject_last for row in part])

            def take(*tensors: Tensor, last: Tensor = last) -> None:
                where = torch.arange(len(last))
                batches.append([by_prompt(tensor, len(last))[where, last.to(tensor.device)] for tensor in tensors])
                raise StopForward

            seen = len(batches)
            with hook(module, take), stops_early():
                arch.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            if len(batches) == seen:
                raise ArchitectureError(
                    f"{type(arch.model).__name__} does not call its {type(module).__name__} as a module, so kedit cannot read "
                    "there. (A Bloom model with slow_but_exact, say: switch it off.)"
                )
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def packed(rows: Sequence[TokenizedPrompt], tokens: int) -> list[list[TokenizedPrompt]]:
    """Rows in order, cut into parts that hold at most ``tokens`` tokens when padded (one row at least)."""
    parts: list[list[TokenizedPrompt]] = []
    width = 0
    for row in rows:
        length = row.subject_last + 1
        if parts and max(width, length) * (len(parts[-1]) + 1) <= tokens:
            parts[-1].append(row)
            width = max(width, length)
        else:
            parts.append([row])
            width = length
    return parts
