"""kedit's ROME against golden: every loss of every step, and the update."""

import pytest
import torch

import kedit

from .conftest import COLUMNS, assert_losses, assert_relative

GAMMAS = ("0", pytest.param("0.01", marks=pytest.mark.slow), "0.5")


def _editor(golden, gamma: str) -> kedit.ROME:
    run = golden.runs[f"rome.gamma{gamma}.req0"]
    return kedit.ROME(
        golden.model(),
        golden.tokenizer,
        moments=golden.moments(run["layer"]),
        contexts=golden.contexts,
        layers=(run["layer"],),
        steps=run["steps"],
        lr=run["lr"],
        weight_decay=run["weight_decay"],
        kl_factor=run["kl"],
        clamp=run["clamp"],
    )


def _edits(golden) -> list[kedit.Edit]:
    return [kedit.Edit(**request) for request in golden.requests]


def _regularizer(golden, gamma: str):
    return kedit.SADR(gamma=float(gamma)) if float(gamma) else None


def _assert_update(golden, name: str, patch: kedit.EditPatch) -> None:
    (delta,) = patch.deltas.values()
    u, v = golden.tensors[f"{name}.u"], golden.tensors[f"{name}.v"]
    assert_relative(delta.right[:, 0], u, 1e-5)
    assert_relative(delta.left[:, 0], v, 1e-5)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("golden", ["gpt2", "gptj"], indirect=True)
def test_losses_and_update(golden, gamma):
    editor = _editor(golden, gamma)
    for i, edit in enumerate(_edits(golden)):
        name = f"rome.gamma{gamma}.req{i}"
        result = editor.apply(edit, _regularizer(golden, gamma))
        (log,) = result.log
        assert_losses([[row.get(c, 0.0) for c in COLUMNS] for row in log], golden.runs[name]["losses"])
        _assert_update(golden, name, result.patch)
        result.revert()


@pytest.mark.parametrize("golden", ["gpt2", "gptj"], indirect=True)
def test_proposed_together(golden):
    patches = _editor(golden, "0.5").propose(_edits(golden), _regularizer(golden, "0.5"))
    for i, patch in enumerate(patches):
        _assert_update(golden, f"rome.gamma0.5.req{i}", patch)


@pytest.mark.parametrize("golden", ["gpt2", "gptj"], indirect=True)
def test_applied_weight_is_the_golden_weight(golden):
    editor = _editor(golden, "0")
    name = "rome.gamma0.req4"
    result = editor.apply(_edits(golden)[4])
    (parameter,) = result.patch.deltas
    change = editor.model.get_parameter(parameter).detach() - golden.base.get_parameter(parameter).detach()
    change = change.T if golden.base.config.model_type == "gpt2" else change
    assert_relative(change, torch.outer(golden.tensors[f"{name}.v"], golden.tensors[f"{name}.u"]), 2e-5)
