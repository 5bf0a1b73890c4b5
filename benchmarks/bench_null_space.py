"""How much room AlphaEdit has for further edits: ``python -m benchmarks.bench_null_space [--model DIR --data FILE ...]``.

Closed forms alone, no edit is made: the keys of facts on the unedited model at an edited block, and per threshold and
number of earlier keys the share of its change that a further edit gets, and the size of its update. Without ``--model``: the
embedded model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.bench_sequential import wordings
from benchmarks.bench_sequential_real import chosen
from torch import Tensor

import kedit
from kedit.bench.suite import Suite
from kedit.editors.closed_forms import (
    NullSpaceRule,
    Past,
    largest_weight,
    mixed_keys,
    null_space,
    null_space_update,
    projected,
)
from kedit.keys.read import request_keys

THRESHOLDS: tuple[tuple[NullSpaceRule, float, float | None], ...] = (  # rule, threshold, λ where it is absolute
    ("fraction", 0.1, None),
    ("fraction", 0.3, None),
    ("fraction", 0.5, None),
    ("fraction", 0.9, None),
    ("absolute", 0.02, 10.0),
    ("mean", 0.1, 0.1),
)
NEW, SHARE = 25, 0.9


def rows(keys: Tensor, moment: Tensor, numbers: Sequence[int]) -> list[str]:
    """Rows of the table; of ``NEW`` further edits the median, each written without the others."""
    lines = []
    for rule, threshold, absolute in THRESHOLDS:
        used, energy = null_space(moment, threshold, rule)
        free, own = keys.shape[1] - used.shape[1], projected(used, keys)
        inside = float((own.square().sum(1) / keys.square().sum(1)).median())
        shares = f"{100 * energy / float(moment.trace()):.0f}, {100 * inside:.0f}"
        if not free:
            lines.append(f"| {rule} {threshold} | 0 | | | | |")
            print(lines[-1], flush=True)
        for number in numbers if free else ():
            new, past = own[number : number + NEW], Past().plus(own[:number]) if number else Past()
            alone = absolute or largest_weight(energy, new.square().sum(1), SHARE)
            weights = [alone] if absolute else [alone, largest_weight_beside(alone, new, past, SHARE)]
            cells = [f"{100 * share:.0f}, {size:.2f}" for share, size in (written(new, past, w) for w in weights)]
            lines.append(f"| {rule} {threshold} | {free} | {shares} | {number} | {' | '.join([*cells, ''][:2])} |")
            print(lines[-1], flush=True)
    return lines


def written(new: Tensor, past: Past, weight: float) -> tuple[float, float]:
    """The median share of an edit's change that it gets, and the median size of its update, times ‖z‖ (1: the smallest one)."""
    shares, sizes = [], []
    for key in new:
        right = null_space_update(key[None], torch.ones(1, 1), weight, past).right[:, 0]
        shares.append(right @ key)
        sizes.append(right.norm() * key.norm())
    return float(torch.stack(shares).median()), float(torch.stack(sizes).median())


LEAST = 0.01  # of λ beside earlier keys: below, an update is many times as large as alone and writes little more


def largest_weight_beside(weight: float, keys: Tensor, past: Past, share: float) -> float:
    """As ``largest_weight``, for ``null_space_update``, where the keys of earlier edits hold back a new one.

    A new key z beside earlier keys Z gets x / (1 + x) of its change, x = zᵀ (λ 1 + Zᵀ Z)⁻¹ z. A smaller λ writes more of it and
    leaves the earlier keys alone the better, with a larger update. A key in the span of the earlier ones cannot be written at
    all, so λ is at least ``LEAST`` of what the new keys need alone.

    Args:
        weight: λ, above 0.
        keys: projected, [E, I] float64.
        past: keys of earlier edits, projected.
        share: of the median edit, above 0 and below 1.
    """
    alone = largest_weight(weight, keys.square().sum(1), share)
    if past.keys is None and past.gram is None:
        return alone
    # With the eigenvalues s and eigenvectors of ZᵀZ, x is a sum over (z · v)² / (s + λ): cheap for every λ.
    if past.gram is not None:
        values, vectors = torch.linalg.eigh(past.gram)
    else:
        assert past.keys is not None
        values, left = torch.linalg.eigh(past.keys @ past.keys.T)
        used = values > values[-1] * torch.finfo(values.dtype).eps * len(values)
        values, vectors = values[used], past.keys.T @ left[:, used] / values[used].sqrt()
    inside = (keys @ vectors).square()  # [E, n]
    outside = (keys.square().sum(1) - inside.sum(1)).clamp_min(0)
    values = values.clamp_min(0)

    def gets(at: float) -> float:
        x = outside / at + (inside / (values + at)).sum(1)
        return float((x / (1 + x)).median())

    low, high = alone * LEAST, alone
    if gets(high) >= share:
        return high
    if gets(low) < share:
        return low
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if gets(middle) >= share else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--exclude", type=Path, nargs="*", default=[])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--block", type=int, help="default: the last one that AlphaEdit edits")
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--facts", type=int, default=275)
    parser.add_argument("--earlier", type=int, nargs="+", default=[0, 50, 100, 200, 250])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model) if args.model else kedit.load()
    suite = Suite(model, tokenizer, "unused", corpus=args.corpus, contexts=args.contexts)
    editor = suite.editor("alphaedit")
    suite.prepare([editor])
    known = chosen(args.data, args.exclude, args.facts) if args.data else []
    edits = [case.edit for case in known] or wordings(args.facts)
    layer = editor.config.layers[-1] if args.block is None else args.block
    if layer not in editor.config.layers:
        parser.error(f"AlphaEdit edits the blocks {editor.config.layers} of this model, not {layer}.")
    with editor._call(None) as call:
        requests = editor._encode(edits, call)
    groups = (requests[start : start + 50] for start in range(0, len(requests), 50))
    keys = torch.cat([mixed_keys(request_keys(editor.arch, group, layer)) for group in groups]).double()
    if len(keys) < max(args.earlier) + NEW:
        sys.exit(f"There are {len(keys)} keys, and --earlier asks for {max(args.earlier)} and {NEW} further ones.")
    print(f"\nBlock {layer}, {keys.shape[1]} directions.")
    print(
        "Shares of the squared length of text's and of the facts' keys in the free directions, %; share of a further edit's"
    )
    print("change that it gets, %, and size of its update:\n")
    print(
        "| threshold | free | text, facts | earlier edits | λ as alone | λ beside earlier keys |\n|---|---|---|---|---|---|"
    )
    rows(keys, editor.moments.matrix(layer, 0, None).double(), args.earlier)


if __name__ == "__main__":
    main()
