"""Figures: numbers that can be read."""

import itertools

import numpy as np
import pytest

from kedit.analysis.results.drift import DriftProbe, DriftResult
from kedit.evaluation import Kind
from kedit.evaluation.statistics import Estimate
from kedit.report.figures import attention_maps, correlation_plot
from kedit.report.html import _moved

pytest.importorskip("matplotlib")


def result(drifts):
    """A result whose probes drift so far."""
    probes = []
    for number, drift in enumerate(drifts):
        cell = np.full((1, 1), float(drift))
        weights = np.full((1, 1), 0.1)
        probe = DriftProbe(
            case=f"c{number}",
            kind=Kind.NEIGHBOUR,
            prompt="The river",
            right="a",
            wrong=None,
            tokens=("The", "river"),
            column=0,
            right_before=0.9,
            right_after=0.9 - 0.01 * (number % 7),
            wrong_before=None,
            wrong_after=None,
            kl=cell,
            weight_before=weights,
            weight_after=weights,
            over=cell > 0,
            map_before=np.ones((1, 2)),
            map_after=np.ones((1, 2)),
        )
        probes.append(probe)
    # The correlations in the title take a while to draw; which they are does not matter here.
    known = {"neighbour": {"drift": dict.fromkeys(("pearson", "spearman"), Estimate(0.5, -0.1, 0.9, 9, 9))}}
    return DriftResult("rome", tuple(probes), (0,), _correlations=known)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0123, 0.0151),
        (0.11, 0.95),
        (2.0, 2.02),
        (0.8, 1.3),
        (3.1, 17.0),
        (0.5, 60.0),
        (1e-3, 40.0),
        (1e-9, 30.0),
        (1e-14, 1e-12),
    ],
)
def test_labels_of_a_logarithmic_axis_stand_apart(low, high):
    figure = correlation_plot(result(np.geomspace(low, high, 9)))
    (axis,) = figure.axes
    figure.canvas.draw()
    assert axis.get_xscale() == "log"
    left, right = axis.get_xlim()
    shown = [text for text in axis.get_xticklabels(which="both") if text.get_text()]
    shown = [text for text in shown if left <= text.get_position()[0] <= right]
    assert 2 <= len(shown) <= 7
    assert len({text.get_text() for text in shown}) == len(shown)
    boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.x0)
    gaps = [after.x0 - before.x1 for before, after in itertools.pairwise(boxes)]
    assert min(gaps) > 4


def test_the_correlation_plot_says_what_it_shows():
    (axis,) = correlation_plot(result(np.geomspace(0.1, 10, 9))).axes
    assert axis.get_title(loc="left").startswith("rome: 9 probes of 9 edits\n")
    assert "logarithmic" in axis.get_xlabel()
    (axis,) = correlation_plot(result([0.0, 1.0, 2.0])).axes
    assert "logarithmic" not in axis.get_xlabel()


def test_attention_of_a_deep_model_fits_a_page_and_shows_differences():
    probe = result([1.0]).probes[0]
    before = np.full((30, 5), 0.05)
    before[:, 0] = 0.9  # the first token
    after = before.copy()
    after[3, 1] += 0.2
    figure = attention_maps(probe, {"before": before, "rome": after, "rome with sadr": before})
    assert figure.get_size_inches()[1] < 11
    images = [image for axis in figure.axes for image in axis.images]
    assert images[0].get_clim()[1] == pytest.approx(0.05)  # not the first token's
    assert [tuple(np.round(image.get_clim(), 6)) for image in images[1:3]] == [(-0.2, 0.2)] * 2
    assert float(images[1].get_array()[3, 1]) == pytest.approx(0.2)
    assert [axis.get_title(loc="left") for axis in figure.axes[:3]] == [
        "before",
        "rome: change",
        "rome with sadr: change",
    ]
    assert all(len(axis.lines) == 2 for axis in figure.axes[:3])  # beside the subject


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(0.6, 0.46, "falls from 60% to 46%"), (0.46, 0.6, "rises from 46% to 60%"), (0.5, 0.5001, "stays at 50%")],
)
def test_words_of_a_change(before, after, words):
    assert _moved(before, after) == words
