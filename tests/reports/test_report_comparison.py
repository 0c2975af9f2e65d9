"""What differs between runs, which runs are one arm, and what a sweep crossed."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from est_cli.reports import RunRecord, load_runs
from est_cli.reports.arms import Comparison
from est_cli.reports.axes import AXES, run_with_shared_stages
from est_cli.reports.curves import Curve, running_mean, train_curve
from est_cli.reports.differences import differences, swept_pairs
from est_cli.reports.loss_plot import draw_loss, spread_apart
from est_cli.reports.stage_times import stage_times
from est_cli.reports.sweep_plot import sweep_grid

FULL = [{"end": None, "heads": 1.0, "mlp": 1.0, "layers": 1.0}]


def a_run(name="run", loss=3.0, **config) -> RunRecord:
    columns = {"step": np.array([0.0]), "val/loss": np.array([loss])}
    return RunRecord(name, Path(name), config, None, columns, 1)


def test_keys_that_are_equal_everywhere_are_not_told():
    found = differences([a_run(optimizer={"lr": 0.1, "eps": 1e-8}), a_run(optimizer={"lr": 0.2, "eps": 1e-8})])
    assert {key: difference.values for key, difference in found.items()} == {"optimizer.lr": [0.1, 0.2]}


def test_names_and_logging_are_not_settings():
    assert not differences(
        [a_run(name="a", run_id="1", logger={"project": "x"}), a_run(name="b", run_id="2", logger={"project": "y"})]
    )


def test_keys_that_always_agree_are_told_once(new_run, tmp_path):
    stages = {
        rate: [
            {"end": 0.5, "heads": rate, "mlp": 0.5, "layers": 1.0},
            {"end": None, "heads": 1.0, "mlp": 1.0, "layers": 1.0},
        ]
        for rate in (0.25, 0.5)
    }
    runs = load_runs(
        [new_run(tmp_path / str(rate), steps=60, sampling={"heads": rate}, stages=stages[rate]) for rate in stages]
    )
    found = differences(runs)
    assert list(found) == ["sampling.heads"]
    assert found["sampling.heads"].also == ["scheduler.stages[0].heads"]


def test_boundaries_have_the_names_that_people_override(sweep):
    assert list(differences(load_runs([sweep]))) == ["scheduler.stage1_end", "scheduler.stage2_end", "seed"]


def test_schedules_of_different_lengths_are_told_as_text(new_run, tmp_path):
    est, full = (new_run(tmp_path / name, steps=60, stages=stages) for name, stages in (("a", None), ("b", FULL)))
    config = yaml.safe_load((est / "config.yaml").read_text())
    config["scheduler"] |= {"stage1_end": 2 / 15}
    (est / "config.yaml").write_text(yaml.safe_dump(config))
    found = differences(load_runs([est, full]))
    assert {key: difference.values for key, difference in found.items()} == {
        "scheduler.stages": ["0.5/0.5/0.5 to step 8, 0.5/0.5/1 to step 28, 1/1/1 to step 60", "1/1/1 to step 60"]
    }


def test_an_integer_and_a_float_boundary_differ():
    assert differences([a_run(warmup=1), a_run(warmup=1.0)])["warmup"].values == [1, 1.0]


def test_seeds_of_one_configuration_are_one_arm_and_arms_are_ranked_by_loss():
    runs = [a_run("b0", 3.0, lr=1, seed=0), a_run("b1", 3.2, lr=1, seed=1), a_run("a0", 2.9, lr=2, seed=0)]
    arms = Comparison.of(runs).arms
    assert [[run.name for run in arm.runs] for arm in arms] == [["a0"], ["b0", "b1"]]
    assert [arm.letter for arm in arms] == ["A", "B"]
    assert arms[1].mean("val_loss") == pytest.approx(3.1)
    assert arms[1].spread("val_loss") == pytest.approx(0.2 / np.sqrt(2))


def test_runs_with_equal_configs_stay_apart():
    assert len(Comparison.of([a_run("x"), a_run("y")]).arms) == 2


def test_a_run_without_a_validation_loss_comes_last():
    arms = Comparison.of([a_run("none", np.nan, lr=1), a_run("some", 9.0, lr=2)]).arms
    assert [arm.runs[0].name for arm in arms] == ["some", "none"]


def test_letters_go_on_after_z():
    arms = Comparison.of([a_run(str(i), 3.0 + i, lr=i) for i in range(28)]).arms
    assert [arm.letter for arm in arms[24:]] == ["Y", "Z", "AA", "AB"]


def test_only_crossed_keys_make_a_heat_map(sweep):
    assert swept_pairs(differences(load_runs([sweep]))) == [("scheduler.stage1_end", "scheduler.stage2_end")]
    apart = [a_run(lr=1, wd=1), a_run(lr=2, wd=2), a_run(lr=3, wd=3)]
    assert swept_pairs(differences(apart)) == []


def test_a_cell_of_the_heat_map_is_the_mean_of_its_runs():
    runs = [
        a_run("", loss, a=a, b=b, seed=seed)
        for loss, a, b, seed in [(3.0, 1, 1, 0), (3.2, 1, 1, 1), (4.0, 2, 1, 0), (5.0, 2, 2, 0)]
    ]
    rows, columns, loss, n = sweep_grid(Comparison.of(runs), ("a", "b"))
    assert (rows, columns) == ([1, 2], [1, 2])
    np.testing.assert_allclose(loss, [[3.1, np.nan], [4.0, 5.0]])
    np.testing.assert_array_equal(n, [[2, 0], [1, 1]])


def test_bands_are_drawn_only_where_all_stages_agree(sweep):
    same = [run for run in load_runs([sweep]) if "0.1_stage2_end-0.4" in run.name]
    assert run_with_shared_stages(Comparison.of(same), AXES[0]) is not None
    assert run_with_shared_stages(Comparison.of(load_runs([sweep])), AXES[0]) is None


def test_a_stage_starts_where_its_first_step_would_be_on_every_axis(one_run):
    (run,) = load_runs([one_run])
    second = run.stages[1]
    assert AXES[0].at_step(run, second.first_step) == second.first_step
    assert AXES[1].at_step(run, second.first_step) == second.first_step * 4096


def test_smoothing_does_not_reach_across_a_stage():
    jump = a_run()
    jump.columns.update(
        {"step": np.arange(400.0), "stage": np.repeat([1.0, 2.0], 200), "train/loss": np.repeat([5.0, 1.0], 200)}
    )
    np.testing.assert_array_equal(train_curve(jump, AXES[0]).y, jump.columns["train/loss"])


def test_a_running_mean_takes_the_values_around_and_at_the_ends_those_that_are_there():
    smooth = running_mean(np.arange(50.0), 9)
    np.testing.assert_allclose(smooth[4:-4], np.arange(4.0, 46.0))
    assert smooth[0] == np.mean(np.arange(5.0))
    assert smooth[-1] == np.mean(np.arange(45.0, 50.0))


def test_a_thinned_curve_keeps_its_ends():
    thin = Curve(np.arange(1000.0), np.arange(1000.0)).thinned(7)
    assert len(thin) == 7
    assert (thin.x[0], thin.x[-1]) == (0, 999)


def test_labels_are_moved_apart_and_keep_their_order():
    at = spread_apart(np.array([0.5, 0.51, 0.52, 0.99, 1.0]), 0.1)
    assert (np.diff(at) >= 0.1 - 1e-9).all()
    assert at.max() <= 1.0


@pytest.mark.parametrize(("loss", "insets"), [(3 + 4 * np.exp(-np.arange(200) / 15), 1), (np.linspace(8, 3, 200), 0)])
def test_the_end_is_magnified_only_where_the_corner_is_empty(loss, insets):
    run = a_run()
    run.columns.update({"step": np.arange(200.0), "val/loss": loss})
    ax = Figure().subplots()
    draw_loss(ax, Comparison.of([run]), AXES[0])
    assert len(ax.child_axes) == insets


def test_the_step_time_of_a_stage_leaves_out_the_step_that_compiles(one_run):
    (arm,) = Comparison.of(load_runs([one_run])).arms
    times = stage_times(arm)
    assert [entry.stage.number for entry in times] == [1, 2, 3]
    assert max(entry.step_s.max() for entry in times) < 0.4
    assert times[0].time_ratio < times[1].time_ratio < times[2].time_ratio == 1
