"""Interleaved pairs of a plain way and kedit's, for benchmarks that print a ratio."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kedit.evaluation.provenance import environment
from kedit.utils.device_memory import LivePeak

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison: seconds and CPU seconds of every pair, peak bytes of tensors, and by how much the results differ."""

    name: str
    plain: tuple[float, ...]
    new: tuple[float, ...]
    plain_cpu: tuple[float, ...]
    new_cpu: tuple[float, ...]
    plain_peak: int
    new_peak: int
    difference: float

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.plain, self.new, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.plain_cpu, self.new_cpu, strict=True)]


def compare(
    name: str,
    plain: Callable[[], Any],
    new: Callable[[], Any],
    differ: Callable[[Any, Any], float],
    *,
    model: torch.nn.Module,
    most: float,
    rounds: int,
) -> Row:
    """Time both ways in turn, after comparing their results; nothing is timed where these differ by more than ``most``."""
    peaks, results = [], []
    for call in (plain, new):
        with LivePeak(model) as seen:  # which runs all that is done once per model too
            results.append(call())
        peaks.append(seen.peak)
    difference = differ(*results)
    if not difference <= most:
        raise SystemExit(f"{name}: the results differ by {difference:.1e}, more than {most:.0e}; nothing is timed.")
    times: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter(), time.process_time()
            result = (plain, new)[which]()
            times[which].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            if not differ(results[0], result) <= most:
                raise SystemExit(f"{name}: the results of round {number} differ; nothing is reported.")
        print(name, *(f"{each[-1][0]:.2f}" for each in times), flush=True)
    (plain_wall, plain_cpu), (new_wall, new_cpu) = (tuple(zip(*each, strict=True)) for each in times)
    return Row(name, plain_wall, new_wall, plain_cpu, new_cpu, *peaks, difference)


def compare_once(
    name: str,
    plain: Callable[[], Any],
    new: Callable[[], Any],
    differ: Callable[[Any, Any], float],
    *,
    model: torch.nn.Module,
    most: float,
) -> Row:
    """Time each way once, for work that takes long; the results are compared afterwards, and memory is counted on the way."""
    measured = []
    for call in (new, plain):
        with LivePeak(model) as seen:
            start = time.perf_counter(), time.process_time()
            result = call()
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
        measured.append((result, *taken, seen.peak))
    (found, new_wall, new_cpu, new_peak), (expected, wall, cpu, peak) = measured
    difference = differ(expected, found)
    if not difference <= most:
        raise SystemExit(f"{name}: the results differ by {difference:.1e}, more than {most:.0e}; nothing is reported.")
    print(name, f"{wall:.2f} {new_wall:.2f}", flush=True)
    return Row(name, (wall,), (new_wall,), (cpu,), (new_cpu,), peak, new_peak, difference)


def write(out: Path, title: str, about: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the table as Markdown and JSON, and print it."""
    machine = environment()
    lines = [
        f"# {title}",
        "",
        *about,
        "",
        "Interleaved pairs; medians, and the median of the pairs' ratios (all of them in brackets). CPU time leaves out what other",
        "programs took. The peak counts tensors that live at once, without the model.",
        "",
        ", ".join(f"{key}: {value}" for key, value in machine.items()),
        "",
        "| | plain, s | kedit, s | ratio | CPU ratio | plain, MB | kedit, MB | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            f"{statistics.median(row.plain):.2f}",
            f"{statistics.median(row.new):.2f}",
            f"{statistics.median(row.ratios):.1f}x ({', '.join(f'{ratio:.1f}' for ratio in row.ratios)})",
            f"{statistics.median(row.cpu_ratios):.1f}x",
            f"{row.plain_peak / 1e6:.0f}",
            f"{row.new_peak / 1e6:.0f}",
            f"{row.difference:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(rows) > 1 and all(len(row.plain) == 1 for row in rows):
        medians = [
            statistics.median(row.ratios[0] for row in rows),
            statistics.median(row.cpu_ratios[0] for row in rows),
        ]
        lines += ["", f"Median of all pairs: {medians[0]:.1f}x, in CPU time {medians[1]:.1f}x."]
    text = "\n".join(lines) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    record = {"machine": machine, "rows": [asdict(row) for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)
