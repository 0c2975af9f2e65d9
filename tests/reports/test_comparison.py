"""What differs between runs, which runs are one arm, what a sweep crossed, how long steps took."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from est_cli.reports.comparison import Comparison, differences, swept_pairs
from est_cli.reports.figures import sweep_grid
from est_cli.reports.records import RunRecord
from est_cli.subnet.schedule import StageSpec


def a_run(name="run", loss=3.0, **config) -> RunRecord:
    columns = {"step": np.array([0.0]), "val/loss": np.array([loss])}
    return RunRecord(name, Path(name), config, None, columns, 1)


def values_of(differing) -> dict[str, list]:
    return {key: list(difference.values.values()) for key, difference in differing.items()}


@pytest.mark.parametrize(
    ("configs", "found"),
    [
        ([{"optimizer": {"lr": lr, "eps": 1e-8}} for lr in (0.1, 0.2)], {"optimizer.lr": [0.1, 0.2]}),
        ([{"name": name, "run_id": name, "logger": {"project": name}} for name in "ab"], {}),
        ([{"warmup": 1}, {"warmup": 1.0}], {"warmup": [1, 1.0]}),
    ],
)
def test_only_settings_that_differ_are_told_and_an_integer_differs_from_a_float(configs, found):
    assert values_of(differences([RunRecord("run", Path("run"), config, None, {}) for config in configs])) == found


def test_keys_that_always_agree_are_told_once(new_run):
    rates = (0.25, 0.5)
    found = differences(
        [
            new_run(str(r), steps=60, sampling={"heads": r, "mlp": r}, stages=(StageSpec(0.5, r, 0.5), StageSpec()))
            for r in rates
        ]
    )
    assert {key: difference.also for key, difference in found.items()} == {"sampling.heads": ["sampling.mlp"]}


def test_schedules_of_different_lengths_are_told_as_text(new_run):
    runs = [new_run("a", steps=60), new_run("b", steps=60, stages=tiny.FULL)]
    assert values_of(differences(runs)) == {
        "scheduler.stages": ["0.5/0.5/0.5 to step 8, 0.5/0.5/1 to step 28, 1/1/1 to step 60", "1/1/1 to step 60"]
    }


def test_seeds_of_one_configuration_are_one_arm_and_arms_are_ranked_by_loss():
    runs = [a_run("b0", 3.0, lr=1, seed=0), a_run("b1", 3.2, lr=1, seed=1), a_run("a0", 2.9, lr=2, seed=0)]
    arms = Comparison(runs).arms
    assert [[run.name for run in arm.runs] for arm in arms] == [["a0"], ["b0", "b1"]]
    assert arms[1].mean("val_loss") == pytest.approx(3.1)
    assert arms[1].spread("val_loss") == pytest.approx(0.2 / np.sqrt(2))
    assert len(Comparison([a_run("x"), a_run("y")]).arms) == 2  # equal configs without a seed


def test_letters_go_on_after_z_and_a_run_without_a_validation_loss_comes_last():
    arms = Comparison([a_run("none", np.nan, lr=-1), *(a_run(str(i), 3.0 + i, lr=i) for i in range(27))]).arms
    assert [(arm.letter, arm.runs[0].name) for arm in arms[25:]] == [("Z", "25"), ("AA", "26"), ("AB", "none")]


def test_only_crossed_keys_make_a_heat_map(swept):
    found = differences(swept)
    assert list(found) == ["scheduler.stage1_end", "scheduler.stage2_end", "seed"]
    assert swept_pairs(found) == [("scheduler.stage1_end", "scheduler.stage2_end")]
    apart = [a_run(lr=1, wd=1), a_run(lr=2, wd=2), a_run(lr=3, wd=3)]
    assert swept_pairs(differences(apart)) == []


def test_a_cell_of_the_heat_map_is_the_mean_of_its_runs():
    points = [(3.0, 1, 1, 0), (3.2, 1, 1, 1), (4.0, 2, 1, 0), (5.0, 2, 2, 0)]
    runs = [a_run("", loss, a=a, b=b, seed=seed) for loss, a, b, seed in points]
    rows, columns, loss, n = sweep_grid(Comparison(runs), ("a", "b"))
    assert (rows, columns) == ([1, 2], [1, 2])
    np.testing.assert_allclose(loss, [[3.1, np.nan], [4.0, 5.0]])
    np.testing.assert_array_equal(n, [[2, 0], [1, 1]])


def test_the_step_time_of_a_stage_leaves_out_the_step_that_compiles(one):
    times = Comparison([one]).arms[0].stage_times
    assert [entry.stage.number for entry in times] == [1, 2, 3]
    assert max(entry.step_s.max() for entry in times) < 0.4
    assert times[0].time_ratio < times[1].time_ratio < times[2].time_ratio == 1
