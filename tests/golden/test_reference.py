"""The reference itself against golden: the proof that its conventions are those of the published code."""

import pytest

from reference import common, memit, pmet, rome
from reference.inner import Hyper

from .conftest import assert_losses, assert_relative

GAMMAS = ("0", "0.01", "0.5")
SLOW = pytest.mark.slow


def _hyper(run: dict) -> Hyper:
    return Hyper(run["steps"], run["lr"], run["weight_decay"], run["kl"], run["clamp"], run["gamma"])


def _requests(golden) -> list[common.Request]:
    return [
        common.request(golden.tokenizer, r["prompt"], r["subject"], r["target_new"], golden.contexts)
        for r in golden.requests
    ]


QUICK = {("gptj", "0.5", 4)}
ROME = [
    pytest.param(model, gamma, i, marks=() if (model, gamma, i) in QUICK else SLOW)
    for model in ("gpt2", "gptj")
    for gamma in GAMMAS
    for i in range(5)
]


@pytest.mark.parametrize(("golden", "gamma", "i"), ROME, indirect=["golden"])
def test_rome(golden, gamma, i):
    name = f"rome.gamma{gamma}.req{i}"
    run = golden.runs[name]
    layer = run["layer"]
    found = rome.rome(golden.model(), _requests(golden)[i], layer, golden.moments(layer)[layer], _hyper(run))
    assert_losses(found.value.losses, run["losses"])
    assert_relative(found.left, golden.tensors[f"{name}.u"], 1e-5)
    assert_relative(found.right, golden.tensors[f"{name}.v"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("method", [memit.memit, pmet.pmet])
@pytest.mark.parametrize("golden", ["gpt2", "gptj"], indirect=True)
def test_spread(golden, method, gamma):
    name = f"{method.__name__}.gamma{gamma}"
    run = golden.runs[name]
    layers = run["layers"]
    ridge = run["mom2_update_weight"]
    found = method(golden.model(), _requests(golden), layers, golden.moments(*layers), ridge, _hyper(run))
    assert_losses([row for value in found.values for row in value.losses], run["losses"])
    for layer in layers:
        assert_relative(found.updates[layer], golden.tensors[f"{name}.layer{layer}.delta"], 1e-5)
