"""Divergences of rows: values against their definitions, gradients against autograd and the closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit.capture import row_divergence, row_kl
from kedit.capture.divergence import over_attending
from kedit.errors import CaptureError

EPS = 1e-8


def rows(seed: int, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(2, 3, 4, 9, dtype=dtype, generator=generator)).softmax(-1)


def defined(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """The definitions, written so that autograd can differentiate them."""
    if kind == "exact":
        return (p * (p / q).log()).sum(-1)
    if kind == "l2":
        return (p - q).square().sum(-1)
    p, q = p + EPS, q + EPS
    if kind == "kl":
        return (p * (p / q).log()).sum(-1)
    m = (p + q) / 2
    return 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)


def options(kind: str) -> dict[str, object]:
    return {"divergence": "kl", "exact": True} if kind == "exact" else {"divergence": kind}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["kl", "exact", "js", "l2"])
def test_value_and_gradient_equal_the_definition(kind: str, masked: bool) -> None:
    p = rows(0)
    column = torch.tensor([2, 5]) if masked else None
    found, want = rows(1).requires_grad_(), rows(1).requires_grad_()
    ours = row_divergence(found, p, **options(kind), subject_column=column)
    theirs = defined(kind, p, want)
    if masked:
        top = torch.stack([p[b, ..., int(c)] for b, c in enumerate(column)]).amax(1, keepdim=True)
        mask = torch.stack([want[b, ..., int(c)] for b, c in enumerate(column)]) > top
        assert 0 < mask.sum() < mask.numel()
        theirs = theirs * mask
    assert ours.shape == (2, 3, 4)
    assert (ours - theirs).abs().max() <= 1e-14
    weights = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (a,), (b,) = torch.autograd.grad((ours * weights).sum(), found), torch.autograd.grad((theirs * weights).sum(), want)
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("gap", [10.0, 40.0, 80.0])
def test_exact_gradient_on_the_scores_is_the_closed_form(gap: float) -> None:
    """g · (q Σp - p), also where the published form has lost it."""
    scores = torch.zeros(1, 1, 1, 6)
    scores[..., 0] = gap
    scores.requires_grad_()
    p = torch.tensor([0.05, 0.5, 0.2, 0.1, 0.1, 0.05]).view(1, 1, 1, 6)
    q = scores.softmax(-1)
    (exact,) = torch.autograd.grad(row_kl(q, p, exact=True).sum(), scores, retain_graph=True)
    assert (exact - (q - p)).abs().max() <= 1e-6
    (published,) = torch.autograd.grad(row_kl(q, p, exact=False).sum(), scores)
    if gap >= 40:
        assert published.abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["kl", "exact", "js", "l2"])
def test_equal_rows_and_dead_rows_give_zero(kind: str) -> None:
    p = rows(3, dtype=torch.float32)
    p[0, :, 1] = 0
    q = p.clone().requires_grad_()
    value = row_divergence(q, p, **options(kind))
    assert value.abs().max() <= 1e-6
    assert torch.isfinite(torch.autograd.grad(value.sum(), q)[0]).all()


def test_mask_compares_with_the_highest_original_head() -> None:
    p = torch.tensor([[0.2, 0.8], [0.4, 0.6]]).view(1, 2, 2)
    q = torch.tensor([[0.39, 0.61], [0.41, 0.59]]).view(1, 2, 2)
    assert over_attending(q, p, torch.tensor([0])).tolist() == [[False, True]]


def test_unfit_arguments() -> None:
    p = rows(0)
    with pytest.raises(CaptureError, match="one shape"):
        row_divergence(p, p[:1])
    with pytest.raises(CaptureError, match="no divergence"):
        row_divergence(p, p, divergence="tv")
    with pytest.raises(CaptureError, match="exact"):
        row_divergence(p, p, divergence="js", exact=True)
    with pytest.raises(CaptureError, match="subject_column"):
        row_kl(p, p, subject_column=torch.tensor([0]))
