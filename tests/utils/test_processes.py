"""Two processes on the CPU give what one gives; an error in one is an error in both."""

from pathlib import Path

import pytest
import torch
from launching import finish, start

JOB = Path(__file__).with_name("job.py")


def run(task, folder, size):
    """Return the result of the first process."""
    codes = finish(start([JOB, task, folder], folder, size))
    assert codes == [0] * size, "\n".join((folder / f"log-{rank}").read_text() for rank in range(size))
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every task in one process and in two."""
    folder = tmp_path_factory.mktemp("jobs")
    one, two = (run("all", folder / str(size), size) for size in (1, 2))
    return {task: (folder, one[task], two[task]) for task in one}


def test_the_corpus_is_shared_out(both):
    _, one, two = both["moments"]
    assert torch.equal(one["tokens"], two["tokens"])
    assert one["tokens"].tolist() == [4_000, 4_000]
    for layer in ("1", "2"):
        torch.testing.assert_close(two[layer], one[layer], rtol=1e-12, atol=1e-12)


def test_the_edits_of_a_batch_are_shared_out(both):
    _, one, two = both["edit"]
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8)  # transformers' float32 islands


def test_the_cases_of_an_evaluation_are_shared_out(both):
    folder, one, two = both["eval"]
    assert one.pop("asked") == [6]
    assert two.pop("asked") == [4, 2]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)
    records = [path.name for path in (folder / "2" / "run").glob("records*")]
    assert records == ["records.jsonl"]
    assert len((folder / "2" / "run" / "records.jsonl").read_text().splitlines()) == 6
    assert (folder / "2" / "run" / "summary.json").exists()


def test_a_shared_run_is_finished_by_one_process(both, tmp_path):
    """One process finishes an interrupted run of two: it measures the missing cases and keeps the others."""
    import shutil

    folder, one, _ = both["eval"]
    shutil.copytree(folder / "2" / "run", tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    path.with_name("records-1.jsonl").write_text(lines[2] + lines[5][:40])
    again = run("eval", tmp_path, 1)
    assert again.pop("asked") == [3]
    for name in again:
        torch.testing.assert_close(again[name], one[name], rtol=1e-6, atol=1e-6)


def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    assert finish(start([JOB, "error", tmp_path], tmp_path, 2)) == [1, 1]
    for rank in range(2):
        assert "NonFiniteError" in (tmp_path / f"log-{rank}").read_text()


def test_alone_nothing_is_shared(monkeypatch):
    from kedit.utils import distributed

    monkeypatch.setenv("WORLD_SIZE", "1")
    group = distributed.join()
    assert group.leads
    assert group.share([1, 2, 3]) == [1, 2, 3]
    assert group.gather("x") == ["x"]
    assert group.broadcast("x") == "x"
    assert group.sum(torch.ones(2)).tolist() == [1, 1]
    group.wait()


def test_one_process_commands_refuse_a_launcher(monkeypatch, capsys):
    from kedit.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 1
    assert "run by one process" in capsys.readouterr().err
