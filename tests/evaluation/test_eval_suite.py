"""The benchmark suite on a tiny model, with a regularizer that is installed beside kedit and named by its entry point."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kedit.bench import Suite
from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from tiny_models import tiny_model, tokenizer

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = '''
from kedit.regularizers import Needs


class Quiet:
    """Keeps the written value small."""

    name = "quiet"

    def needs(self, site):
        return Needs()

    def penalty(self, now, before):
        return 50.0 * now.delta.square().sum((1, 2))
'''


def install_beside(folder: Path) -> None:
    """Write the files that pip installs for a package with an entry point."""
    info = folder / "quiet_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "quiet_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quiet-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedit.regularizers]\nquiet = quiet_plugin:Quiet\n")


@dataclass
class Outcome:
    """A report of fixed estimates."""

    shown: dict

    def __getitem__(self, name):
        return SimpleNamespace(value=self.shown[name])

    @property
    def estimates(self):
        return {name: {"after": SimpleNamespace(value=found)} for name, found in self.shown.items()}

    def compare(self, other, names):
        gaps = {name: self.shown[name] - other.shown[name] for name in names}
        return {name: SimpleNamespace(value=gap, low=gap - 1.5, high=gap + 1.5) for name, gap in gaps.items()}


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("quality")


def bench_of(quality, outcome):
    """A bench whose runs come out as ``outcome(select, gamma)`` says; and the γ that it ran."""
    ran = []

    def run(editor, regularizer, cases, **extent):
        if regularizer is None:
            return Outcome({"es": 100.0, "ps": 100.0, "score": 50.0, "dns": 40.0})
        ran.append((regularizer.select, regularizer.gamma))
        return Outcome(outcome(regularizer.select, regularizer.gamma))

    made = object.__new__(quality.Bench)
    vars(made).update(editors={"rome": None}, gammas={}, marks={}, dev=[], run=run)
    return made, ran


@pytest.mark.parametrize(
    ("best", "tried", "mark"),
    [(3.0, 5, ""), (0.1, 5, ""), (10.0, 6, ""), (30.0, 7, ""), (100.0, 7, "‡"), (None, 5, "†")],
)
def test_the_grid_of_gamma_grows_while_its_end_is_best(quality, best, tried, mark):
    def outcome(select, gamma):
        fits = best is not None and gamma <= best
        return {"es": 100.0, "ps": 98.0 if fits else 90.0, "score": gamma if fits else 99.0}

    bench, ran = bench_of(quality, outcome)
    assert bench.gamma("rome") == (best or 0.1)
    assert [gamma for _, gamma in ran] == [*quality.GAMMAS, *quality.WIDER][:tried]
    assert bench.mark("rome") == mark


def test_of_equal_gammas_the_smallest_is_chosen(quality):
    bench, ran = bench_of(quality, lambda select, gamma: {"es": 100.0, "ps": 100.0, "score": 90.0})
    assert bench.gamma("rome") == quality.GAMMAS[0]
    assert len(ran) == len(quality.GAMMAS)


@pytest.mark.parametrize(
    ("chosen", "selected", "expected"),
    [
        (0.3, {0.3: 61.0}, (0.3, 0.1)),  # the chosen γ, which has a partner
        (1.0, {0.3: 61.0}, (0.3, 0.1)),  # another one, as the chosen γ has none
        (10.0, {0.3: 62.9, 0.1: 60.0}, (0.3, 0.3)),  # of two with a partner, the one with more DNS
        (10.0, {}, None),
    ],
)
def test_the_partner_at_equal_dns_is_the_nearest_within_its_interval(quality, chosen, selected, expected):
    dns = {"all": {0.1: 60.0, 0.3: 63.0, 1.0: 70.0, 3.0: 75.0, 10.0: 77.0}}
    dns["max"] = {0.1: 50.0, 0.3: 55.0, 1.0: 80.0, 3.0: 90.0, 10.0: 99.0, 30.0: 99.0, **selected}

    def outcome(select, gamma):
        return {"es": 100.0, "ps": 100.0, "score": 90.0 - abs(gamma - chosen), "dns": dns[select][gamma]}

    bench, ran = bench_of(quality, outcome)
    assert bench.equal_dns("rome") == expected
    assert ("all", 30.0) not in ran


def test_a_run_is_taken_up_only_where_all_that_it_depends_on_is_the_same(tmp_path, monkeypatch):
    from test_eval_runner import make, make_cases

    model, tok, editor = make()
    suite = Suite(model, tok, tmp_path)

    def place(cases=2, regularizer=None, mode="single", **extent):
        return suite.folder_of(editor, regularizer, make_cases(cases), mode, **extent).name

    names = [place(), place(3), place(regularizer="sadr"), place(mode="batch"), place(generate=3)]
    known, suite.weights = suite.weights, "b"
    names.append(place())
    suite.weights = known
    with monkeypatch.context() as patched:
        patched.setattr("kedit.bench.suite.versions", lambda: {"kedit": "0.0"})
        names.append(place())
    assert place() == names[0]
    editor.moments = {1: torch.eye(112)}
    names.append(place())
    editor._contexts = ("{}",)
    names.append(place())
    assert len(set(names)) == len(names)


def test_the_large_runs_take_all_the_edits_that_there_are(quality):
    dev, test, large = quality._world(2, 3, 1000)
    assert (len(dev), len(test)) == (2, 3)
    assert len({case.edit.text for case in large}) == len(large)
    with pytest.raises(ValueError, match=f"the test half has {len(large)} facts"):
        world_cases(load_world(), "test", len(large) + 1, seed=1)
    assert len(quality._world(2, 3, 7)[2]) == 7


@pytest.mark.slow
def test_speed_and_capture_are_written_by_scripts_that_take_a_folder(quality, tmp_path):
    tables = importlib.import_module("test_tables")
    for name in tables.SCRIPTS:
        command = tables.command(name, tmp_path)
        assert "--out" in command
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr  # it knows the options before --help


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_suite_writes_its_tables(tmp_path):
    from test_eval_runner import make_cases

    install_beside(tmp_path / "site")
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer("plain").save_pretrained(tmp_path / "model")
    data = tmp_path / "cases.jsonl"
    data.write_text("\n".join(json.dumps(case.to_dict()) for case in make_cases(6)))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Ada lives in Rome and London with {i} others." for i in range(300)))
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "benchmarks/test_quality.py"),
        "--model", str(tmp_path / "model"), "--data", str(data), "--moments-corpus", str(corpus),
        "--cases", "3", "--dev-cases", "3", "--largest", "3", "--editors", "rome,memit,ft", "--add-regularizer", "quiet",
        "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "KEDIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 passed, 1 skipped" in done.stdout
    table = (tmp_path / "results/table3.md").read_text()
    for row in ("| none |", "| rome |", "| + ADR (all heads) |", "| + SADR |", "| + quiet |", "| memit |", "| ft |"):
        assert row in table
    assert table.count("| + quiet |") == 2  # fine-tuning takes no value regularizer
    assert "of 30 generated tokens per edit" in table
    assert "t equal DNS" in table  # or that no γ has it
    assert "have up to 3 edits." in (tmp_path / "results/modes.md").read_text()
    for name in (
        "tradeoff.md",
        "tradeoff_rs.svg",
        "tradeoff_dns.svg",
        "ablations.md",
        "modes.md",
        "time.md",
        "table3.json",
    ):
        assert (tmp_path / "results" / name).stat().st_size > 100
