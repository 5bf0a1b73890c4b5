"""MEMIT with SADR on models of real size, for a GPU: ``python benchmarks/bench_scale.py --shape gpt-j-6b --edits 100,1000``.

Random bfloat16 weights of GPT-J-6B's or Llama-3-8B's shape, made on the device; identity moments; prompts like CounterFact's, six
contexts, 20 steps without early stop, so that every run does the same arithmetic. Written down: edits per second, where the time
goes, peak memory, and the share of the matrix rate that the optimisation reaches (FLOPs that its steps must do over seconds, over
the rate of a large product measured in the same run). ``--shape tiny`` tries the script on a CPU. ``--floor 790`` runs nothing: it
counts what must be done, and how long that takes at so many TFLOP/s.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from baseline import counterfact_like
from bench_speed import contexts, floor_flops, processor
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PreTrainedModel

import kedit
from kedit.models import ModelArch, Site
from kedit.prompts.encode import encode_edits
from models import tokenizer

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "gpt-j-6b": (GPTJConfig(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0), (3, 4, 5, 6, 7, 8)),
    "llama-3-8b": (
        LlamaConfig(
            hidden_size=4_096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=8_192, rope_theta=500_000.0,
        ),
        (4, 5, 6, 7, 8),
    ),
    "tiny": (GPTJConfig(n_embd=64, n_layer=6, n_head=4, rotary_dim=8, vocab_size=50_400), (1, 2)),
}  # fmt: skip


HEADS = (
    "edits",
    "seconds",
    "edits per s",
    "optimise, s",
    "solve, s",
    "floor, s",
    "share of the rate",
    "peak, GiB",
    "model, GiB",
    "tokens per wave",
)


def build(shape: str, device: torch.device) -> PreTrainedModel:
    """A model of the shape with random bfloat16 weights, made where it will run."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[shape][0], dtype=torch.bfloat16)
    return model.to(device).eval()


def arithmetic(shape: str, count: int, steps: int, rate: float) -> str:
    """A line on what ``count`` edits must do, and the minutes at ``rate`` FLOP/s; the model is never filled."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape][0], dtype=torch.bfloat16)
    arch, top = ModelArch(model), SHAPES[shape][1][-1]
    needs = kedit.SADR(gamma=5e-3).needs(Site(top, "block"))
    sample = min(count, 1_000)
    requests = encode_edits(arch, tokenizer(), counterfact_like(sample), contexts(0, 5), needs)
    prompts = [prompt for request in requests for prompt in request.prompts(0)]
    running = sum(len(prompt.tokens) - prompt.row.subject_last for prompt in prompts) / sample
    flops = floor_flops(arch, requests, top, steps) / sample
    return (
        f"| {shape} | {count:,} | {len(prompts) / sample:.1f} | {running:.1f} | {flops / 1e12:.1f} | {count * flops / 1e15:.0f} | "
        f"{count * flops / rate / 60:.1f} |"
    )


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 product."""
    size = 8_192 if device.type == "cuda" else 512
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(10):
        start = now(device)
        a @ a
        times.append(now(device) - start)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def now(device: torch.device) -> float:
    """Seconds, once everything that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(shape: str, count: int, device: torch.device, steps: int) -> dict[str, float]:
    """One batch of ``count`` edits."""
    model, tok = build(shape, device), tokenizer()
    arch, layers = ModelArch(model), SHAPES[shape][1]
    texts = contexts(0, 5)
    width = arch.weight(layers[0]).matrix.shape[1]
    moments = {layer: torch.eye(width, device=device) for layer in layers}
    regularizer = kedit.SADR(gamma=5e-3)
    edits = counterfact_like(count)
    editor = kedit.MEMIT(
        model, tok, layers=layers, steps=steps, lr=0.5, weight_decay=0.5, clamp=0.75, stop_loss=0.0, moments=moments,
        contexts=texts,
    )  # fmt: skip
    editor.propose(edits[:2], regularizer=regularizer)  # kernels, the self-check
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now(device)
    result = editor.apply(edits, regularizer=regularizer)
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else float("nan")
    needs = regularizer.needs(editor.sites()[0])
    requests = encode_edits(arch, tok, edits, texts, needs)
    flops = floor_flops(arch, requests, layers[-1], steps)
    return {
        "edits": count,
        "seconds": seconds,
        "edits_per_second": count / seconds,
        "optimise": result.seconds.get("optimise", float("nan")),
        "solve": result.seconds.get("solve", float("nan")),
        "peak_gib": peak / 2**30,
        "model_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
        "rate_share": flops / result.seconds.get("optimise", float("nan")) / matrix_rate(device),
        "floor": flops / matrix_rate(device),
        "budget": editor.engine.used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt-j-6b")
    parser.add_argument("--edits", default="100,1000")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="Markdown file (default: printed only)")
    parser.add_argument("--floor", type=float, metavar="TFLOPS", help="count the arithmetic and run nothing")
    args = parser.parse_args()
    if args.floor:
        print("| shape | edits | prompts per edit | running tokens per edit | TFLOP per edit | PFLOP | minutes |")
        print(f"|{'---|' * 7}")
        for count in map(int, args.edits.split(",")):
            print(arithmetic(args.shape, count, args.steps, args.floor * 1e12))
        return
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    lines = [
        f"# MEMIT + SADR at the shape of {args.shape}",
        "",
        f"{name}; torch {torch.__version__}; random bfloat16 weights, {args.steps} steps, 6 contexts. The floor is the arithmetic",
        "of the steps over the measured rate of a large bfloat16 product.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    for count in map(int, args.edits.split(",")):
        row = measure(args.shape, count, device, args.steps)
        lines.append(
            f"| {row['edits']:,} | {row['seconds']:.1f} | {row['edits_per_second']:.2f} | {row['optimise']:.1f} | "
            f"{row['solve']:.1f} | {row['floor']:.1f} | {100 * row['rate_share']:.1f}% | {row['peak_gib']:.1f} | "
            f"{row['model_gib']:.1f} | {row['budget']:,} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
