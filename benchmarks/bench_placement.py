"""Precision, memory and several processes: ``python benchmarks/bench_placement.py [--out FILE] [--part NAME]``.

*precision*: edits of the embedded model in float32, bfloat16 and float16: what rounding takes from an update, and whether the
fact is there. *memory*: what :meth:`Editor.estimate_memory` says an apply takes on GPT-2 small's shape, and what the process takes
(float32 alone: bfloat16 takes very long on a processor without matrix units for it). *offload*: the same edits of the
embedded model in memory and offloaded to disk. *processes*: the command line in one process and in two, its time and
whether both find the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import accelerate
import torch
from baseline import counterfact_like
from bench_sequential import forget_peak, peak, resident, said, wordings
from bench_speed import contexts

import kedit
from kedit.evaluation.provenance import environment
from models import gpt2_small, tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def table(title: str, head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [title, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def precision(count: int = 40) -> str:
    """Edits alone, each taken back."""
    rows = []
    for name, dtype in DTYPES.items():
        for editor_name in ("rome", "memit"):
            model, tok = kedit.load()
            moments = kedit.get_editor(editor_name, model, tok).moments  # of the model as it was trained
            model = model.to(dtype)
            editor = kedit.get_editor(editor_name, model, tok, moments=moments)
            lost, hits = [], 0.0
            for edit in wordings(count):
                result = editor.apply(edit)
                lost += result.rounding.values()
                hits += said(model, tok, [edit]) / count
                result.revert()
            figures = f"{sum(lost) / len(lost):.1e}", f"{max(lost):.1e}"
            rows.append([editor_name, name, count, *figures, f"{hits:.0f}"])
            print(*rows[-1], flush=True)
    head = ["editor", "weights", "edits", "lost to rounding, mean", "maximum", "target, %"]
    return table("Part of an update's norm that rounding the edited weight to its dtype loses:", head, rows)


def memory_job(name: str, dtype: str, count: int) -> None:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    model, tok = gpt2_small(DTYPES[dtype]), tokenizer()
    layers = (4,) if name == "rome" else (2, 3, 4, 5)
    editor = kedit.get_editor(
        name,
        model,
        tok,
        layers=layers,
        steps=3,
        lr=0.1,
        weight_decay=0.1,
        clamp=0.75,
        contexts=contexts(0, 5),
        moments={layer: torch.eye(3_072) for layer in layers},
    )
    edits = counterfact_like(count)
    stated = editor.estimate_memory(edits)
    gc.collect()
    before = resident()
    forget_peak()
    editor.apply(edits)
    said_mib = (stated.total - stated.model - stated.moments) / 2**20
    print(
        json.dumps(
            [
                name,
                dtype,
                count,
                f"{stated.model / 2**20:.0f}",
                f"{stated.moments / 2**20:.0f}",
                f"{said_mib:.0f}",
                f"{peak() - before:.0f}",
            ]
        )
    )


def memory() -> str:
    rows = []
    for name, dtype, count in (
        ("rome", "float32", 1),
        ("memit", "float32", 8),
        ("memit", "float32", 32),
    ):
        call = f"import bench_placement; bench_placement.memory_job({name!r}, {dtype!r}, {count})"
        done = subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(*rows[-1], flush=True)
    head = [
        "editor",
        "weights",
        "edits",
        "model, MiB",
        "second moments, MiB",
        "other, estimated, MiB",
        "other, measured, MiB",
    ]
    return table(
        "GPT-2 small's shape (12 blocks, width 768), one thread. Measured: growth of the process at its peak, including the heap:",
        head,
        rows,
    )


def offload(count: int = 8) -> str:
    """ROME edits in memory and with every weight on disk."""
    edits, rows, deltas = wordings(count), [], []
    for where in ("in memory", "offloaded to disk"):
        model, tok = kedit.load()
        editor = kedit.ROME(model, tok)
        editor.prepare()
        with tempfile.TemporaryDirectory() as folder:
            if where != "in memory":
                moments, texts = editor.moments, editor.contexts
                model = accelerate.disk_offload(model, folder, execution_device="cpu")
                editor = kedit.ROME(model, tok, moments=moments, contexts=texts)
            start = time.perf_counter()
            results = [editor.apply(edit) for edit in edits]
            seconds = time.perf_counter() - start
            deltas.append([delta.dense for result in results for delta in result.patch.deltas.values()])
            for result in reversed(results):
                result.revert()
        same = all(torch.equal(a, b) for a, b in zip(deltas[0], deltas[-1], strict=True))
        rows.append([where, count, f"{1000 * seconds / count:.0f}", "yes" if same else "no"])
        print(*rows[-1], flush=True)
    return table(
        "ROME on the embedded model:",
        ["weights", "edits", "ms per edit", "updates bit-identical to those in memory"],
        rows,
    )


def processes() -> str:
    """The command line in one process and in two."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.txt"
        edits = wordings(100)
        corpus.write_text(
            "\n".join(f"{edit.text} {edit.target_new}." for edit in wordings(1_000)) + "\n", encoding="utf-8"
        )
        (folder / "edits.jsonl").write_text(
            "\n".join(json.dumps(edit.to_dict()) for edit in edits) + "\n", encoding="utf-8"
        )
        commands = {
            "edit": ["edit", "--editor", "memit", "--edits", str(folder / "edits.jsonl"), "--out", "patch.safetensors"],
            "eval": ["eval", "--editor", "rome", "--cases", "40", "--out", "report"],
        }
        for label, command in commands.items():
            seconds = {}
            for size in (1, 2):
                place = folder / f"{label}{size}"
                place.mkdir()
                launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={size}"] if size > 1 else []
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *launcher, "-m", "kedit", "-q", *command],
                    cwd=place,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                )
                seconds[size] = time.perf_counter() - start
                if done.returncode:
                    raise SystemExit(done.stderr)
            difference = patches_differ(folder) if label == "edit" else records_differ(folder)
            rows.append([f"kedit {label}", *(f"{value:.0f}" for value in seconds.values()), f"{difference:.0e}"])
            print(*rows[-1], flush=True)
    head = ["", "one process, s", "two, s", "largest difference"]
    text = table(
        "The embedded model on the CPU (gloo), including the start of the processes; MEMIT on 100 edits, ROME on 40 cases:",
        head,
        rows,
    )
    return (
        text
        + "\nDifference for `kedit edit`: of the updates, relative to their norm; for `kedit eval`: of the NLL of any answer, in "
        "nats.\n"
    )


def patches_differ(folder: Path) -> float:
    one, two = (kedit.EditPatch.load(folder / f"edit{size}" / "patch.safetensors") for size in (1, 2))
    return max(
        float((two.deltas[name].dense - delta.dense).norm() / delta.dense.norm()) for name, delta in one.deltas.items()
    )


def records_differ(folder: Path) -> float:
    one, two = (kedit.EvalReport.load(folder / f"eval{size}" / "report") for size in (1, 2))
    return max(
        abs(before.nll - after.nll)
        for first, second in zip(one.records, two.records, strict=True)
        for a, b in zip(first.after.probes, second.after.probes, strict=True)
        for before, after in ((a.right, b.right), (a.wrong, b.wrong))
        if before is not None
    )


PARTS = {"precision": precision, "memory": memory, "offload": offload, "processes": processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement.md")
    parser.add_argument("--part", choices=PARTS, help="one part alone, printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part:
        print(PARTS[args.part]())
        return
    machine = environment()
    text = [f"# Precision, memory, placement, processes\n\n{machine['machine']}, torch {machine['torch']}.\n"]
    text += [f"## {name.capitalize()}\n\n{part()}" for name, part in PARTS.items()]
    args.out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
