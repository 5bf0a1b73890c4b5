"""Properties that the closed forms satisfy for all inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kedit.editors.closed_forms import Past, null_space, null_space_update, projected, rank_one, ridge
from kedit.errors import SingularMomentError
from kedit.utils.linalg import cholesky, whiten

WIDTH, OUT = 12, 7


def problem(seed: int, edits: int, width: int = WIDTH):
    """Keys [E, I], residuals [E, O], and a second moment [I, I]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text = draw(5 * width, width) * torch.linspace(0.05, 2, width, dtype=torch.float64)
    return draw(edits, width), draw(edits, OUT), text.T @ text / len(text)


def ridge_of(keys, residuals, moment, weight):
    return ridge(keys, residuals, moment, weight, lambda: cholesky(moment)).dense


@given(seed=st.integers(0, 10**6), edits=st.integers(1, 30), weight=st.floats(1e-3, 1e4))
@settings(max_examples=40, deadline=None)
def test_ridge_is_the_published_system_on_both_sides_of_woodbury(seed, edits, weight):
    keys, residuals, moment = problem(seed, edits)
    system = weight * moment + keys.T @ keys
    expected = residuals.T @ torch.linalg.solve(system, keys.T).T
    torch.testing.assert_close(ridge_of(keys, residuals, moment, weight), expected, rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_one_edit_without_ridge_is_romes_form(seed):
    keys, residuals, moment = problem(seed, 1)
    rome = rank_one(whiten(cholesky(moment), keys)[0], keys[0], residuals[0]).dense
    torch.testing.assert_close(ridge_of(keys, residuals, moment, 0.0), rome, rtol=1e-9, atol=1e-10)


@given(seed=st.integers(0, 10**6), edits=st.integers(1, WIDTH - 1))
@settings(max_examples=20, deadline=None)
def test_without_ridge_every_residual_is_written_exactly(seed, edits):
    keys, residuals, moment = problem(seed, edits)
    written = keys @ ridge_of(keys, residuals, moment, 0.0).T
    torch.testing.assert_close(written, residuals, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10**6), edits=st.integers(2, 20))
@settings(max_examples=20, deadline=None)
def test_the_order_of_edits_is_irrelevant(seed, edits):
    keys, residuals, moment = problem(seed, edits)
    order = torch.randperm(edits, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        ridge_of(keys, residuals, moment, 3.0),
        ridge_of(keys[order], residuals[order], moment, 3.0),
        rtol=1e-9,
        atol=1e-10,
    )


def test_two_edits_of_one_key_need_a_ridge():
    keys, residuals, moment = problem(0, 2)
    keys[1] = keys[0]
    with pytest.raises(SingularMomentError, match="same key"):
        ridge_of(keys, residuals, moment, 0.0)
    assert torch.isfinite(ridge_of(keys, residuals, moment, 1.0)).all()


@given(seed=st.integers(0, 10**6), edits=st.integers(1, 8), past=st.integers(0, 20), weight=st.floats(1e-2, 1e2))
@settings(max_examples=40, deadline=None)
def test_alphaedit_is_the_published_system(seed, edits, past, weight):
    keys, residuals, moment = problem(seed, edits)
    earlier, _, _ = problem(seed + 1, past)
    used, _ = null_space(moment, 0.5)
    projection = torch.eye(WIDTH, dtype=torch.float64) - used @ used.T
    system = projection @ (keys.T @ keys + earlier.T @ earlier) + weight * torch.eye(WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(system, projection @ keys.T @ residuals).T
    gone = Past()
    for part in earlier.split(7):
        gone = gone.plus(projected(used, part))
    assert (gone.gram is None) == (past < WIDTH)
    found = null_space_update(projected(used, keys), residuals, weight, gone).dense
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@given(seed=st.integers(0, 10**6), edits=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_alphaedit_leaves_the_preserved_subspace_alone(seed, edits):
    keys, residuals, moment = problem(seed, edits)
    used, _ = null_space(moment, 0.5)
    assert 0 < used.shape[1] < WIDTH
    update = null_space_update(projected(used, keys), residuals, 1.0).dense
    assert float(update.norm()) > 0
    assert float((update @ used).abs().max()) < 1e-12


def test_the_absolute_threshold_depends_on_the_scale_and_the_others_do_not():
    _, _, moment = problem(3, 1)
    for rule in ("fraction", "mean"):
        assert null_space(moment, 0.5, rule)[0].shape == null_space(1_000 * moment, 0.5, rule)[0].shape
    assert null_space(moment, 0.02, "absolute")[0].shape != null_space(moment / 1_000, 0.02, "absolute")[0].shape


def test_an_enormous_key_takes_no_free_direction_away():
    _, _, moment = problem(3, 1)
    sink = torch.zeros(WIDTH, dtype=torch.float64)
    sink[0] = 1e6
    loud = moment + torch.outer(sink, sink)
    assert null_space(loud, 0.5)[0].shape == null_space(moment, 0.5)[0].shape
    assert null_space(loud, 0.5, "mean")[0].shape[1] == 1  # all but the sink's direction would be free


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_an_ordinary_key_gets_half_where_alphaedits_weight_is_relative(seed, fraction):
    _, _, moment = problem(seed, 1)
    used, energy = null_space(moment, fraction)
    projection = torch.eye(WIDTH, dtype=torch.float64) - used @ used.T
    assert energy == pytest.approx(float((projection @ moment).trace()), rel=1e-9, abs=1e-12)


def test_projection_is_idempotent():
    keys, _, moment = problem(1, 5)
    used, _ = null_space(moment, 0.5)
    once = projected(used, keys)
    torch.testing.assert_close(projected(used, once), once)
    torch.testing.assert_close(once @ used, torch.zeros(5, used.shape[1], dtype=torch.float64))
