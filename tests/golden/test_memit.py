"""kedit's MEMIT and PMET against golden: five edits in one batch over three blocks."""

import pytest

import kedit

from .conftest import COLUMNS, assert_losses, assert_relative

GAMMAS = ("0", pytest.param("0.01", marks=pytest.mark.slow), "0.5")


def _editor(golden, method: str, run: dict) -> kedit.Editor:
    return kedit.get_editor(
        method,
        golden.model(),
        golden.tokenizer,
        moments=golden.moments(*run["layers"]),
        contexts=golden.contexts,
        layers=tuple(run["layers"]),
        steps=run["steps"],
        lr=run["lr"],
        weight_decay=run["weight_decay"],
        kl_factor=run["kl"],
        clamp=run["clamp"],
        moment_weight=run["mom2_update_weight"],
        join_subjects=False,  # the published code gives each of two facts of one subject a value of its own
    )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("method", ["memit", "pmet"])
@pytest.mark.parametrize("golden", ["gpt2", "gptj"], indirect=True)
def test_losses_and_updates(golden, method, gamma):
    name = f"{method}.gamma{gamma}"
    run = golden.runs[name]
    editor = _editor(golden, method, run)
    edits = [kedit.Edit(**request) for request in golden.requests]
    regularizer = kedit.SADR(gamma=float(gamma)) if float(gamma) else None
    result = editor.apply(edits, regularizer)
    assert_losses([[row.get(c, 0.0) for c in COLUMNS] for log in result.log for row in log], run["losses"])
    assert len(result.patch.deltas) == len(run["layers"])
    for layer, delta in zip(run["layers"], result.patch.deltas.values(), strict=True):
        assert_relative(delta.left @ delta.right.T, golden.tensors[f"{name}.layer{layer}.delta"], 1e-5)
