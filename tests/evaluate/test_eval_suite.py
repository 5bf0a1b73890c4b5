"""The benchmark suite on a tiny model, with a regularizer that is installed beside kedit and named by its entry point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import tiny_model, tokenizer

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
    """What pip leaves of a package with an entry point."""
    info = folder / "quiet_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "quiet_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quiet-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedit.regularizers]\nquiet = quiet_plugin:Quiet\n")


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
