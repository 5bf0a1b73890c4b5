"""Speed of the engine against the plain way, on GPT-2 small's shape with random weights.

``pytest benchmarks/test_speed.py --benchmark-only`` times both; each result is first shown to be the plain way's. The
ratio table of interleaved runs, which a noisy machine cannot spoil, is written by ``python benchmarks/bench_speed.py``.
"""

import pytest
import torch
from bench_speed import MEMIT_EDITS, Setting, relative

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module", params=["rome", "memit"])
def setting(request):
    torch.set_num_threads(1)
    made = Setting(request.param)
    assert relative(made.engine(1 if made.name == "rome" else 4), made.plain(1 if made.name == "rome" else 4)) < 1e-4
    return made


def test_engine(benchmark, setting):
    count = 1 if setting.name == "rome" else MEMIT_EDITS
    benchmark.extra_info["edits"] = count
    benchmark.pedantic(setting.engine, args=(count,), rounds=3, warmup_rounds=1)


def test_plain(benchmark, setting):
    benchmark.extra_info["edits"] = 1
    benchmark.pedantic(setting.plain, args=(1,), rounds=1)
