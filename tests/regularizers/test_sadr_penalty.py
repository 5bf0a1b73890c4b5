"""SADR's penalty against a loop over contexts, blocks, heads and columns, in float64."""

import math

import pytest
import torch

import kedit
from kedit.errors import ConfigError
from kedit.models import Site
from kedit.regularizers.base import Activations, ForwardRecord
from kedit.regularizers.sadr import SADR

EDITS, CONTEXTS, HEADS, KEYS = 2, 3, 4, 6
BLOCKS = (3, 4, 5)
EMPTY = torch.zeros(0, dtype=torch.int64)


def attention(seed, dtype=torch.float64):
    """Rows of a softmax whose last column is padding, [P, A, Tk] by block."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for block in BLOCKS:
        scores = torch.randn(EDITS * CONTEXTS, HEADS, KEYS, generator=generator, dtype=torch.float64) * 2
        scores[..., -1] = -torch.inf
        found[block] = scores.softmax(-1).to(dtype)
    return found


def captured(rows, step=1):
    edit = torch.arange(EDITS).repeat_interleave(CONTEXTS)
    kept = {"edit": edit, "context": torch.arange(CONTEXTS).repeat(EDITS)}
    rewrite = Activations(**kept, subject=torch.tensor([0, 1, 2, 3, 4, 2]), attention=rows)
    extra = Activations(edit=EMPTY, context=EMPTY, subject=EMPTY)
    delta = torch.zeros(EDITS, 1, 5)
    return ForwardRecord(step=step, delta=delta, initial=delta, rewrite=rewrite, extra=extra)


def divergence(p, q, kind, eps=1e-8):
    if kind == "l2":
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    if kind == "exact":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    p, q = [a + eps for a in p], [b + eps for b in q]
    if kind == "kl":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (
        sum(a * math.log(a / m) for a, m in zip(p, middle, strict=True))
        + sum(b * math.log(b / m) for b, m in zip(q, middle, strict=True))
    ) / 2


def by_hand(now, before, gamma, kind="kl", masked=True):
    """γ · mean_j Σ_l Σ_h 1[q(s) > max_h' p_h'(s)] · D(p, q) by loops."""
    totals, passed = [0.0] * EDITS, 0
    for prompt in range(EDITS * CONTEXTS):
        column = int(now.rewrite.subject[prompt])
        for block in BLOCKS:
            p, q = before.rewrite.attention[block][prompt].tolist(), now.rewrite.attention[block][prompt].tolist()
            highest = max(row[column] for row in p)
            for head in range(HEADS):
                if not masked or q[head][column] > highest:
                    passed += 1
                    totals[prompt // CONTEXTS] += divergence(p[head], q[head], kind) / CONTEXTS
    return torch.tensor([gamma * total for total in totals], dtype=torch.float64), passed


@pytest.mark.parametrize("select", ["max", "all"])
@pytest.mark.parametrize("kind", ["kl", "js", "l2", "exact"])
def test_same_as_the_loop(select, kind):
    now, before = captured(attention(1)), captured(attention(2))
    chosen = SADR(gamma=0.3, select=select, divergence="kl" if kind == "exact" else kind, exact=kind == "exact")
    expected, passed = by_hand(now, before, 0.3, kind, select == "max")
    total = EDITS * CONTEXTS * len(BLOCKS) * HEADS
    assert passed == total if select == "all" else 5 < passed < total - 5, "the mask lets some pass and stops some"
    torch.testing.assert_close(chosen.penalty(now, before), expected, atol=1e-13, rtol=1e-12)


def test_mask_compares_with_the_most_attending_head_of_the_same_block():
    """A head may attend more than it did, as long as some head of its block did so before."""
    before = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    now = torch.tensor([[0.6, 0.4], [0.65, 0.35]], dtype=torch.float64)  # column 0: below 0.7 in both heads
    zero = torch.zeros(1, dtype=torch.int64)
    delta = torch.zeros(1, 1, 2)

    def see(rows, column):
        found = Activations(edit=zero, context=zero, subject=torch.tensor([column]), attention={4: rows[None]})
        return ForwardRecord(step=1, delta=delta, initial=delta, rewrite=found, extra=found)

    sadr = SADR(gamma=1.0)
    assert sadr.penalty(see(now, 0), see(before, 0)).item() == 0
    above = torch.tensor([[0.75, 0.25], [0.65, 0.35]], dtype=torch.float64)
    expected = divergence([0.7, 0.3], [0.75, 0.25], "kl")
    assert sadr.penalty(see(above, 0), see(before, 0)).item() == pytest.approx(expected, rel=1e-12)
    equal = torch.tensor([[0.7, 0.3], [0.65, 0.35]], dtype=torch.float64)
    assert sadr.penalty(see(equal, 0), see(before, 0)).item() == 0, "strictly above"


def test_zero_at_the_start_with_any_divergence():
    rows = captured(attention(1))
    for options in ({}, {"divergence": "js"}, {"divergence": "l2"}, {"exact": True}):
        penalty = SADR(gamma=1.0, select="all", **options).penalty(rows, rows)
        torch.testing.assert_close(penalty, torch.zeros(EDITS, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("options", [{}, {"divergence": "js"}, {"divergence": "l2"}, {"exact": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_where_rows_are_zero(options, dtype):
    """Padding columns are 0 in both rows; a saturated softmax is 0 in one of them."""
    scores = torch.zeros(EDITS * CONTEXTS, HEADS, KEYS, dtype=dtype)
    scores[..., 0] = 400.0  # exp(-400) underflows in both dtypes' rows (float64: 1e-174, float32: 0)
    scores[..., -1] = -torch.inf
    scores.requires_grad_()
    now = captured({block: scores.softmax(-1) for block in BLOCKS})
    before = captured(attention(2, dtype))
    penalty = SADR(gamma=1.0, select="all", **options).penalty(now, before)
    assert torch.isfinite(penalty).all()
    assert (penalty > 0).all()
    penalty.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_exact_gradient_on_the_scores_is_the_closed_form():
    """∂/∂scores Σ p log(p / q) = q Σp − p, also where the published form has lost it (q < ε)."""
    before = captured(attention(2))
    scores = torch.randn(EDITS * CONTEXTS, HEADS, KEYS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scores = scores * 20
    scores[..., -1] = -torch.inf
    gradients = {}
    for exact in (True, False):
        leaf = scores.clone().requires_grad_()
        rows = leaf.softmax(-1)
        SADR(gamma=1.0, select="all", exact=exact).penalty(captured({4: rows}), before).sum().backward()
        gradients[exact] = leaf.grad * CONTEXTS
    q, p = scores.softmax(-1), before.rewrite.attention[4]
    assert (q[..., :-1] < 1e-8).any()
    torch.testing.assert_close(gradients[True], q * p.sum(-1, keepdim=True) - p, atol=1e-12, rtol=1e-9)
    lost = (q < 1e-12) & (p > 1e-3)
    assert lost.any()
    assert (gradients[False][lost].abs() < 1e-3 * gradients[True][lost].abs()).all()


def test_gradient_flows_to_now_only():
    now, before = attention(1), attention(2)
    for rows in (now, before):
        for block in BLOCKS:
            rows[block].requires_grad_()
    frozen = captured(before).detach()
    assert not any(rows.requires_grad for rows in frozen.rewrite.attention.values())
    SADR(gamma=1.0).penalty(captured(now), frozen).sum().backward()
    assert any(rows.grad.abs().sum() > 0 for rows in now.values())


def test_gamma_scales_and_zero_switches_off():
    now, before = captured(attention(1)), captured(attention(2))
    one = SADR(gamma=1.0).penalty(now, before)
    torch.testing.assert_close(SADR(gamma=0.25).penalty(now, before), one / 4)
    assert SADR(gamma=0).penalty(now, before).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("layers", "site", "expected"),
    [
        (None, Site(2, "mlp"), {3, 4, 5}),
        (None, Site(2, "block"), {3, 4, 5}),
        (None, Site(2, "attention"), {2, 3, 4, 5}),
        (None, Site(5, "mlp"), set()),
        ((4, 4), Site(2, "mlp"), {4}),
        ((0, 3), Site(2, "mlp"), {3}),
        ((0, 99), Site(2, "mlp"), {3, 4, 5}),
    ],
)
def test_blocks_asked_for(layers, site, expected):
    wanted = SADR(gamma=1.0, layers=layers).needs(site).attention
    assert {block for block in range(6) if block in wanted} == expected


def test_needs_nothing_but_attention():
    needs = SADR(gamma=1.0).needs(Site(2))
    assert not needs.hidden
    assert not needs.logits
    assert not needs.prompts


def test_layers_where_nothing_can_drift_are_refused():
    with pytest.raises(ConfigError, match=r"\(0, 2\) end below the edit: attention changes from block 3"):
        SADR(gamma=1.0, layers=(0, 2)).needs(Site(2))
    nothing = captured({})
    with pytest.raises(ConfigError, match="above the model's last block"):
        SADR(gamma=1.0, layers=(50, 60)).penalty(nothing, nothing)


def test_without_gamma_the_optimisation_chooses_the_factor():
    assert SADR().adaptive
    assert SADR(gamma="auto").adaptive
    assert not SADR(gamma=0.5).adaptive
    assert SADR().factor == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"gamma": -1e-9},
        {"gamma": float("nan")},
        {"gamma": float("inf")},
        {"gamma": "1"},
        {"gamma": True},
        {"select": "hinge"},
        {"divergence": "KL"},
        {"divergence": "js", "exact": True},
        {"eps": 0.0},
        {"eps": -1.0},
        {"layers": (3, 2)},
        {"layers": (-1, 2)},
        {"layers": (1,)},
        {"layers": (1, 2, 3)},
        {"layers": 3},
        {"layers": ("1", "2")},
    ],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ConfigError, match=f"SADR.({'|'.join(fields)})"):
        SADR(**fields)


def test_lists_from_json_are_fine():
    assert SADR(layers=[1, 2]) == SADR(layers=(1, 2))
    assert kedit.SADR is SADR
