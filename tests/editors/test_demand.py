"""The estimated memory of an edit is the memory that it uses."""

import gc
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kedit
import zoo
from kedit.utils.device_memory import LivePeak
from tiny_models import CONTEXTS, EDITS, moments, tokenizer

ONE = [kedit.Edit(*EDITS["start"])]
MANY = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")] * 4
EDITORS = ["rome", "memit", "pmet", "emmet", "alphaedit", "ft"]


def build(width, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3_000,
        hidden_size=128,
        intermediate_size=width,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def make(name, model, width):
    layers = (1,) if name in ("rome", "emmet", "ft") else (1, 2)
    given = {} if name == "ft" else {"moments": {layer: moments(width, 1).float() for layer in layers}}
    return kedit.get_editor(
        name, model, tokenizer(), layers=layers, contexts=CONTEXTS, steps=2, join_subjects=False, **given
    )


def measured(name, width, dtype, edits, regularizer):
    """What an apply is stated to take; the bytes that it took at its peak, and that are left."""
    gc.collect()  # what other tests left in cycles goes now, not while this one measures
    model = build(width, dtype)
    editor = make(name, model, width)
    stated = editor.estimate_memory(edits, regularizer)
    there = [moment.matrix for moment in editor.moments.values()] if isinstance(editor, kedit.ValueEditor) else []
    with LivePeak(model, there) as seen:
        editor.apply(edits, regularizer)
    return stated, seen.peak, seen.now


@pytest.mark.parametrize("edits", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize(("width", "dtype"), [(256, torch.float32), (768, torch.bfloat16)], ids=["wave", "solving"])
@pytest.mark.parametrize("name", EDITORS)
def test_the_stated_demand_is_within_a_fifth_of_the_measured_peak(name, width, dtype, edits):
    edits = edits if name != "emmet" else edits[:3]
    regularizer = kedit.SADR(gamma=0.1) if name == "rome" else None
    stated, peak, left = measured(name, width, dtype, edits, regularizer)
    besides = stated.total - stated.model - stated.moments
    if not 0.8 < besides / peak < 1.2:  # one run of many measured 1.7 times the usual peak, why is not known
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            stated, peak, left = fresh.submit(measured, name, width, dtype, edits, regularizer).result()
    assert 0.8 < besides / peak < 1.2, (str(stated), peak / 2**20)
    assert stated.kept == pytest.approx(left, rel=0.2), (stated.kept / 2**20, left / 2**20)


@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_held_keys_count(name, width):
    edits = MANY[1:2] if name == "rome" else MANY
    stated, peak, _ = measured(name, width, torch.float32, edits, "relation_keys")
    besides = stated.total - stated.model - stated.moments
    assert 0.8 < besides / peak < 1.25, (str(stated), peak / 2**20)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_a_mixture_counts_every_expert_that_some_context_reaches(name):
    model = zoo.make("olmoe", vocab_size=400, num_experts=16, num_experts_per_tok=2, intermediate_size=256)
    layers = (1,) if name == "rome" else (0, 1)
    each = torch.eye(256).repeat(16, 1, 1) * torch.linspace(0.01, 2, 256)
    given = {"layers": layers, "moments": dict.fromkeys(layers, each)}
    contexts = [*CONTEXTS, *(f"{word}. {{}}" for word in ("The river is long", "Paris", "It is cold", "Every year"))]
    editor = kedit.get_editor(name, model, tokenizer(), contexts=contexts, steps=2, **given)
    stated = editor.estimate_memory(ONE)
    with LivePeak(model, [each]) as seen:
        editor.apply(ONE)
    besides = stated.total - stated.model - stated.moments
    assert 0.75 < besides / seen.peak < 1.25, (str(stated), seen.peak / 2**20)
    assert stated.kept == pytest.approx(seen.now, rel=0.25), (stated.kept / 2**20, seen.now / 2**20)


def test_the_model_and_the_moments_count_what_they_are():
    model = build(256, torch.bfloat16)
    stated = make("memit", model, 256).estimate_memory(ONE)
    assert stated.model == sum(p.numel() * 2 for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert stated.moments == 2 * 256 * 256 * 4


def test_saying_the_demand_changes_nothing():
    model = build(256, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = make("memit", model, 256)
    assert "MiB (model" in str(editor.estimate_memory(MANY))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not kedit.Ledger.of(model).touched


PROCESS = """
import sys
sys.path[:0] = {path!r}
import torch, kedit
from test_demand import MANY, build, make
from pathlib import Path

def now(field):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))

torch.set_num_threads(1)
model = build(3072, torch.float32)
editor = make("memit", model, 3072)
stated = editor.estimate_memory(MANY[:3])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = now("VmRSS")
editor.apply(MANY[:3])
print(now("VmHWM") - before, stated.total - stated.model - stated.moments)
"""


@pytest.mark.slow
def test_the_whole_process_takes_no_more_than_was_said():
    """Measured by the system, workspace of the libraries included."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii"):
            pass
    except OSError:
        pytest.skip("Needs /proc/self/clear_refs to measure the peak of a process.")
    script = PROCESS.format(path=[str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    taken, stated = map(int, done.stdout.split()[-2:])
    assert 0.5 * stated < taken < 1.2 * stated, (taken / 2**20, stated / 2**20)
