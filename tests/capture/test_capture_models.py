"""Whole models: captured rows against eager attention, unchanged output, gradients, stored keys."""

from __future__ import annotations

import pytest
import torch
from capture_zoo import NO_POSITION_IDS, OUTSIDE, ZOO, eager_rows, eager_twin, injected, inputs, make
from torch import Tensor
from transformers import DynamicCache

from kedit.capture import capture_attention, row_kl
from kedit.capture.install import follows_interface
from kedit.models.compat import cache_argument

PADS = ("none", "right", "left")


@pytest.mark.parametrize("name", ZOO)
def test_rows_equal_eager_and_output_is_unchanged(name: str) -> None:
    model = make(name)
    twin = eager_twin(model)
    for pad in PADS:
        given, positions = inputs(pad)
        plain = model(**given).logits
        with capture_attention(model, positions) as cap:
            captured = model(**given).logits
        assert torch.equal(captured, plain), pad
        want = eager_rows(twin, given, positions)
        assert list(cap.rows) == list(want)
        for layer, rows in want.items():
            assert cap.rows[layer].dtype == torch.float32
            assert (cap.rows[layer] - rows).abs().max() <= 2e-6, (pad, layer)
            assert (cap.rows[layer][:, :, 3] == 0).all()


def kl_gradient(run: object, before: dict[int, Tensor], width: int) -> Tensor:
    torch.manual_seed(5)
    delta = (0.3 * torch.randn(width)).requires_grad_()
    after = run(delta)
    loss = sum(row_kl(after[layer].float(), before[layer].float(), exact=False).sum() for layer in before)
    return torch.autograd.grad(loss, delta)[0]


@pytest.mark.parametrize("name", ZOO)
def test_gradient_of_kl_on_a_delta_equals_eager(name: str) -> None:
    model = make(name)
    twin = eager_twin(model)
    given, positions = inputs("left")
    width = model.config.get_text_config().hidden_size
    token, layer = 7, 0

    def captured(delta: Tensor) -> dict[int, Tensor]:
        with injected(model, layer, delta, token), capture_attention(model, positions, layers=range(1, 99)) as cap:
            model(**given)
        return cap.rows

    def eager(delta: Tensor) -> dict[int, Tensor]:
        with injected(twin, layer, delta, token):
            rows = eager_rows(twin, given, positions)
        return {i: rows[i] for i in rows if i > layer}

    before = {i: rows.detach() for i, rows in captured(torch.zeros(width)).items()}
    found, want = kl_gradient(captured, before, width), kl_gradient(eager, before, width)
    assert want.abs().max() > 0
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ZOO)
def test_suffix_against_stored_keys(name: str) -> None:
    """Queries shorter than keys: prefix padded on the left, suffix on the right."""
    model = make(name)
    given, _ = inputs("left")
    ids, mask = given["input_ids"], given["attention_mask"].clone()
    mask[2, -2:] = 0
    split = 5
    where = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if ZOO[name][0] not in NO_POSITION_IDS else {}
    last = (mask * torch.arange(12)).amax(1)
    full_positions = torch.stack([last, last - 1], 1)
    stored = cache_argument(model, DynamicCache())
    with torch.no_grad(), capture_attention(model, full_positions) as cap:
        model(input_ids=ids, attention_mask=mask, use_cache=False, **where)
        full = cap.rows
        first = {key: value[:, :split] for key, value in where.items()}
        cap.positions = torch.full((3, 2), -1)
        model(input_ids=ids[:, :split], attention_mask=mask[:, :split], **stored, use_cache=True, **first)
        rest = {key: value[:, split:] for key, value in where.items()}
        cap.positions = full_positions - split
        model(input_ids=ids[:, split:], attention_mask=mask, **stored, use_cache=True, **rest)
    for layer in cap.layers:
        assert (full[layer] - cap.rows[layer]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2-softcap", "gptj", "gpt_neo", "bloom", "mpt", "falcon"])
def test_float64_rows_are_float64(name: str) -> None:
    """Rows of a float64 model are a softmax to float64 rounding, though transformers casts its own to float32."""
    model = make(name, torch.float64)
    given, positions = inputs("none")
    with capture_attention(model, positions[:, :3]) as cap:
        model(**given)
    for rows in cap.rows.values():
        assert rows.dtype == torch.float64
        assert (rows.sum(-1) - 1).abs().max() <= 1e-14


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_eager(name: str, dtype: torch.dtype) -> None:
    given, positions = inputs("left")
    exact = eager_rows(eager_twin(make(name)), given, positions)
    model = make(name, dtype)
    halves = eager_rows(eager_twin(model), given, positions)
    with capture_attention(model, positions) as cap:
        assert torch.equal(model(**given).logits, make(name, dtype)(**given).logits)
    ours = max((cap.rows[i] - exact[i]).abs().max() for i in exact)
    theirs = max((halves[i].float() - exact[i]).abs().max() for i in exact)
    assert ours <= 1.5 * theirs + 1e-3


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_generation_runs_as_usual(name: str) -> None:
    model = make(name)
    given, positions = inputs("left")
    plain = model.generate(**given, max_new_tokens=3, do_sample=False)
    with capture_attention(model, torch.zeros(3, 1, dtype=torch.int64)) as cap:
        captured = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(plain, captured)
    assert cap.rows[2].shape == (3, 4, 1, plain.shape[1] - 1)


@pytest.mark.parametrize("name", ["gptj", "codegen", "gpt_neo"])
@pytest.mark.parametrize("pad", PADS)
def test_sdpa_in_place_of_eager_attention(name: str, pad: str) -> None:
    """By choice, types that have no fast attention get one: equal up to rounding, gradients too."""
    model = make(name)
    given, positions = inputs(pad)
    live = given["attention_mask"].bool()
    found = []
    for sdpa in (False, True):
        embeddings = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
        with capture_attention(model, positions, sdpa=sdpa) as cap:
            logits = model(inputs_embeds=embeddings, attention_mask=given["attention_mask"]).logits[live]
        loss = logits.square().mean() + sum(rows.square().sum() for rows in cap.rows.values())
        found.append((logits, torch.autograd.grad(loss, embeddings)[0], *cap.rows.values()))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 5e-6 * a.abs().max()


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_types_have_nothing_left_on_them(name: str) -> None:
    model = make(name)
    homes = {type(module).__module__ for module in model.modules() if "Attention" in type(module).__name__}
    if all(map(follows_interface, homes)):
        pytest.skip(f"This version of transformers calls the attention of {name} by its interface.")
    before = {key: set(vars(module)) for key, module in model.named_modules()}
    with capture_attention(model, inputs()[1]):
        assert {key: set(vars(module)) for key, module in model.named_modules()} != before
    assert {key: set(vars(module)) for key, module in model.named_modules()} == before
