"""Substituted attention rows, in every model type that can be captured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from capture_zoo import ZOO, inputs, make
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit.capture import capture_attention, substitute_attention
from kedit.capture.modules import attention_modules
from kedit.errors import CaptureError


@contextmanager
def projections(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """Collects what the linear maps of one attention module return; the last one is the output projection."""
    found: list[Tensor] = []
    maps = [m for m in attention_modules(model)[layer].modules() if isinstance(m, nn.Linear | Conv1D)]
    handles = [m.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in maps]
    yield found
    for handle in handles:
        handle.remove()


def attended(
    model: nn.Module, given: Mapping[str, Tensor], positions: Tensor, rows: Mapping[int, Tensor], **options: object
) -> Tensor:
    """The output of the first block's attention [B, T, H] under a substitution."""
    with projections(model, 0) as found, substitute_attention(model, positions, rows, **options):
        model(**given)
    return found[-1]


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_the_models_own_rows_change_nothing_and_others_are_attended_to(name: str) -> None:
    model = make(name)
    given, positions = inputs("right")
    with capture_attention(model, positions, detach=True) as capture:
        plain = model(**given).logits
    own = capture.rows
    with substitute_attention(model, positions, own), capture_attention(model, positions, detach=True) as again:
        same = model(**given).logits
    torch.testing.assert_close(same, plain, atol=2e-5 * float(plain.abs().max()), rtol=0)
    assert all(torch.allclose(again.rows[layer], own[layer], atol=2e-5) for layer in own)

    # Who attends to the first token alone gets what the first token, which sees nothing else, gets itself.
    first = torch.zeros_like(own[0])
    first[..., 0] = 1.0
    before = attended(model, given, positions[:, 3:], {0: own[0][:, :, 3:]})  # a dead row: nothing is replaced
    after = attended(model, given, positions, {0: first})
    live = positions[:, :2]
    prompt = torch.arange(len(live))[:, None]
    if "sinks" not in name:  # there a part of every row goes to the sink
        torch.testing.assert_close(after[prompt, live], before[:, :1].expand(-1, 2, -1), atol=2e-5, rtol=1e-5)
    assert (after[prompt, live] - before[prompt, live]).abs().max() > 1e-3
    others = torch.ones(before.shape[:2], dtype=torch.bool)
    others[prompt, live] = False
    assert torch.equal(after[others], before[others])

    # Heads are replaced one by one, and their changes add up.
    parts = []
    for head in range(first.shape[1]):
        chosen = torch.zeros(first.shape[:2], dtype=torch.bool)
        chosen[:, head] = True
        parts.append(attended(model, given, positions, {0: first}, where={0: chosen}) - before)
    torch.testing.assert_close(sum(parts), after - before, atol=1e-4, rtol=1e-4)
    assert sum(float(part.abs().max() > 1e-4) for part in parts) > 1


@torch.no_grad()
def test_only_the_chosen_prompts_are_changed() -> None:
    model = make("llama")
    given, positions = inputs()
    with capture_attention(model, positions, detach=True) as capture:
        plain = model(**given).logits
    rows = {layer: found.roll(1, -1) for layer, found in capture.rows.items()}
    where = {layer: torch.tensor([[True], [False], [True]]).expand(-1, found.shape[1]) for layer, found in rows.items()}
    with substitute_attention(model, positions, rows, where=where):
        changed = model(**given).logits
    difference = (changed - plain).abs().amax((1, 2))
    assert difference[0] > 1e-3
    assert difference[1] < 1e-5
    assert difference[2] > 1e-3


def test_shapes_that_do_not_fit_are_refused_and_nothing_stays_open() -> None:
    model = make("gpt2")
    given, positions = inputs()
    rows = torch.rand(3, 4, 4, 12)
    with (
        pytest.raises(CaptureError, match=r"Blocks \[7\] have no attention"),
        substitute_attention(model, positions, {7: rows}),
    ):
        pass
    with (
        pytest.raises(CaptureError, match="the shape of positions"),
        substitute_attention(model, positions, {0: rows[:2]}),
    ):
        pass
    with (
        pytest.raises(CaptureError, match="must be integers"),
        substitute_attention(model, positions.float(), {0: rows}),
    ):
        pass
    with substitute_attention(model, positions, {0: rows}):
        with (
            pytest.raises(CaptureError, match="already being substituted"),
            substitute_attention(model, positions, {0: rows}),
        ):
            pass
        with pytest.raises(CaptureError, match="forward pass has 2"):
            model(input_ids=given["input_ids"][:2])
    plain = model(**given).logits
    with substitute_attention(model, positions, {}):
        assert torch.equal(model(**given).logits, plain)
    assert model.config._attn_implementation == "sdpa"
