"""Compare kedit with full forward passes in one interleaved run: ``python benchmarks/bench_speed.py [--out FILE] [--rounds N]``.

GPT-2 small's shape, random weights, one thread, float32 (and bfloat16), 20 steps without early stop, C = 1, prompts like
CounterFact's: one ROME edit with 21 contexts at block 4, and a batch of 32 MEMIT edits with 6 contexts at blocks 2-5. Before
anything is timed kedit's update is compared with the baseline's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from baseline import Plain, counterfact_like
from torch import Tensor

import kedit
from kedit.models import ModelArch
from kedit.prompts.encode import Request, encode_edits
from kedit.regularizers.base import Needs
from models import gpt2_small, tokenizer

MEMIT_EDITS = 32
WORDS = [
    "the",
    "house",
    "of",
    "a",
    "river",
    "was",
    "near",
    "and",
    "many",
    "people",
    "went",
    "to",
    "see",
    "it",
    "when",
    "they",
    "were",
    "young",
    "there",
]


def contexts(short: int, long: int) -> list[str]:
    """The bare prompt, and texts of 5 and of 10 words."""
    made = [
        " ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(5 if i < short else 10)) for i in range(short + long)
    ]
    return ["{}", *(f"{text}. {{}}" for text in made)]


class Setting:
    """One editor, prepared for both ways."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        model, tok = gpt2_small(dtype), tokenizer()
        rome = name == "rome"
        layers = (4,) if rome else (2, 3, 4, 5)
        moments = {layer: torch.eye(3_072) for layer in layers}
        texts = contexts(10, 10) if rome else contexts(0, 5)
        clamp = 4.0 if rome else 0.75
        self.edits = counterfact_like(MEMIT_EDITS)
        self.arch = ModelArch(model)
        self.requests = encode_edits(self.arch, tok, self.edits, texts, Needs())
        self.baseline = Plain(self.arch, layers, "mlp" if rome else "block", moments, clamp=clamp)
        self.editor = kedit.get_editor(
            name, model, tok, layers=layers, steps=20, lr=0.5, weight_decay=0.5, clamp=clamp, stop_loss=0.0,
            moments=moments, contexts=texts,
        )  # fmt: skip

    def engine(self, count: int, first: int = 0) -> list[Tensor]:
        """The updates of ``count`` edits by kedit; of ROME's, from number ``first`` on."""
        if self.name == "rome":
            patches = self.editor.propose(self.edits[first : first + count])
            return [delta.dense for patch in patches for delta in patch.deltas.values()]
        result = self.editor.apply(self.edits[:count])
        result.revert()
        return [delta.dense for delta in result.patch.deltas.values()]

    def plain(self, count: int) -> list[Tensor]:
        """The same with the baseline."""
        if self.name == "rome":
            return [self.baseline.rome(request) for request in self.requests[:count]]
        return list(self.baseline.memit(self.requests[:count]).values())

    def plain_one(self, number: int) -> None:
        """Run the baseline's work per edit: all of ROME, or MEMIT's value optimisation (for the edit of median length)."""
        if self.name == "rome":
            self.baseline.rome(self.requests[number])
        else:
            tokens = [sum(len(row.ids) for row in request.rewrite) for request in self.requests]
            self.baseline.value(self.requests[tokens.index(statistics.median_low(tokens))])

    def shared(self, count: int) -> float:
        """Seconds per edit of the baseline's work for all ``count`` edits together: distributing MEMIT's residuals."""
        if self.name == "rome":
            return 0.0
        targets = torch.randn(count, self.arch.hidden)
        return timed(self.baseline.spread, self.requests[:count], targets) / count


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of two lists of matrices."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)
    )


def timed(call, *args) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of the engine's shape on this thread."""
    a, b = torch.randn(1_024, 768, dtype=dtype), torch.randn(768, 3_072, dtype=dtype)
    times = [timed(torch.mm, a, b) for _ in range(20)]
    return 2 * 1_024 * 768 * 3_072 / statistics.median(times)


def floor_flops(arch: ModelArch, requests: Sequence[Request], top: int, steps: int) -> float:
    """FLOPs that the steps must do: blocks above ``top`` and the head on read rows, forward and input gradient."""
    above = [arch.block(layer) for layer in range(top + 1, arch.num_layers)]
    per_token = 2 * sum(p.numel() for block in above for p in block.parameters() if p.ndim > 1)
    per_read = 2 * arch.hidden * arch.model.config.get_text_config().vocab_size
    total = 0.0
    for request in requests:
        for prompt in request.prompts(0):
            total += (len(prompt.tokens) - prompt.row.subject_last) * per_token + len(prompt.reads) * per_read
    return 2 * steps * total  # the backward pass costs one forward: weights have no gradient


def measure(name: str, rounds: int, dtype: torch.dtype = torch.float32, with_plain: bool = True) -> dict:
    """Medians of interleaved runs."""
    setting = Setting(name, dtype)
    check = 1 if name == "rome" else 2
    difference = relative(setting.engine(check), setting.plain(check)) if with_plain else float("nan")
    if with_plain and difference > 1e-4:
        raise SystemExit(f"{name}: kedit's update differs from the baseline's by {difference:.1e}; nothing is timed.")
    count = 1 if name == "rome" else MEMIT_EDITS
    engine, plain = [], []
    shared = setting.shared(count) if with_plain else 0.0
    for number in range(rounds):
        engine.append(timed(setting.engine, count, number) / count)
        if with_plain:
            plain.append(timed(setting.plain_one, number) + shared)
        print(name, [f"{seconds:.2f}" for seconds in (engine[-1], *plain[-1:])], flush=True)
    rate = matrix_rate(dtype)
    seconds = statistics.median(engine)
    timed_requests = setting.requests[: rounds if name == "rome" else count]
    floor = floor_flops(setting.arch, timed_requests, setting.editor.config.layers[-1], 20) / len(timed_requests) / rate
    return {
        "editor": name,
        "dtype": str(dtype).removeprefix("torch."),
        "edits": count,
        "engine_s_per_edit": seconds,
        "plain_s_per_edit": statistics.median(plain) if plain else float("nan"),
        "ratio": statistics.median(p / e for p, e in zip(plain, engine, strict=True)) if plain else float("nan"),
        "ratios": [p / e for p, e in zip(plain, engine, strict=False)],
        "difference": difference,
        "floor_s_per_edit": floor,
        "matrix_gflops": rate / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed")
    parser.add_argument(
        "--rounds", type=int, default=5, help="interleaved pairs (default 5: ROME's prompts differ in form)"
    )
    parser.add_argument("--editors", default="rome,memit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not 0 < args.rounds <= MEMIT_EDITS:
        parser.error(f"--rounds is 1 to {MEMIT_EDITS}.")
    rows = [measure(name, args.rounds) for name in args.editors.split(",")]
    half = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if half:
        rows += [measure(name, args.rounds, torch.bfloat16, with_plain=False) for name in args.editors.split(",")]
    machine = {
        "processor": processor(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bf16 matrix units": half,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    text = table(rows, machine)
    args.out.with_suffix(".md").write_text(text)
    print(text)


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def table(rows: list[dict], machine: dict) -> str:
    """The figures in Markdown."""
    lines = [
        "# Speed of kedit against full forward passes",
        "",
        "The baseline runs every prompt through the whole model at every step, as the published code does. Shape of GPT-2",
        "small, random weights, 20 steps without early stop; medians of interleaved runs. The floor is the arithmetic that the",
        "steps require, divided by the matrix rate measured in the same run. Every prompt begins with its subject, so all of",
        "it runs at every step; each round of ROME is another edit. For MEMIT the baseline's value optimisation is timed on the",
        "edit of median length, and its distribution over the layers once for all edits.",
        "",
        ", ".join(f"{key}: {value}" for key, value in machine.items()),
        "",
        "| editor | dtype | edits | kedit, s per edit | baseline, s per edit | ratio | floor, s per edit | GFLOP/s | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = ", ".join(f"{ratio:.1f}" for ratio in row["ratios"])
        cells = [
            row["editor"],
            row["dtype"],
            row["edits"],
            f"{row['engine_s_per_edit']:.2f}",
            f"{row['plain_s_per_edit']:.2f}",
            f"{row['ratio']:.1f}x ({ratios})",
            f"{row['floor_s_per_edit']:.2f}",
            f"{row['matrix_gflops']:.0f}",
            f"{row['difference']:.0e}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
