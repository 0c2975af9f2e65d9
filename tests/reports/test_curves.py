"""Curves: against every axis, smoothed within a stage, thinned, labelled and magnified where there is room."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from est_cli.reports.comparison import Comparison
from est_cli.reports.curves import Axis, Curve, run_with_shared_stages
from est_cli.reports.figures import draw_loss, spread_apart
from est_cli.reports.records import RunRecord, running_mean, smoothed


def test_bands_are_drawn_only_where_all_stages_agree(swept):
    same = [run for run in swept if "0.1_stage2_end-0.4" in run.name]
    assert run_with_shared_stages(same, Axis.of("steps", same)) is not None
    assert run_with_shared_stages(swept, Axis.of("steps", swept)) is None


def test_a_stage_starts_where_its_first_step_would_be_on_every_axis(one):
    first = one.stages[1].first_step
    axes = [Axis.of(key, [one]) for key in ("steps", "tokens")]
    assert [axis.at_step(one, first) * axis.scale for axis in axes] == [first, pytest.approx(first * 4096)]


def test_smoothing_does_not_reach_across_a_stage_or_a_loss_that_is_no_number():
    loss = np.repeat([5.0, 1.0], 200)
    loss[7] = np.nan
    np.testing.assert_array_equal(smoothed(loss, np.repeat([1.0, 2.0], 200)), loss)


def test_a_running_mean_takes_the_values_around_and_at_the_ends_those_that_are_there():
    smooth = running_mean(np.arange(50.0), 9)
    np.testing.assert_allclose(smooth[4:-4], np.arange(4.0, 46.0))
    assert (smooth[0], smooth[-1]) == (np.mean(np.arange(5.0)), np.mean(np.arange(45.0, 50.0)))


def test_a_thinned_curve_keeps_its_ends():
    thin = Curve(np.arange(1000.0), np.arange(1000.0)).thinned(7)
    assert (len(thin.x), thin.x[0], thin.x[-1]) == (7, 0, 999)


def test_labels_are_moved_apart_and_keep_their_order():
    at = spread_apart(np.array([0.5, 0.51, 0.52, 0.99, 1.0]), 0.1)
    assert (np.diff(at) >= 0.1 - 1e-9).all()
    assert at.max() <= 1.0


@pytest.mark.parametrize(("loss", "insets"), [(3 + 4 * np.exp(-np.arange(200) / 15), 1), (np.linspace(8, 3, 200), 0)])
def test_the_end_is_magnified_only_where_the_corner_is_empty(loss, insets):
    ax = Figure().subplots()
    run = RunRecord("run", Path("run"), {}, None, {"step": np.arange(200.0), "val/loss": loss})
    draw_loss(ax, Comparison([run]), Axis.of("steps", [run]))
    assert len(ax.child_axes) == insets
