"""The tables of speed and capture, written by their scripts: a quarter of an hour on one core.

The scripts have options of their own (``python benchmarks/bench_speed.py --help``); they time random weights of fixed shapes
and take none of this suite's.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = {"speed": "bench_speed.py", "capture": "bench_capture.py"}


def command(name, results):
    """Return the command that writes ``results/NAME.md`` and ``results/NAME.json``."""
    out = {"speed": results / "speed", "capture": results}[name]
    return [sys.executable, str(HERE / SCRIPTS[name]), "--out", str(out)]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", SCRIPTS)
def test_table(request, name):
    if request.config.getoption("--model"):
        pytest.skip("The shapes are fixed; --model changes nothing about them.")
    results = Path(request.config.getoption("--results"))
    results.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(name, results), check=True)
    assert (results / f"{name}.md").read_text(encoding="utf-8").startswith("# ")
