"""A thousand edits of the embedded model, one after another and at once: ``python benchmarks/bench_sequential.py``.

The edits are one new fact for everybody in the world, then the same facts in other words. One after another, each with an ``apply``
of its own; written down every tenth of the way: the process's memory, the time of an apply, and how many of the latest hundred
edits the model says. At once: MEMIT writes 100, 300 and then all of them as one batch; written down: the peak of memory. At the
end of each everything is taken back.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch

import kedit
from kedit.embedded import load_world
from kedit.evaluation.provenance import environment
from kedit.utils.device_memory import HeapTrim

LARGE_BATCH_WEIGHT = 300.0  # the preset's, 1, is chosen for single edits


def resident() -> float:
    """Memory of this process in MiB, without what its heap holds in reserve."""
    gc.collect()
    HeapTrim.now()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def said(model, tokenizer, edits: list[kedit.Edit]) -> float:
    """Share of the edits whose target the model prefers to everything else."""
    hits = 0
    for edit in edits:
        prompt = tokenizer(edit.prompt.format(edit.subject), return_tensors="pt")["input_ids"]
        target = tokenizer(" " + edit.target_new)["input_ids"]
        ids = torch.cat([prompt, torch.tensor([target])], 1)
        with torch.no_grad():
            best = model(ids).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
        hits += best.tolist() == target
    return 100 * hits / len(edits)


def run(name: str, edits: list[kedit.Edit], steps: int | None) -> list[list[str]]:
    """Rows of the table of one editor."""
    model, tokenizer = kedit.load()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    editor = kedit.get_editor(name, model, tokenizer, **({} if steps is None else {"steps": steps}))
    editor.prepare()
    every, rows, seconds = max(1, len(edits) // 10), [], []
    for number, edit in enumerate(edits, start=1):
        start = time.perf_counter()
        editor.apply(edit)
        seconds.append(time.perf_counter() - start)
        if number % every == 0:
            hits = said(model, tokenizer, edits[max(0, number - 100) : number])
            pace = 1000 * sum(seconds[-every:]) / every
            rows.append([name, f"{number:,}", f"{resident():.1f}", f"{pace:.0f}", f"{hits:.0f}"])
            print(*rows[-1], flush=True)
    editor.revert_all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "not reverted"
    return rows


def wordings(count: int) -> list[kedit.Edit]:
    """``count`` edits that fit together: one new fact for everybody, in its first wording, then in its second, ...

    Not several facts of a person: where a prompt begins with the name, all of them would be written at one key.
    """
    world = load_world()
    relations = [relation for relation in world.relations if relation.role == "edit"]
    edits = []
    for number in range(min(len(relation.templates) for relation in relations)):
        for i, person in enumerate(world.people):
            relation = relations[i % len(relations)]
            now = relation.objects.index(world.object(person.name, relation.name))
            target = relation.objects[(now + 1 + i) % len(relation.objects)]
            if target != relation.objects[now]:
                edits.append(kedit.Edit(relation.templates[number], person.name, target))
    return edits[:count]


def at_once(edits: list[kedit.Edit]) -> list[list[str]]:
    """Rows of the table of MEMIT's batches: with the preset, then with a weight and a budget for large batches."""
    model, tokenizer = kedit.load()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = []
    counts = sorted({min(count, len(edits)) for count in (100, 300, 1_000)})
    for budget, weight in ((None, None), (2_048, LARGE_BATCH_WEIGHT)):
        editor = kedit.get_editor("memit", model, tokenizer, **({} if weight is None else {"moment_weight": weight}))
        editor.prepare()
        editor.engine.budget = budget or editor.engine.budget
        for count in counts:
            start_memory, start = resident(), time.perf_counter()
            forget_peak()
            result = editor.apply(edits[:count])
            seconds, taken = time.perf_counter() - start, peak() - start_memory
            hits = said(model, tokenizer, edits[:count])
            rows.append(
                [
                    f"{count:,}",
                    f"{editor.engine.used:,}",
                    f"{editor.config.moment_weight:g}",
                    f"{taken:.0f}",
                    f"{1000 * seconds / count:.0f}",
                    f"{hits:.0f}",
                ]
            )
            print("memit at once", *rows[-1], flush=True)
            result.revert()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "not reverted"
    return rows


def forget_peak() -> None:
    """Let the process's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Largest memory of this process since then, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=1_000)
    parser.add_argument("--editors", default="alphaedit,rome")
    parser.add_argument("--batch", type=int, help="edits at once (default: as many as one after another)")
    parser.add_argument("--steps", type=int, help="of each edit one after another (default: the preset's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sequential.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not Path("/proc/self/clear_refs").exists():
        parser.error("Memory is measured by way of /proc, which this system does not have.")
    edits = wordings(args.edits)
    batches = at_once(edits if args.batch is None else wordings(args.batch))
    rows = [row for name in args.editors.split(",") for row in run(name, edits, args.steps)]
    machine = environment()
    lines = [
        f"# {len(edits):,} sequential edits",
        "",
        f"The embedded model, one `apply` per edit, one thread, steps: {args.steps or 'as preset'}; {machine['machine']}, torch",
        f"{machine['torch']}. Memory is the whole process's; afterwards every weight is back bit for bit.",
        "",
        "| editor | edits so far | memory, MiB | ms per edit | target, % of the latest 100 |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "MEMIT, all edits in one `apply`. Memory is the peak of the process above its state before:",
        "",
        "| edits | tokens per wave | `moment_weight` | memory, MiB | ms per edit | target, % of all |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in batches),
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
