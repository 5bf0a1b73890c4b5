"""Reading keys and outputs at the subject's last token, no further up and no further right than needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit.arch import ModelArch, Site
from kedit.batch import Row, pad
from kedit.hooks import StopForward, on_input, on_output, stops_early
from kedit.runner import inference_state

TOKENS_PER_PASS = 16_384


def keys(arch: ModelArch, rows: Sequence[Row], layer: int) -> Tensor:
    """The down-projection's input at the subject's last token of every row, [P, I], in the work dtype."""
    return _read(arch, rows, arch.down(layer), before=True)


def outputs(arch: ModelArch, rows: Sequence[Row], site: Site) -> Tensor:
    """The site's output at the subject's last token of every row, [P, H], in the work dtype."""
    return _read(arch, rows, arch.site(site), before=False)


@torch.no_grad()
def _read(arch: ModelArch, rows: Sequence[Row], module: torch.nn.Module, *, before: bool) -> Tensor:
    """What comes before or after ``module`` at each row's lookup token.

    Later tokens cannot change it, so rows end there; the pass ends at the module.
    """
    device = arch.input_device
    found: list[Tensor] = []
    with inference_state(arch.model):
        for part in packed(rows, TOKENS_PER_PASS):
            ids, mask = pad([row.ids[: row.lookup + 1] for row in part])
            last = torch.tensor([row.lookup for row in part])

            def take(tensor: Tensor, last: Tensor = last) -> None:
                found.append(tensor[torch.arange(len(last)), last.to(tensor.device)].to(arch.work_dtype))
                raise StopForward

            hooked = on_input(module, take) if before else on_output(module, take)
            with hooked, stops_early():
                arch.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return torch.cat(found)


def packed(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Rows in order, cut into parts that hold at most ``tokens`` tokens when padded (one row at least)."""
    parts: list[list[Row]] = []
    width = 0
    for row in rows:
        length = row.lookup + 1
        if parts and max(width, length) * (len(parts[-1]) + 1) <= tokens:
            parts[-1].append(row)
            width = max(width, length)
        else:
            parts.append([row])
            width = length
    return parts
