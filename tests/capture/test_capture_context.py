"""The context managers: what they leave behind, what they refuse, threads, checkpointing."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from capture_zoo import config_of, eager_rows, eager_twin, inputs, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kedit.capture import capture_attention, legacy_attention, use_capture_attention
from kedit.capture.interface import NAME
from kedit.errors import CaptureError


def checkpoint(model: Any, *, use_reentrant: bool) -> None:
    """Turn checkpointing on; transformers has renamed it from ``gradient_`` to ``activation_``."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    given = {f"{name}_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    getattr(model, f"{name}_checkpointing_enable")(**given)


KINDS = ("llama", "gemma2-softcap", "gptj", "bloom", "falcon")


def traces(model: nn.Module) -> dict[str, Any]:
    """List everything that a capture could leave behind: implementation names, hooks, instance attributes."""
    return {
        name: (
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", KINDS)
def test_nothing_stays_after_an_exception(name: str) -> None:
    model = make(name)
    given, positions = inputs()
    before, plain = traces(model), model(**given).logits

    def interrupted() -> None:
        with capture_attention(model, positions):
            assert traces(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert traces(model) == before
    bad = torch.full((3, 1), 99)
    with pytest.raises(CaptureError, match="Row 99 was asked for"), capture_attention(model, bad):
        model(**given)
    assert traces(model) == before
    assert torch.equal(model(**given).logits, plain)


@pytest.mark.parametrize("name", ["bloom", "xglm", "falcon"])
def test_an_exception_inside_the_model_leaves_no_mode_behind(name: str) -> None:
    model = make(name)
    given, positions = inputs()
    with pytest.raises(CaptureError), capture_attention(model, positions[:2]):
        model(**given)
    assert not any(
        isinstance(mode, legacy_attention._Overhear) for mode in torch.overrides._get_current_function_mode_stack()
    )


def test_nested_switching_and_foreign_attributes() -> None:
    model = make("llama")
    neo = make("gpt_neo")
    attention = neo.transformer.h[0].attn.attention
    foreign = attention.__dict__["_attn"] = attention._attn
    with use_capture_attention(model), use_capture_attention(neo):
        with use_capture_attention(model), capture_attention(neo, inputs()[1]):
            assert model.config._attn_implementation == NAME
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    assert attention.__dict__["_attn"] is foreign
    assert "_attn" not in neo.transformer.h[1].attn.attention.__dict__


@pytest.mark.parametrize("name", KINDS)
def test_a_model_and_its_decoder_may_be_switched_in_any_order(name: str) -> None:
    model = make(name)
    given, positions = inputs("left")
    before, plain = traces(model), model(**given).logits
    outer, inner = use_capture_attention(model), use_capture_attention(model.base_model)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with capture_attention(model.base_model, positions) as cap:
        assert torch.equal(model(**given).logits, plain)
        assert sorted(cap.rows) == [0, 1, 2]
    inner.__exit__(None, None, None)
    assert traces(model) == before


def test_one_capture_per_model_and_thread() -> None:
    model = make("gpt2")
    _, positions = inputs()
    with capture_attention(model, positions):
        with pytest.raises(CaptureError, match="already being captured"), capture_attention(model, positions):
            pass
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


def test_positions_change_between_passes_and_kept_rows_stay() -> None:
    model = make("llama")
    given, positions = inputs()
    with capture_attention(model, positions) as cap:
        model(**given)
        first = cap.rows
        copied = {layer: rows.clone() for layer, rows in first.items()}
        cap.positions = positions[:, :1] - 2
        model(**given)
        second = cap.rows
    want = eager_rows(eager_twin(model), given, positions[:, :1] - 2)
    assert all(torch.equal(first[layer], copied[layer]) for layer in first)
    assert all((second[layer] - want[layer]).abs().max() < 2e-6 for layer in want)


def test_layers_and_detach() -> None:
    model = make("llama")
    model.requires_grad_(True)
    given, positions = inputs()
    with capture_attention(model, positions, layers=range(1, 1 << 30), detach=True) as cap:
        logits = model(**given).logits
    assert list(cap.rows) == [1, 2]
    assert logits.requires_grad
    assert not cap.rows[1].requires_grad
    with pytest.raises(CaptureError, match=r"Blocks \[3, 7\]"), capture_attention(model, positions, layers=[1, 3, 7]):
        pass


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.zeros(3, 1), "integers"),
        (torch.zeros(3, dtype=torch.int64), "integers"),
        (torch.zeros(2, 1, dtype=torch.int64), "2 rows but the forward pass has a batch of 3"),
    ],
)
def test_unfit_positions(positions: Tensor, message: str) -> None:
    model = make("llama")
    with pytest.raises(CaptureError, match=message), capture_attention(model, positions):
        model(**inputs()[0])


def test_unfit_models() -> None:
    _, positions = inputs()
    with pytest.raises(CaptureError, match="no attention module"), capture_attention(nn.Linear(2, 2), positions):
        pass
    model = make("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(CaptureError, match="flex_attention"), capture_attention(model, positions):
        pass
    assert model.config._attn_implementation == "flex_attention"
    gpt2 = make("gpt2", attn_implementation="eager")
    gpt2.config.reorder_and_upcast_attn = True
    with pytest.raises(CaptureError, match="reorder_and_upcast"), capture_attention(gpt2, positions):
        pass
    assert gpt2.config._attn_implementation == "eager"


def test_two_models_of_one_configuration() -> None:
    config = config_of("llama")
    one, two = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert one.config is two.config
    given, positions = inputs("left")
    plain = two(**given).logits
    with capture_attention(one, positions) as first:
        assert torch.equal(two(**given).logits, plain)
        assert not first.rows
        with capture_attention(two, positions) as second:
            one(**given)
            two(**given)
        assert torch.equal(two(**given).logits, plain)
        assert (first.rows[1] - second.rows[1]).abs().max() > 0
    assert config._attn_implementation == "sdpa"


def test_a_copy_made_inside_works_afterwards() -> None:
    model = make("llama")
    given, positions = inputs("left")
    plain = model(**given).logits
    with capture_attention(model, positions):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(**given).logits, plain)


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_threads_do_not_disturb_one_another(name: str, shared: bool) -> None:
    models = [make(name)] * 2 if shared else [make(name), make(name)]
    given, positions = inputs("left")
    asked = [positions, positions - 1]
    want = [eager_rows(eager_twin(models[0]), given, at.clamp(min=-1)) for at in asked]
    barrier = threading.Barrier(2)
    errors: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                barrier.wait(20)
                with capture_attention(models[number], asked[number].clamp(min=-1)) as cap:
                    for _ in range(3):
                        models[number](**given)
                        worst = max((cap.rows[i] - want[number][i]).abs().max().item() for i in want[number])
                        if worst > 2e-6:
                            errors.append((number, worst))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert models[0].config._attn_implementation in ("sdpa", "eager")


def test_a_thread_without_capture_is_not_recorded() -> None:
    model = make("llama")
    given, positions = inputs()
    with capture_attention(model, positions) as cap:
        model(**given)
        kept = cap.rows[1].clone()
        other = threading.Thread(target=lambda: model(input_ids=given["input_ids"].flip(1)))
        other.start()
        other.join()
        assert torch.equal(cap.rows[1], kept)


def gradients(model: nn.Module, given: dict[str, Tensor], positions: Tensor) -> list[Tensor]:
    model.zero_grad()
    with capture_attention(model, positions) as cap:
        logits = model(**given).logits
        loss = logits.square().mean() + sum(rows.square().sum() for rows in cap.rows.values())
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss-sinks", "gptj", "bloom", "falcon"])
def test_non_reentrant_checkpointing_is_exact(name: str) -> None:
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for field in ("attention_dropout", "attn_pdrop"):
        if hasattr(model.config, field):
            setattr(model.config, field, 0.0)
    model.requires_grad_(True)
    given, positions = inputs("left")
    plain = gradients(model, given, positions)
    checkpoint(model, use_reentrant=False)
    again = gradients(model, given, positions)
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()  # sums of several gradients may run in another order


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_reentrant_checkpointing_is_refused(name: str) -> None:
    model = make(name).train()
    model.requires_grad_(True)
    given, positions = inputs()
    checkpoint(model, use_reentrant=True)
    with pytest.raises(CaptureError, match="use_reentrant"), capture_attention(model, positions):
        model(**given)
    with capture_attention(model, positions, detach=True) as cap:
        model(**given).logits.sum().backward()
    assert sorted(cap.rows) == [0, 1, 2]


def test_a_checkpointed_backward_after_the_context_fails_loudly() -> None:
    model = make("llama").train()
    model.requires_grad_(True)
    given, positions = inputs()
    checkpoint(model, use_reentrant=False)
    with capture_attention(model, positions) as cap:
        model(**given)
        loss = sum(rows.square().sum() for rows in cap.rows.values())
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_backward_twice_needs_retain_graph() -> None:
    model = make("llama")
    model.requires_grad_(True)
    given, positions = inputs()
    with capture_attention(model, positions) as cap:
        loss = model(**given).logits.square().mean()
        loss = loss + cap.rows[2].square().sum()
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


def test_sinks_and_weights_keep_their_gradient() -> None:
    """A parameter that attention uses besides q, k, v (GPT-OSS's sinks) gets the gradient it gets without capture."""
    model = make("gpt_oss-sinks")
    model.requires_grad_(True)
    given, positions = inputs("left")
    sinks = [p for n, p in model.named_parameters() if n.endswith("sinks")]
    plain = torch.autograd.grad(model(**given).logits.square().mean(), sinks)
    with capture_attention(model, positions):
        captured = torch.autograd.grad(model(**given).logits.square().mean(), sinks)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert all(grad.abs().max() > 0 for grad in plain)


def test_positions_may_not_change_before_a_recomputation() -> None:
    model = make("llama").train()
    model.requires_grad_(True)
    given, positions = inputs()
    checkpoint(model, use_reentrant=False)
    with capture_attention(model, positions) as cap:
        model(**given)
        loss = sum(rows.square().sum() for rows in cap.rows.values())
        cap.positions = positions.clone()
        with pytest.raises(CaptureError, match="between a forward pass and its backward"):
            loss.backward()
