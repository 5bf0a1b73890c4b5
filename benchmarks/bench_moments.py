"""Time second moments in half precision against float32: ``python -m benchmarks.bench_moments --model DIR --corpus FILE``.

Five blocks of a pretrained model (``python -m benchmarks.real_model DIR``) in one pass, one thread. The difference is the largest
relative difference of a layer's C in the Frobenius norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.pairs import RESULTS, compare, write

import kedit
from kedit.keys.estimate import estimate_moments
from kedit.keys.second_moment import SecondMoments
from kedit.models import ModelArch


def difference(one: SecondMoments, other: SecondMoments) -> float:
    """Largest relative difference of a layer's moment."""
    pairs = [(one[layer].matrix, other[layer].matrix) for layer in one]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def main() -> None:
    """Compare, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=15_360)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kedit.load(args.model)
    arch = ModelArch(model)

    def estimate(dtype: str | None) -> SecondMoments:
        options = {"tokens": args.tokens, "cache": False, "compute_dtype": dtype}
        return estimate_moments(arch, tokenizer, args.layers, args.corpus, **options)

    name = f"{len(args.layers)} blocks, {args.tokens:,} tokens"
    row = compare(
        name,
        lambda: estimate(None),
        lambda: estimate("bfloat16"),
        difference,
        model=model,
        most=0.02,
        rounds=args.rounds,
    )
    about = [
        f"Second moments of blocks {args.layers[0]} to {args.layers[-1]} of {Path(args.model).name}, a float32 model:",
        'its own dtype (plain) and `compute_dtype="bfloat16"` (kedit); the sums are in float32 in both.',
    ]
    write(args.out, "Second moments in half precision", about, [row])


if __name__ == "__main__":
    main()
