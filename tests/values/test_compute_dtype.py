"""Values optimised in half precision: close to those in float32, of the same v₀, on a model that notices nothing."""

import logging

import pytest
import torch
from torch.nn.functional import cosine_similarity

import kedit
from kedit.errors import ConfigError
from kedit.models import ModelArch, compute_copy
from kedit.regularizers import Needs
from kedit.values import optimize
from tiny_models import CONTEXTS, EDITS, MODEL_TYPES, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])


def editor(model, name="rome", **config):
    arch = ModelArch(model)
    width = arch.weight(0).matrix.shape[1]
    given = {"layers": (1,), "steps": 6, "stop_loss": 0.0, **config}
    return kedit.get_editor(
        name, model, tokenizer("plain"), moments={i: moments(width, i) for i in range(4)}, contexts=CONTEXTS, **given
    )


def change(model, **config):
    [patch] = editor(model, **config).propose(EDIT, kedit.SADR(gamma=0.3))
    [delta] = patch.deltas.values()
    return delta.dense.flatten()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_update_is_close_to_that_of_float32(model_type, dtype):
    model = tiny_model(model_type, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    exact, fast = change(model), change(model, compute_dtype=dtype)
    assert fast.dtype == torch.float32
    assert cosine_similarity(exact, fast, dim=0) > 0.98
    assert not torch.equal(exact, fast), "nothing was computed in half precision"
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_residual_starts_from_what_the_model_itself_computes():
    model = tiny_model("llama", dtype=torch.float32)
    made = editor(model, "memit", moment_weight=1e-9, steps=1, compute_dtype="bfloat16")
    [patch] = made.propose(EDIT)  # one step changes nothing, so there is nothing to write
    assert all(float(delta.dense.norm()) < 1e-5 for delta in patch.deltas.values())


@pytest.mark.parametrize(("speedup", "expected"), [(2.0, torch.bfloat16), (1.1, torch.float32), (0.0, torch.float32)])
def test_auto_is_half_precision_where_that_is_faster(monkeypatch, speedup, expected):
    monkeypatch.setattr(compute_copy, "_speedup", lambda device: speedup)
    arch = ModelArch(tiny_model("llama", dtype=torch.float32))
    assert compute_copy.compute_dtype(arch, "auto") == expected


def test_auto_leaves_float64_alone(monkeypatch):
    monkeypatch.setattr(compute_copy, "_speedup", lambda device: 9.0)
    arch = ModelArch(tiny_model("llama", dtype=torch.float64))
    assert compute_copy.compute_dtype(arch, "auto") == torch.float64


def test_the_speed_is_measured():
    assert compute_copy._speedup("cpu") > 0


def test_a_model_that_cannot_be_copied_computes_in_its_own_dtype(caplog):
    model = tiny_model("llama", dtype=torch.float32)
    exact = change(model)
    model._hf_hook = object()  # as accelerate marks modules whose weights it moves
    with caplog.at_level(logging.WARNING, "kedit"):
        assert torch.equal(change(model, compute_dtype="bfloat16"), exact)
    assert "computes in torch.float32, its own dtype" in caplog.text


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="compute_dtype is .*not 'int8'"):
        editor(tiny_model("llama"), compute_dtype="int8")


def test_a_gradient_that_overflows_float16_costs_a_step_not_the_edit(monkeypatch):
    monkeypatch.setattr(optimize, "LOSS_SCALE", 2.0**40)
    model = tiny_model("llama", dtype=torch.float32)
    with_scale = change(model, compute_dtype="float16", steps=30, clamp=0.5)
    assert bool(with_scale.isfinite().all())
    assert float(with_scale.norm()) > 0


class Steep:
    """A penalty of the first edit, whose gradient is too large for float16 at first."""

    name = "steep"

    def __init__(self, factor):
        self.factor = factor

    def needs(self, site):
        return Needs(hidden=range(3, 4))

    def penalty(self, now, before):
        sums = now.rewrite.hidden[3].float().sum(-1).abs()
        own = torch.zeros(now.num_edits)
        own[0] = self.factor
        return own * now.rewrite.mean_per_edit(sums, now.num_edits)


def test_an_overflow_costs_no_other_edit_a_step():
    model = tiny_model("llama", dtype=torch.float32)
    made = editor(model, "memit", compute_dtype="float16", steps=12)
    edits = [EDIT, kedit.Edit(*EDITS["start"])]

    def logs(factor):
        result = made.apply(edits, regularizer=Steep(factor))
        result.revert()
        return result.log

    steep, flat = logs(300.0), logs(0.0)
    assert [row["nll"] for row in steep[1]] == [row["nll"] for row in flat[1]]
    assert steep[0][0]["nll"] == steep[0][1]["nll"], "nothing overflowed"
    assert steep[0][0]["nll"] != steep[0][-1]["nll"], "no step was made"


def test_the_copy_of_the_model_counts_as_memory():
    model = tiny_model("llama", dtype=torch.float32)
    plain, half = (
        editor(model, compute_dtype=dtype).estimate_memory(EDIT, kedit.SADR(gamma=0.3)) for dtype in (None, "bfloat16")
    )
    copied = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (plain.wave.copy, half.wave.copy) == (0, copied)
    assert half.wave.total - copied < plain.wave.total
    assert "copy of the model" in str(half.wave)
