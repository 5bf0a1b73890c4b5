"""Options of the benchmark suite; see docs/evaluation.md."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_xdist_auto_num_workers() -> int:
    """One process: the suite's runs build on one another, and times must not be taken beside other work."""
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kedit quality suite")
    group.addoption("--model", help="folder or hub name (default: the embedded model)")
    group.addoption("--data", help="cases for --model: CounterFact or any other known form")
    group.addoption("--dtype", help="dtype of the weights of --model")
    group.addoption("--device-map", help="how accelerate places a large model: auto")
    group.addoption("--moments-corpus", help="text for the second moments of --model")
    group.addoption("--cases", type=int, default=200, help="held-out edits (default 200)")
    group.addoption(
        "--dev-cases", type=int, default=60, help="edits of the other half, for hyper-parameters (default 60)"
    )
    group.addoption("--largest", type=int, default=1000, help="most edits in batch and sequential runs (default 1000)")
    group.addoption("--editors", help="names with commas (default: all that are registered)")
    group.addoption(
        "--add-regularizer", action="append", default=[], help="a further regularizer by name, as rows of its own"
    )
    group.addoption("--results", default=str(HERE / "results"), help="folder for tables and plots")
    group.addoption(
        "--runs", default=str(HERE / ".runs"), help="folder for records; finished runs are taken from there"
    )


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest):
    from quality import Bench

    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    return Bench.of(request.config)
