"""ROME's closed form as algebra, in float64: identities, not examples."""

import pytest
import torch

from kedit.editors.closed_forms import rank_one
from kedit.errors import SingularMomentError
from kedit.utils.linalg import cholesky, whiten

I, O = 12, 7  # noqa: E741 - the axis letters of docs/notation.md


def spd(seed=0, width=I):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(5 * width, width, generator=generator, dtype=torch.float64)
    return keys.T @ keys / len(keys)


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cholesky_and_whiten_solve_with_the_moment():
    moment, keys = spd(), rand(4, I)
    factor = cholesky(moment)
    torch.testing.assert_close(factor @ factor.T, moment, atol=1e-12, rtol=1e-12)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(whiten(factor, keys) @ moment, keys, atol=1e-11, rtol=1e-11)
    assert whiten(factor, keys.float()).dtype == torch.float64


def test_rank_one_writes_the_residual_at_the_key():
    key, residual, weight = rand(I), rand(O, seed=2), rand(O, I, seed=3)
    whitened = whiten(cholesky(spd()), key[None])[0]
    delta = rank_one(whitened, key, residual)
    torch.testing.assert_close((weight + delta.dense) @ key, weight @ key + residual, atol=1e-12, rtol=1e-12)
    assert delta.rank == 1
    assert delta.shape == (O, I)
    torch.testing.assert_close(delta.right.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_rank_one_does_not_depend_on_the_length_of_the_whitened_key():
    key, residual = rand(I), rand(O, seed=2)
    whitened = whiten(cholesky(spd()), key[None])[0]
    one = rank_one(whitened, key, residual).dense
    for scale in (1e-8, -3.0, 1e8):
        torch.testing.assert_close(rank_one(scale * whitened, key, residual).dense, one, atol=1e-12, rtol=1e-10)


def test_rank_one_leaves_keys_alone_that_the_moment_calls_unrelated():
    """Δ x = 0 for every x with xᵀ C⁻¹ k = 0."""
    moment, key, other = spd(), rand(I), rand(I, seed=5)
    whitened = whiten(cholesky(moment), key[None])[0]
    unrelated = other - whitened * (other @ whitened) / (whitened @ whitened)
    delta = rank_one(whitened, key, rand(O, seed=2))
    torch.testing.assert_close(delta.dense @ unrelated, torch.zeros(O, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rank_one_is_the_smallest_update_in_the_norm_of_the_moment():
    """Among all Δ with Δ k = r, ROME's has the least tr(Δ C Δᵀ) = E‖Δ k'‖²."""
    moment, key, residual = spd(), rand(I), rand(O, seed=2)
    best = rank_one(whiten(cholesky(moment), key[None])[0], key, residual).dense
    cost = torch.trace(best @ moment @ best.T)
    for seed in range(20):
        change = rand(O, I, seed=seed)
        change -= torch.outer(change @ key, key) / (key @ key)
        other = best + 0.1 * change
        torch.testing.assert_close(other @ key, residual, atol=1e-10, rtol=1e-10)
        assert torch.trace(other @ moment @ other.T) > cost


def singular():
    rank_deficient = rand(I, 3)
    almost = spd()
    almost[:, 0] = almost[0, :] = almost[:, 1]
    almost[0, 0] = almost[1, 1]
    negative = spd() - 100 * torch.eye(I, dtype=torch.float64)
    broken = spd()
    broken[2, 3] = broken[3, 2] = torch.nan
    infinite = spd()
    infinite[1, 1] = torch.inf
    return {
        "zero": torch.zeros(I, I),
        "rank 3": rank_deficient @ rank_deficient.T,
        "equal columns": almost,
        "negative": negative,
        "nan": broken,
        "inf": infinite,
        "float32 rank 3": (rank_deficient @ rank_deficient.T).float(),
    }


@pytest.mark.parametrize("kind", singular())
def test_singular_moments_are_refused(kind):
    with pytest.raises(SingularMomentError, match="not positive definite.*more text"):
        cholesky(singular()[kind])


def test_layer_is_named():
    with pytest.raises(SingularMomentError, match="second moment of layer 17 is"):
        cholesky(torch.zeros(3, 3), 17)


def test_badly_scaled_but_regular_moments_pass():
    scale = torch.logspace(-3, 3, I, dtype=torch.float64)
    moment = scale[:, None] * spd() * scale
    factor = cholesky(moment)
    key = rand(I)
    torch.testing.assert_close(moment @ whiten(factor, key[None])[0], key, atol=1e-6, rtol=1e-6)
    cholesky(spd() * 1e-12)
    cholesky(spd() * 1e12)


@pytest.mark.parametrize("kind", ["orthogonal", "zero key", "zero whitened", "nan"])
def test_keys_without_overlap_are_refused(kind):
    key, whitened = rand(I), rand(I, seed=4)
    match kind:
        case "orthogonal":
            whitened = whitened - key * (key @ whitened) / (key @ key)
        case "zero key":
            key = torch.zeros(I)
        case "zero whitened":
            whitened = torch.zeros(I)
        case "nan":
            key = key * torch.nan
    with pytest.raises(SingularMomentError, match="hardly overlaps"):
        rank_one(whitened, key, rand(O))
