"""Run the Triton kernels in Triton's interpreter on a CPU. Run as a script, it prints JSON.

Triton has to be imported with TRITON_INTERPRET=1 in the environment, which must not happen in the process that runs
the other tests: there the kernels would be interpreted on a GPU as well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

assert os.environ.get("TRITON_INTERPRET") == "1"
MODELS = ("gpt2", "llama", "mistral-window", "gemma2-softcap", "gpt_oss-sinks", "gptj")
EDITED = ("gpt2", "llama", "gemma2-softcap")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from capture_cases import CASES, Case, build, errors, passes  # noqa: E402
from capture_faults import FAULTS  # noqa: E402
from capture_zoo import eager_rows, eager_twin, inputs, make  # noqa: E402

import kedit  # noqa: E402
import pretend  # noqa: E402
from kedit.capture import capture_attention, kernel, triton_rows  # noqa: E402
from kedit.models import ModelArch  # noqa: E402
from tiny_models import tokenizer  # noqa: E402


def checked(case: Case) -> dict[str, object]:
    try:
        worst = errors(case, triton_rows)
    except Exception as error:
        return {"ok": False, "why": f"{type(error).__name__}: {error}"}
    return {"ok": passes(case, worst), "why": worst}


def with_change(old: str, new: str, case: Case) -> bool:
    """Whether a case still passes with one change made to the kernels' source."""
    source = Path(kernel.__file__).read_text()
    assert old in source, f"the kernels no longer contain {old!r}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed_kernel.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("changed_kernel", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        triton_rows.kernel = module
        try:
            return bool(checked(case)["ok"]) and ("before" not in old or accumulates())
        finally:
            triton_rows.kernel = kernel


def accumulates() -> bool:
    """Whether the backward pass adds to the gradients it is given."""
    q, k, positions, rule, weights = build(Case(groups=4))
    rows = triton_rows.forward(q, k, positions, rule)
    fresh = [torch.zeros_like(q), torch.zeros_like(k)]
    used = [torch.ones_like(q), torch.ones_like(k)]
    for dq, dk in (fresh, used):
        triton_rows.backward(weights, rows, q, k, positions, rule, (dq, dk))
    return all((b - a - 1).abs().max() < 1e-5 for a, b in zip(fresh, used, strict=True))


def through_model(name: str) -> float:
    """Largest error of the rows and of their gradient, capture by kernel against eager attention."""
    model = make(name)
    given, positions = inputs("left")
    twin = eager_twin(model)
    found = []
    for way in ("kernel", "eager"):
        embeddings = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
        fed = {"inputs_embeds": embeddings, "attention_mask": given["attention_mask"]}
        if way == "kernel":
            with capture_attention(model, positions, backend="triton") as cap:
                model(**fed)
            rows = cap.rows
        else:
            rows = eager_rows(twin, fed, positions)
        loss = sum(rows[i].square().sum() for i in rows)
        found.append((rows, torch.autograd.grad(loss, embeddings)[0]))
    (rows, grad), (want, want_grad) = found
    worst = max((rows[i] - want[i]).abs().max().item() for i in want)
    return max(worst, ((grad - want_grad).abs().max() / want_grad.abs().max()).item())


def through_an_edit(name: str) -> tuple[float, int]:
    """An edit with SADR on two pretended devices: its update's error against the CPU's, and how often kernels ran."""
    edit = kedit.Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
    found, launches = [], 0

    def updates(model: Any) -> list[torch.Tensor]:
        options = {"layers": 1, "steps": 3, "stop_loss": 0.0, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0}
        moments = {1: torch.eye(ModelArch(model).memory_width(1))}
        editor = kedit.ROME(model, tokenizer("bos"), **options, contexts=["{}", "So. {}"], moments=moments)
        [result] = editor.propose(edit, kedit.SADR(gamma=0.3))
        return [delta.dense.cpu() for delta in result.deltas.values()]

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        pretend.launch(*args, **kwargs)

    for away in (False, True):
        model = make(name, vocab_size=len(tokenizer("bos")))
        if away:
            with pretend.devices(kernels=True), mock.patch.object(triton_rows, "_launch", counted):
                found.append(updates(pretend.spread(model, 2)))
        else:
            found.append(updates(model))
    apart = max((a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True))
    return float(apart), launches


def main() -> dict[str, object]:
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # some faults overflow
    return {
        "cases": {str(case): checked(case) for case in CASES},
        "models": {name: through_model(name) for name in MODELS},
        "edits": {name: through_an_edit(name) for name in EDITED},
        "accumulates": accumulates(),
        "caught": {name: not with_change(fault.old, fault.new, fault.case) for name, fault in FAULTS.items()},
        "control": {str(case): with_change("KH", "KH", case) for case in {fault.case for fault in FAULTS.values()}},
    }


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
