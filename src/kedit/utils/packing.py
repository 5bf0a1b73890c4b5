"""Putting texts of different lengths into batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

FIXED_COST = {
    "cpu": 64,
    "cuda": 1_024,
}  # of a forward pass besides its tokens (weights read, kernels launched), as so many tokens


def fixed_cost(device_type: str) -> int:
    """What a forward pass costs besides its tokens, as so many tokens."""
    return FIXED_COST["cuda" if device_type == "cuda" else "cpu"]


def cut_by_length(lengths: Sequence[int], rows: Sequence[int], fixed: int) -> list[list[int]]:
    """Items that run together, by number: shortest first, cut where the padding saved is worth one more forward pass.

    Args:
        lengths: tokens of each item's rows.
        rows: how many rows each item has.
        fixed: cost of a forward pass besides its tokens, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = [list(group) for _, group in groupby(order, key=lambda i: lengths[i])]
    spans = [lengths[group[0]] for group in groups]
    upto = [0, *accumulate(sum(rows[i] for i in group) for group in groups)]
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first i groups, and where the last cut is
    for i, span in enumerate(spans):
        best.append(min((best[j][0] + fixed + span * (upto[i + 1] - upto[j]), j) for j in range(i + 1)))
    batches, end = [], len(groups)
    while end:
        start = best[end][1]
        batches.append([i for group in groups[start:end] for i in group])
        end = start
    return batches[::-1]
