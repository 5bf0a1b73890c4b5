"""Speed of kedit against full forward passes, with the shape of GPT-2 small and random weights.

``pytest benchmarks/test_speed.py --benchmark-only`` times both, after comparing their results. The
ratios of interleaved runs, which depend less on other load, are written by ``python benchmarks/bench_speed.py``.
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
