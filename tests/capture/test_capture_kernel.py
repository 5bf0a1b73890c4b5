"""The row implementations: torch here, the Triton kernels interpreted, compiled ahead of time, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import CASES, FEATURES, Case, build, errors, passes
from capture_faults import FAULTS

from kedit.capture import attention_rows, sdpa_with_rows, torch_rows
from kedit.errors import CaptureError

INTERPRET = "capture_interpreted.py"
COMPILE = "capture_aot.py"
HERE = Path(__file__).parent
MODELS = ("gpt2", "llama", "mistral-window", "gemma2-softcap", "gpt_oss-sinks", "gptj")
EDITED = ("gpt2", "llama", "gemma2-softcap")
ARCHS = (80, 90, 100)
KERNELS = ("rows_fwd_kernel", "rows_bwd_dq_kernel", "rows_bwd_dk_kernel")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[str], Any]]:
    """Start a script in a process of its own and read its JSON; once for all tests that ask."""
    running: dict[str, subprocess.Popen[str]] = {}
    read: dict[str, Any] = {}

    def start(command: str) -> None:
        script, *arguments = command.split()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if script == "capture_interpreted.py":
            environment["TRITON_INTERPRET"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
        running[command] = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )

    def result(command: str) -> Any:
        if command not in running:
            start(command)
        if command not in read:
            out, _ = running[command].communicate(timeout=3000)
            assert running[command].returncode == 0, f"{command} failed"
            read[command] = json.loads(out)
        return read[command]

    for command in (INTERPRET, COMPILE):
        start(command)
    yield result
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_rows_and_gradients_equal_the_reference(case: Case) -> None:
    worst = errors(case, torch_rows)
    assert passes(case, worst), worst


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_torch_rows_in_float64(case: Case) -> None:
    """In float64 the implementation and the reference are the same function."""
    if case.lse:
        pytest.skip("the log-normaliser given is float32")
    q, k, positions, rule, weights = build(Case(**{**vars(case), "dtype": torch.float64}))
    from kedit.capture.autograd import rows_node
    from kedit.capture.reference import reference_rows

    found = []
    for way in (
        lambda q, k: rows_node(q, k, positions, rule, torch_rows),
        lambda q, k: reference_rows(q, k, positions, rule),
    ):
        leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
        rows = way(*leaves)
        assert rows.dtype == torch.float64
        found.append((rows, *torch.autograd.grad((rows * weights).sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", [Case(), Case(groups=4), Case(packed=True), Case(allow="bqk", causal=False)], ids=str)
def test_sdpa_with_rows_is_sdpa_and_rows(case: Case, dropout: float) -> None:
    q, k, positions, rule, weights = build(case)
    v = torch.randn_like(k)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    gqa = case.groups > 1
    found = []
    for fused in (True, False):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(7)
        if fused:
            out, rows = sdpa_with_rows(
                *leaves, rule.allow, positions, scaling=rule.scaling, causal=case.causal, dropout=dropout
            )
        else:
            out = sdpa(*leaves, rule.allow, dropout, case.causal, scale=rule.scaling, enable_gqa=gqa)
            rows = attention_rows(
                *leaves[:2], positions, scaling=rule.scaling, allow=rule.allow, causal=case.causal, offset=0
            )
        loss = out.square().sum() + (rows * weights).sum()
        found.append([out, rows, *torch.autograd.grad(loss, leaves)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, positions, rule, weights = build(Case())
    v = torch.randn_like(k)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), wanted, strict=True)]
        out, rows = sdpa_with_rows(*leaves, None, positions, scaling=rule.scaling, causal=True)
        (out.sum() + (rows * weights).sum()).backward()
        assert [x.grad is not None for x in leaves] == list(wanted)
    leaf = q.detach().requires_grad_()
    _, rows = sdpa_with_rows(leaf, k, v, None, positions, scaling=rule.scaling, causal=True)
    (alone,) = torch.autograd.grad((rows * weights).sum(), leaf)
    other = attention_rows(leaf, k, positions, scaling=rule.scaling, causal=True)
    assert torch.equal(alone, torch.autograd.grad((other * weights).sum(), leaf)[0])


def test_gradient_of_hidden_keys_is_zero_whatever_comes_in() -> None:
    """log(rows) has an infinite slope at hidden keys and dead rows; nothing of it may reach q and k."""
    q, k, positions, _, _ = build(Case())
    q.requires_grad_()
    rows = attention_rows(q, k, positions, scaling=0.1, causal=True)
    grad = torch.full_like(rows, torch.nan).where(rows == 0, rows)
    assert torch.isfinite(torch.autograd.grad(rows, q, grad)[0]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.zeros(2, 1)}, "integers"),
        ({"positions": torch.zeros(3, 1, dtype=torch.int64)}, "3 rows"),
        ({"k": torch.zeros(2, 3, 5, 8)}, "do not belong"),
        ({"q": torch.zeros(2, 4, 8)}, "four axes"),
        ({"allow": torch.zeros(5, 5)}, "bool"),
        ({"add": torch.ones(5, 5, dtype=torch.int64)}, "float mask"),
        ({"backend": "cuda"}, "no backend"),
    ],
)
def test_unfit_arguments(changes: dict[str, Any], message: str) -> None:
    given = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 5, 8),
        "positions": torch.zeros(2, 1, dtype=torch.int64),
    }
    with pytest.raises(CaptureError, match=message):
        attention_rows(**{**given, "scaling": 1.0, **changes})


def test_triton_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 3, 8)
    at = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(CaptureError, match="Triton kernel cannot run"):
        attention_rows(q, q, at, scaling=1.0, backend="triton")
    with pytest.raises(CaptureError, match="float64"):
        attention_rows(q.double(), q.double(), at, scaling=1.0, backend="triton")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from capture_zoo import inputs, make

    from kedit.capture import capture_attention

    given, positions = inputs()
    model = make("llama")
    with caplog.at_level("INFO", logger="kedit.capture"), capture_attention(model, positions):
        model(**given)
        model(**given)
    assert len(caplog.records) == 1
    assert "torch backend (asked for 'auto')" in caplog.text


def test_importing_the_capture_does_not_import_triton() -> None:
    code = "import sys, kedit.capture; assert 'triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_gpu_equals_the_reference(case: Case) -> None:
    from kedit.capture import triton_rows

    worst = errors(case, triton_rows, "cuda")
    assert passes(case, worst), worst


@needs_gpu
@pytest.mark.gpu
def test_capture_on_gpu_equals_capture_on_cpu() -> None:
    from capture_zoo import inputs, make

    from kedit.capture import capture_attention

    given, positions = inputs("left")
    model = make("llama")
    with capture_attention(model, positions) as cap:
        model(**given)
    model.to("cuda")
    moved = {name: tensor.to("cuda") for name, tensor in given.items()}
    plain = model(**moved).logits
    with capture_attention(model, positions, backend="triton") as gpu:
        assert torch.equal(model(**moved).logits, plain)
    for layer, rows in cap.rows.items():
        assert (gpu.rows[layer].cpu() - rows).abs().max() <= 1e-5


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_ahead_of_time(workers: Callable[[str], Any], arch: int, kernel: str) -> None:
    compiled = workers(COMPILE)
    if arch == 100 and not any(key.startswith("sm_100 ") for key in compiled):
        pytest.skip("This version of Triton does not compile for Blackwell.")
    found = {key: value for key, value in compiled.items() if key.startswith(f"sm_{arch} {kernel} ")}
    assert found
    assert all(isinstance(value, int) for value in found.values()), found


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_variant_compiles_ahead_of_time(workers: Callable[[str], Any]) -> None:
    found = workers("capture_aot.py --full")
    assert len(found) == 3 * 3 * 2 * 4 * 3
    assert all(isinstance(value, int) for value in found.values()), found


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_equals_the_reference(workers: Callable[[str], Any], case: Case) -> None:
    found = workers(INTERPRET)["cases"][str(case)]
    assert found["ok"], found["why"]


@needs_triton
def test_interpreted_kernel_adds_to_gradients_in_place(workers: Callable[[str], Any]) -> None:
    assert workers(INTERPRET)["accumulates"]


@needs_triton
@pytest.mark.parametrize("name", MODELS)
def test_interpreted_kernel_through_a_model(workers: Callable[[str], Any], name: str) -> None:
    assert workers(INTERPRET)["models"][name] <= 2e-6


@needs_triton
@pytest.mark.parametrize("name", EDITED)
def test_an_edit_through_interpreted_kernels_on_pretended_devices(workers: Callable[[str], Any], name: str) -> None:
    apart, launches = workers(INTERPRET)["edits"][name]
    assert launches >= 7  # three forward passes, dq and dk in two backward ones
    assert apart <= 1e-5


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(workers: Callable[[str], Any], fault: str) -> None:
    assert workers(INTERPRET)["control"][str(FAULTS[fault].case)], "the case fails without the fault"
    assert workers(INTERPRET)["caught"][fault]
