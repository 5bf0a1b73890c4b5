"""``torchrun -m kedit ...`` gives what one process gives; a process that dies is an error, and its run can be finished."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launching import environment, finish, start

import kedit
from kedit.cli import main
from kedit.evaluation import Probe
from tiny_models import tiny_model, tokenizer

LIMIT = 60.0  # seconds until a dead process must be an error
CASES = 44  # two chunks: of 32 and 12
NAMES = ("Ada Lovelace", "Quentin", "Danielle Darrieux", "The king", "The painter")
PLACES = ("Berlin", "Rome", "London", "Paris")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def made_cases(count):
    """Cases about the people that the tiny model's tokenizer has heard of."""
    found = []
    for number in range(count):
        name, place, other = NAMES[number % 5], PLACES[number % 4], PLACES[(number + 1) % 4]
        edit = kedit.Edit(f"In the year {number}, {{}} works in", name, place, other)
        near = Probe(kind="neighbour", prompt=f"In the year {number}, Anna works in", right=other, wrong=place)
        found.append(kedit.EditCase.of(f"case-{number}", edit, [near]))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved tiny model, and the files that the commands read."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_model("gpt2", layers=3).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    text = ["The old river flows past a house in the city.", "Ada works in the city of Rome, and reads."]
    (folder / "text.txt").write_text("\n".join(f"{line} {i}" for i in range(300) for line in text))
    cases = made_cases(CASES)
    (folder / "cases.jsonl").write_text("\n".join(json.dumps(case.to_dict()) for case in cases))
    (folder / "edits.jsonl").write_text("\n".join(json.dumps(case.edit.to_dict()) for case in cases[:4]))
    return folder


def alone(command, folder, monkeypatch):
    """Run a command in this process."""
    monkeypatch.setenv("KEDIT_CACHE", str(folder / "cache"))
    assert main(["-q", *map(str, command)]) in (0, 3)  # 3: written, and not said


def together(command, folder, launcher=TORCHRUN):
    """Run a command in two processes; what they printed."""
    ran = subprocess.run(
        [*launcher, "-m", "kedit", "-q", *map(str, command)],
        env=environment(KEDIT_CACHE=folder / "cache"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def figures(folder):
    """The figures of an evaluation, with their intervals."""
    found = json.loads((folder / "summary.json").read_text())["metrics"]
    return {(name, when): one[when] for name, one in found.items() for when in ("before", "after", "difference")}


def evaluation(place, out):
    """``kedit eval`` with an editor that needs no second moments."""
    options = ["--editor", "ft", "--set", "layers=1", "--set", "steps=2", "--no-exact"]
    return ["eval", "--model", place / "model", "--data", place / "cases.jsonl", *options, "--out", out]


def same(one, other):
    """Whether two summaries hold the same figures, to rounding."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


def test_edit_by_two_processes(place, tmp_path, monkeypatch):
    """The corpus of the moments and the edits are shared out, and one patch is written."""
    common = ["edit", "--model", place / "model", "--edits", place / "edits.jsonl", "--editor", "memit"]
    common += ["--set", "layers=[1,2]", "--set", "steps=3", "--moments-corpus", place / "text.txt"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    alone([*common, "--out", tmp_path / "one" / "edit.safetensors"], tmp_path / "one", monkeypatch)
    printed = together([*common, "--out", tmp_path / "two" / "edit.safetensors"], tmp_path / "two")
    assert printed.count("memit: 4 edit(s)") == printed.count("patch: ") == 1  # from one of them
    one, two = (kedit.EditPatch.load(tmp_path / folder / "edit.safetensors") for folder in ("one", "two"))
    assert one.deltas.keys() == two.deltas.keys()
    for name, delta in one.deltas.items():
        assert delta.norm > 1e-3
        assert float((two.deltas[name].dense - delta.dense).norm()) <= 1e-4 * delta.norm
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.slow
def test_stats_by_two_processes(place, tmp_path, monkeypatch, capsys):
    command = [
        "stats",
        "--model",
        place / "model",
        "--layers",
        "1,2",
        "--corpus",
        place / "text.txt",
        "--tokens",
        "4000",
    ]
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    alone(command, tmp_path / "one", monkeypatch)
    printed = capsys.readouterr().out.splitlines()[:-1]  # the last names the cache
    assert together(command, tmp_path / "two").splitlines()[:-1] == printed
    assert together(command, tmp_path / "three", ACCELERATE).splitlines()[:-1] == printed
    kept = [sorted(path.name for path in (tmp_path / name).rglob("*.safetensors")) for name in ("one", "two", "three")]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 2


@pytest.mark.slow
def test_eval_by_two_processes(place, tmp_path, monkeypatch, capsys):
    alone(evaluation(place, tmp_path / "one"), tmp_path, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    said = together(evaluation(place, tmp_path / "two"), tmp_path).splitlines()
    assert len(said) == len(printed)
    same(figures(tmp_path / "one"), figures(tmp_path / "two"))
    assert [path.name for path in (tmp_path / "two").glob("records*")] == ["records.jsonl"]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_killed_evaluation_is_an_error_within_a_minute_and_is_finished_later(place, tmp_path, monkeypatch):
    """The second process is killed in the middle of its cases; one process finishes the run."""
    out = tmp_path / "run"
    started = start(["-m", "kedit", "-q", *evaluation(place, out)], tmp_path, 2)
    try:
        until = time.monotonic() + 200
        while not lines(out / "records-1.jsonl"):
            assert time.monotonic() < until, (tmp_path / "log-1").read_text()
            assert started[1].poll() is None, (tmp_path / "log-1").read_text()
            time.sleep(0.005)
        started[1].send_signal(signal.SIGKILL)
        assert started[1].wait(LIMIT) == -signal.SIGKILL
        since = time.monotonic()
        assert started[0].wait(LIMIT) == 1
        assert time.monotonic() - since < LIMIT
    finally:
        finish(started)
    assert "kedit eval: Another of the 2 processes of this job is gone" in (tmp_path / "log-0").read_text()

    # What is there is whole but for the dead process's last line; what says that the run is finished is not there.
    assert sorted(path.name for path in out.iterdir()) == ["records-1.jsonl", "records.jsonl", "run.json"]
    json.loads((out / "run.json").read_text())
    done = [json.loads(line)["id"] for line in lines(out / "records.jsonl")]
    done += [json.loads(line)["id"] for line in lines(out / "records-1.jsonl")[:-1]]
    assert 32 <= len(done) < CASES

    shutil.copytree(out, tmp_path / "left")
    alone(evaluation(place, out), tmp_path, monkeypatch)
    alone(evaluation(place, tmp_path / "whole"), tmp_path, monkeypatch)
    same(figures(out), figures(tmp_path / "whole"))
    kept = {json.loads(line)["id"]: line for line in lines(out / "records.jsonl")}
    assert len(kept) == CASES
    assert all(line in kept.values() for line in lines(tmp_path / "left" / "records.jsonl"))  # not asked again
