"""Time and peak memory of one optimisation step (forward + backward) with and without attention rows.

    python benchmarks/bench_capture.py                 # GPT-2-small on the CPU, one thread; GPU shapes if there is a GPU
    python benchmarks/bench_capture.py --repeats 9 --only 22x256

Compared: plain SDPA, eager attention with ``output_attentions=True``, SDPA with rows in torch, SDPA with rows by the Triton
kernel (GPU). A value is added at block 3's output, the last prompt token's row of every later block is captured, and the loss
is the last token's log-likelihood plus, where rows are read, their KL from the rows before. Weights are random and frozen. The
ways take turns; times are medians. Before any timing the rows and the KL gradient are checked against eager attention.
Writes ``results/capture.md`` and ``results/capture.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPTJConfig, LlamaConfig

from kedit.capture import capture_attention, row_kl

EDIT_LAYER = 3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    tokens: int
    device: str

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.tokens}"


CPU = [Shape("gpt2-small", batch, tokens, "cpu") for batch, tokens in ((22, 32), (22, 256), (4, 1024))]
GPU = [
    Shape(model, batch, tokens, "cuda")
    for model in ("gptj-6b", "llama3-8b")
    for batch, tokens in ((22, 32), (8, 512), (2, 2048))
]
LAYERS = {"gpt2-small": 12, "gptj-6b": 8, "llama3-8b": 8}  # of the large models, eight layers


def make(shape: Shape, attention: str) -> torch.nn.Module:
    layers = LAYERS[shape.model]
    if shape.model == "gpt2-small":
        config = GPT2Config(n_layer=layers, n_positions=1024)
    elif shape.model == "gptj-6b":
        config = GPTJConfig(n_layer=layers, vocab_size=1024)
    else:
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=1024, max_position_embeddings=8192,
        )  # fmt: skip
    if shape.model == "gptj-6b":
        attention = "eager"  # GPT-J has no other; the capture reads beside it
    dtype = torch.float32 if shape.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval().requires_grad_(False).to(shape.device)


class Step:
    """One method for the step, called repeatedly."""

    def __init__(self, shape: Shape, way: str) -> None:
        self.way = way
        self.model = make(shape, "eager" if way == "eager" else "sdpa")
        self.vocab = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, self.vocab, (shape.batch, shape.tokens), generator=generator).to(shape.device)
        self.positions = torch.full((shape.batch, 1), shape.tokens - 1, device=shape.device)
        self.delta = torch.randn(self.model.config.hidden_size, generator=generator).to(shape.device) * 0.1
        blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        blocks[EDIT_LAYER].register_forward_hook(self._inject)
        self.token = shape.tokens // 2
        self.added = torch.zeros_like(self.delta)
        self.before = {layer: rows.detach() for layer, rows in self.rows(self.added)[1].items()}

    def _inject(self, _module: object, _args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        at = torch.zeros(hidden.shape[1], 1, dtype=hidden.dtype, device=hidden.device)
        at[self.token] = 1
        hidden = hidden + at * self.added.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def rows(self, added: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        self.added = added
        given = {"input_ids": self.ids, "logits_to_keep": 1, "use_cache": False}
        if self.way == "plain":
            return self.model(**given).logits, {}
        if self.way == "eager":
            out = self.model(**given, output_attentions=True)
            last = {i: full[:, :, -1:].float() for i, full in enumerate(out.attentions) if i > EDIT_LAYER}
            return out.logits, last
        later = range(EDIT_LAYER + 1, 1 << 30)
        with capture_attention(self.model, self.positions, layers=later, backend=self.way) as cap:
            return self.model(**given).logits, cap.rows

    def __call__(self) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        delta = self.delta.clone().requires_grad_()
        logits, rows = self.rows(delta)
        loss = -logits.float().log_softmax(-1)[..., 0].sum()
        kl = sum(
            (row_kl(rows[i], self.before[i], exact=False).sum() for i in rows), torch.zeros((), device=loss.device)
        )
        (gradient,) = torch.autograd.grad(loss + 100 * kl, delta)
        return rows, logits, gradient

    def kl_gradient(self) -> Tensor:
        delta = self.delta.clone().requires_grad_()
        _, rows = self.rows(delta)
        (gradient,) = torch.autograd.grad(sum(row_kl(rows[i], self.before[i], exact=False).sum() for i in rows), delta)
        return gradient


def timed(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter() if device == "cuda" else time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() if device == "cuda" else time.process_time()) - start


def peak(call: Callable[[], object], device: str) -> float:
    """Peak memory of torch's allocator above its state before, in MiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 2**20


def check(steps: dict[str, Step], device: str) -> dict[str, float]:
    """Errors of the captured rows, output and KL gradient; raises where a requirement is missed."""
    found = {way: step() for way, step in steps.items()}
    ours = "triton" if "triton" in steps else "torch"
    (rows, logits, _), (want, _, _), (_, plain, _) = found[ours], found["eager"], found["plain"]
    error = max((rows[i] - want[i]).abs().max().item() for i in want)
    a, b = steps[ours].kl_gradient(), steps["eager"].kl_gradient()
    report = {
        "rows_vs_eager": error,
        "logits_vs_plain": (logits - plain).abs().max().item(),
        "kl_gradient_vs_eager": ((a - b).abs().max() / b.abs().max()).item(),
    }
    if device == "cpu":
        assert report["rows_vs_eager"] <= 2e-6, report
        assert report["kl_gradient_vs_eager"] <= 1e-5, report
    assert report["logits_vs_plain"] == 0, report
    return report


def measure(shape: Shape, repeats: int) -> dict[str, object]:
    ways = ["plain", "eager", "torch"] + (["triton"] if shape.device == "cuda" else [])
    steps = {way: Step(shape, way) for way in ways}
    report = check(steps, shape.device)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way in ways if turn % 2 else reversed(ways):
            seconds = timed(steps[way], shape.device)
            if turn:  # the first turn warms up
                times[way].append(seconds)
    memory = {way: peak(steps[way], shape.device) for way in ways}
    # A way may be slowed by what else the machine does: compare within each turn, then take the median.
    ratio = {way: statistics.median(a / b for a, b in zip(times[way], times["plain"], strict=True)) for way in ways}
    return {
        "shape": asdict(shape),
        "turns": repeats,
        "errors": report,
        "ways": {
            way: {
                "seconds": statistics.median(times[way]),
                "fastest": min(times[way]),
                "of_plain": ratio[way],
                "peak_mib": memory[way],
                "above_plain_mib": memory[way] - memory["plain"],
            }
            for way in ways
        },
    }


def machine() -> dict[str, object]:
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(results: list[dict], about: dict[str, object]) -> str:
    lines = ["# Attention rows: time and memory of one step", ""]
    turns = " or ".join(str(n) for n in sorted({result["turns"] for result in results}))
    gpu = f", {about['gpu']}" if about["gpu"] else ", no GPU"
    lines += [
        f"{about['cpu']}, {about['cores']} cores{gpu}; torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}.",
        "",
        f"Forward + backward, rows of the last token in all blocks above block {EDIT_LAYER}. Medians of {turns} interleaved runs; "
        "CPU: process time of one thread. Peak: the most memory that torch's allocator held during the step, above its state "
        "before.",
        "Written by `python benchmarks/bench_capture.py`.",
        "",
        "| shape | method | time | fastest | relative to no rows | peak | above no rows |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = {
        "plain": "SDPA, no rows",
        "eager": "eager + output_attentions",
        "torch": "SDPA + rows (torch)",
        "triton": "SDPA + rows (kernel)",
    }
    for result in results:
        shape = Shape(**result["shape"])
        for way, got in result["ways"].items():
            lines.append(
                f"| {shape} | {names[way]} | {got['seconds']:.3f} s | {got['fastest']:.3f} s | {got['of_plain']:.3f} | "
                f"{got['peak_mib']:.0f} MiB | {got['above_plain_mib']:+.1f} MiB |"
            )
    lines += [
        "",
        "| shape | error of rows (eager) | of logits (no rows) | of KL gradient (eager) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for result in results:
        e = result["errors"]
        lines.append(
            f"| {Shape(**result['shape'])} | {e['rows_vs_eager']:.1e} | {e['logits_vs_plain']:.1e} | "
            f"{e['kl_gradient_vs_eager']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", default="", help="only shapes whose name contains this (22x256); others keep their results"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for capture.md and capture.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = CPU + (GPU if torch.cuda.is_available() else [])
    about = machine()
    stored = arguments.out / "capture.json"
    before = json.loads(stored.read_text()) if stored.exists() else {"machine": None}
    results = {str(Shape(**r["shape"])): r for r in before["results"]} if before["machine"] == about else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        if arguments.only in str(shape):
            results[str(shape)] = measure(shape, arguments.repeats)
            print(json.dumps(results[str(shape)], indent=1), flush=True)
            ordered = [results[str(s)] for s in CPU + GPU if str(s) in results]
            stored.write_text(json.dumps({"machine": about, "results": ordered}, indent=1) + "\n")
            stored.with_suffix(".md").write_text(table(ordered, about))


if __name__ == "__main__":
    main()
