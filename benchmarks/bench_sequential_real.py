"""Sequences of edits of a real model, batch by batch: ``python -m benchmarks.bench_sequential_real --model DIR --data FILE``.

Every batch is an ``apply`` on the model as edited so far. At checkpoints, of all facts so far: how many targets the model prefers
to the true object (ES, PS) and says, NS on a fixed set of neighbours, perplexity on text that the second moments have not read,
the norm of the update in % of the weights', and the share of the wanted change that the last batch got (its median edit). Each
batch's patch and each checkpoint is kept in ``--out``, so that a second start goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import benchmarks.stabilisers  # noqa: F401  # registers them
import torch

import kedit
from kedit.bench.suite import Suite, hyper_parameters_of
from kedit.data import load_cases
from kedit.editors.base import Call
from kedit.editors.value_editor import ValueEditor
from kedit.evaluation.cases import EditCase, Kind
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.provenance import digest
from kedit.keys.read import request_outputs
from kedit.patch import EditPatch
from kedit.prompts.encode import Request
from kedit.utils.files import write_text
from kedit.values.optimize import Values

PPL_TOKENS = 1_024
WAVE = 10  # values that are optimised together
COLUMNS = ("facts", "ES", "said", "PS", "NS", "ppl", "norm", "written")


def subjects_in(files: Sequence[Path]) -> set[str]:
    """The subjects of all cases in some files."""
    return {case.edit.subject for path in files for case in load_cases(path).cases}


def chosen(data: Path, exclude: Sequence[Path], number: int) -> list[EditCase]:
    """The first cases of a file, every subject once and none of those in other files."""
    taken = subjects_in(exclude)
    cases = []
    for case in load_cases(data).cases:
        if case.edit.subject not in taken:
            taken.add(case.edit.subject)
            cases.append(case)
    return cases[:number]


def only(case: EditCase, *kinds: Kind) -> EditCase:
    """The case with its probes of some kinds."""
    return replace(case, probes=tuple(probe for probe in case.probes if probe.kind in kinds))


class Measure:
    """What a checkpoint asks the model."""

    def __init__(self, model: Any, tokenizer: Any, cases: Sequence[EditCase], neighbours: int, text: str) -> None:
        self.own = [only(case, Kind.REWRITE, Kind.PARAPHRASE) for case in cases]
        beside = [only(case, Kind.NEIGHBOUR) for case in cases]
        self.beside = [case for case in beside if case.probes][:neighbours]
        self.facts = ProbeScorer(model, tokenizer, EvalOptions(exact=False), self.own)
        texts = (text,) if text else ()
        self.rest = ProbeScorer(
            model, tokenizer, EvalOptions(exact=False, texts=texts, text_tokens=PPL_TOKENS), self.beside
        )

    def take(self, facts: int) -> dict[str, float]:
        """ES, said and PS of the first ``facts`` cases; NS and perplexity."""
        probes = [probe for score in self.facts.score(self.own[:facts]) for probe in score.probes]
        rest = self.rest.score(self.beside)
        rewrites = [probe for probe in probes if probe.kind is Kind.REWRITE]
        row = {
            "ES": share(preferred(rewrites)),
            "said": share(list(probe.right.labels) == list(probe.right.argmax) for probe in rewrites if probe.right),
            "PS": share(preferred([probe for probe in probes if probe.kind is Kind.PARAPHRASE])),
            "NS": share(preferred([probe for score in rest for probe in score.probes])),
        }
        if rest and rest[0].texts:
            row["ppl"] = rest[0].texts["perplexity"]
        return row


def preferred(probes: Sequence[Any]) -> Iterator[bool]:
    """Whether the right answer is likelier than the wrong one."""
    return (probe.right.nll < probe.wrong.nll for probe in probes)


def share(hits: Any) -> float:
    """In per cent; nan of none."""
    values = list(hits)
    return 100 * sum(values) / len(values) if values else float("nan")


def fix_values(editor: ValueEditor, edits: Sequence[kedit.Edit], folder: Path) -> None:
    """Let the editor write δ as optimised on the unedited model, which all its variants then share: kept in ``folder``.

    A sequence proper optimises each value on the model as edited so far. This one leaves only the closed forms to differ, and
    costs the optimisation once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = repr((editor.sites(), editor.config.objective, editor.contexts))

    def path_of(edit: kedit.Edit) -> Path:
        return folder / f"{digest([wanted, edit.to_dict()])}.pt"

    missing = [edit for edit in edits if not path_of(edit).exists()]
    for start in range(0, len(missing), WAVE):
        wave = missing[start : start + WAVE]
        with editor._call(None) as call:
            values = editor._optimize(editor._encode_together(wave, call), call)
        for number, edit in enumerate(wave):
            one = values.only(number)
            torch.save({"delta": one.delta, "log": one.log, "known": one.known}, path_of(edit))
        print("values", start + len(wave), "of", len(missing), flush=True)

    def kept(requests: Sequence[Request], call: Call) -> Values:
        parts = [torch.load(path_of(request.edit)) for request in requests]
        delta = torch.cat([part["delta"] for part in parts])
        now = request_outputs(editor.arch, requests, editor.sites()[0])[:, None].to(delta)
        logs = [list(map(dict, log)) for part in parts for log in part["log"]]
        return Values(delta, now.expand_as(delta), logs, [known for part in parts for known in part["known"]])

    editor._optimize = kept


def run(
    editor: kedit.Editor,
    measure: Measure,
    cases: Sequence[EditCase],
    batch: int,
    at: set[int],
    out: Path,
    regularizers: Sequence[str] = (),
) -> None:
    """One sequence; what is in ``out`` already is put back, not made anew."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "editor": editor.name,
        "config": editor.config.to_dict(),
        "batch": batch,
        "contexts": list(editor.contexts),
        "edits": [case.edit.to_dict() for case in cases],
        **({"regularizers": list(regularizers)} if regularizers else {}),
    }
    known = json.loads((out / "settings.json").read_text()) if (out / "settings.json").exists() else settings
    shorter = min(len(known["edits"]), len(cases))
    if known | {"edits": 0} != settings | {"edits": 0} or known["edits"][:shorter] != settings["edits"][:shorter]:
        raise SystemExit(f"{out} holds a run with other settings. Give another --out.")
    if len(known["edits"]) <= len(cases):
        write_text(out / "settings.json", json.dumps(settings))
    rows = {row["facts"]: row for row in read_rows(out)}
    weights = {weight.name: weight.matrix.clone() for weight in editor.edited_weights}
    written: list[float] = []
    for number, start in enumerate(range(0, len(cases), batch)):
        edits = [case.edit for case in cases[start : start + batch]]
        path = out / f"{number:04}.safetensors"
        if path.exists():
            editor.reapply(EditPatch.load(path), edits)
            done = len(edits) + start
        else:
            began = time.perf_counter()
            with warnings.catch_warnings(), editor.unchecked():
                warnings.simplefilter("ignore", UserWarning)
                result = editor.apply(edits, list(regularizers))
            result.patch.save(path)
            done = len(edits) + start
            shares = [log[-1]["written"] for log in result.log if log and "written" in log[-1]]
            written = shares or written
            note = {"to": done, "written": shares, "steps": [len(log) for log in result.log]}
            with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(note | {"seconds": time.perf_counter() - began}) + "\n")
            print(editor.name, done, f"{time.perf_counter() - began:.0f} s", flush=True)
        if (done in at or done == len(cases)) and done not in rows:
            change = sum(float((w.matrix - weights[w.name]).square().sum()) for w in editor.edited_weights)
            total = sum(float(weight.square().sum()) for weight in weights.values())
            row = {"facts": done, **measure.take(done), "norm": 100 * (change / total) ** 0.5}
            row["written"] = 100 * median(written) if written else float("nan")
            rows[done] = row
            print(editor.name, line(row), flush=True)
            with (out / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    editor.revert_all()
    if not all(torch.equal(weight.matrix, weights[weight.name]) for weight in editor.edited_weights):
        raise SystemExit("The weights are not those of before.")


def read_rows(out: Path) -> list[dict[str, float]]:
    """The checkpoints of a run."""
    path = out / "rows.jsonl"
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def line(row: dict[str, float]) -> str:
    """A checkpoint as a row of a table."""
    return " | ".join(f"{row[name]:.{2 if name in ('ppl', 'norm') else 0}f}" for name in COLUMNS if name in row)


def table(out: Path) -> str:
    """All checkpoints of all runs in a folder, as Markdown."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for folder in sorted(path for path in out.iterdir() if (path / "rows.jsonl").exists()):
        lines += [f"| {folder.name} | {line(row)} |" for row in read_rows(folder)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="cases with paraphrases and neighbours")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="files whose subjects are left out")
    parser.add_argument("--corpus", type=Path, help="plain text: second moments from its start, perplexity at its end")
    parser.add_argument("--editors", nargs="+", default=["alphaedit", "memit"])
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--batch", type=int, default=50, help="facts per apply; 1: one after another")
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[10, 30, 50, 100, 150, 200, 250, 300])
    parser.add_argument("--neighbours", type=int, default=100)
    parser.add_argument("--contexts", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="hyper-parameters, as rome.clamp=2")
    parser.add_argument("--regularizers", nargs="*", default=[], help="of every edit, for example relation_keys")
    parser.add_argument("--fixed-values", action="store_true", help="optimise every value on the unedited model, once")
    parser.add_argument("--label", default="", help="part of the run's folder name")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {}
    for item in args.set:
        key, _, value = item.partition("=")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    cases = chosen(args.data, args.exclude, args.facts)
    model, tokenizer = kedit.load(args.model)
    suite = Suite(model, tokenizer, args.out, corpus=args.corpus, contexts=args.contexts, config=given)
    text = args.corpus.read_text(encoding="utf-8")[-5 * PPL_TOKENS :] if args.corpus else ""
    measure = Measure(model, tokenizer, cases, args.neighbours, text)
    args.out.mkdir(parents=True, exist_ok=True)
    unedited = args.out / f"unedited-{len(cases)}"
    if not read_rows(unedited):
        unedited.mkdir(exist_ok=True)
        row = {"facts": len(cases), **measure.take(len(cases))}
        write_text(unedited / "rows.jsonl", json.dumps(row) + "\n")
        print("unedited", line(row), flush=True)
    for name in args.editors:
        editor = suite.editor(name)
        suite.prepare([editor])
        fixed = "fixed" if args.fixed_values else ""
        label = "-".join(filter(None, [name, f"batch{args.batch}", fixed, *args.regularizers, args.label]))
        if fixed:
            fix_values(editor, [case.edit for case in cases], args.out / ".values")
        print(label, hyper_parameters_of(name, given), flush=True)
        run(editor, measure, cases, args.batch, set(args.checkpoints), args.out / label, args.regularizers)
    write_text(args.out / "table.md", table(args.out))
    print(table(args.out))


if __name__ == "__main__":
    main()
