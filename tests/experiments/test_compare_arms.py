"""experiment=compare arms=[…]: which jobs it makes, what they cost, how it tunes, and what the verdict adds."""

import argparse
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from est_cli.composition.composer import Composer, compose
from est_cli.config import TrainConfig, auto, read_train_config
from est_cli.errors import UserError
from est_cli.experiments import comparison
from est_cli.experiments.arms import spent, with_arm
from est_cli.experiments.comparison import ComparisonJobs, side_by_side
from est_cli.experiments.naming import SweepRequest
from est_cli.experiments.verdict import Verdict
from est_cli.plugins import is_installed
from est_cli.reports.records import RunRecord
from est_cli.subnet.flops import config_ledger
from est_cli.units import format_flops
from tests.commands.cli import ON_CORPUS, run

CPU = ("trainer.device=cpu", "trainer.max_steps=100", "model.n_layers=6")


def jobs_of(*overrides: str, config_dir: str | None = None) -> ComparisonJobs:
    arguments = argparse.Namespace(
        overrides=["experiment=compare", *CPU, *overrides], config_name=None, config_dir=config_dir
    )
    with Composer("train", arguments) as composer:
        return ComparisonJobs.of(composer, composer.compose_sweep())


def configs_of(*overrides: str, **options: str) -> dict[str, TrainConfig]:
    return {arm.name: arm.config for arm in jobs_of(*overrides, **options).arms}


def config_of(*overrides: str) -> TrainConfig:
    arguments = argparse.Namespace(
        overrides=["experiment=compare", *CPU, *overrides], config_name=None, config_dir=None
    )
    return auto.choose(read_train_config(compose("train", arguments)[0]), auto.Device("cpu"))[0]


@pytest.mark.parametrize("name", ["three_quarters", "stacking", "raptr", "layer_drop"])
def test_an_arm_is_the_scheduler_of_that_name_as_hydra_composes_it(name):
    """raptr and layer_drop also say how layers are sampled."""
    arm = configs_of(f"arms=[{name}]")[name]
    assert arm == replace(config_of(f"scheduler={name}"), name=name, run_id=arm.run_id)


def test_what_is_said_of_the_scheduler_is_said_of_est_and_not_of_other_arms():
    configs = configs_of("arms=[est,ramp]", "scheduler=ramp", "scheduler.n_stages=2")
    assert [len(configs[arm].stages) for arm in ("est", "ramp")] == [2, 4]


def test_a_scheduler_of_ones_own_is_an_arm(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_text("stages: [{end: 0.5, layers: 0.5}, {}]\n")
    assert len(configs_of("arms=[mine]", config_dir=str(tmp_path))["mine"].stages) == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("arms=[full,stackin,rapt]", ("stackin: must be one of", "'stacking'", "rapt: must be one of", "'raptr'")),
        ("arms=[]", ("must be a list of at least one arm",)),
        ("arms=full", ("must be a list of at least one arm",)),
        ("arms=full,est", ("must be one list",)),
        ("sampling.heads=0.5,0.6", ("sampling.heads: only seed and optimizer keys",)),
        ("hydra/sweeper=optuna_tpe", ("hydra/sweeper=optuna_tpe: must be basic",)),
    ],
)
def test_what_cannot_be_compared_is_bad_input(override, said):
    with pytest.raises(UserError) as raised:
        jobs_of(override)
    assert all(words in str(raised.value) for words in said), raised.value


def test_the_problems_of_all_arms_are_told_before_anything_runs(tmp_path):
    (tmp_path / "scheduler").mkdir()
    for name in ("one", "two"):
        (tmp_path / "scheduler" / f"{name}.yaml").write_text("stages: [{end: 0.5, layer: 0.5}, {}]\n")
    with pytest.raises(UserError) as raised:
        jobs_of("arms=[one,full,two]", config_dir=str(tmp_path))
    assert [problem.split(": ")[:2] for problem in raised.value.problems] == [["arms", "one"], ["arms", "two"]]


def test_a_sweep_over_arm_is_what_it_was():
    arguments = argparse.Namespace(overrides=["experiment=compare", "+arm=est,full"], config_name=None, config_dir=None)
    with Composer("train", arguments) as composer:
        assert SweepRequest(composer.compose_sweep()).arms is None


def test_the_full_models_runs_bracket_the_flops_of_every_arm():
    configs = configs_of("arms=[full,full_same_flops,est,stacking,one_layer]")
    least = min(spent(configs[arm]) for arm in ("est", "stacking", "one_layer"))
    assert abs(spent(configs["full_same_flops"]) - least) <= config_ledger(configs["full"]).full.total / 2
    assert spent(configs["full"]) >= max(map(spent, configs.values()))


def test_the_small_model_has_fewer_layers_and_costs_about_what_the_cheapest_arm_does():
    configs = configs_of("arms=[small,est,one_layer]")
    small, target = configs["small"], spent(configs["one_layer"])
    assert small.trainer.max_steps == configs["est"].trainer.max_steps and len(small.stages) == 1

    def miss(n_layers: int) -> int:
        return abs(spent(replace(small, model=replace(small.model, n_layers=n_layers))) - target)

    assert small.model.n_layers == min(range(1, 6), key=miss)
    assert replace(small.model, n_layers=6) == configs["est"].model


def test_without_an_evolving_arm_the_composed_scheduler_says_how_many_flops():
    assert configs_of("arms=[full_same_flops]")["full_same_flops"].trainer == (
        with_arm(config_of(), "full_same_flops").trainer
    )


def test_a_model_of_one_layer_has_no_smaller_one():
    with pytest.raises(UserError, match="leaves no smaller model"):
        with_arm(config_of("model.n_layers=1"), "small")


class Launched:
    """Runs no job: writes the summary of one, whose loss `loss(overrides)` is; None leaves it stopped."""

    def __init__(self, folder: Path, loss):
        self.folder, self.loss = folder, loss
        self.goes: list[list[tuple[str, ...]]] = []

    def __call__(self, jobs):
        self.goes.append([tuple(job) for job in jobs])
        return [self._job(tuple(job), f"{len(self.goes)}-{number}") for number, job in enumerate(jobs)]

    def _job(self, overrides: tuple[str, ...], name: str) -> Path:
        (self.folder / name).mkdir()
        loss = self.loss(overrides)
        summary = {"status": "stopped"} if loss is None else {"status": "done", "val_loss": loss}
        (self.folder / name / "summary.json").write_text(json.dumps(summary))
        return self.folder / name


GRID = ("arms=[full,est]", "seed=0,1,2", "optimizer.lr=0.001,0.002", "optimizer.weight_decay=0,0.1")


def test_later_seeds_run_each_arm_at_the_setting_that_was_best_on_the_first(tmp_path):
    best = {"+arm=full": {"optimizer.lr=0.002", "optimizer.weight_decay=0"},
            "+arm=est": {"optimizer.lr=0.001", "optimizer.weight_decay=0.1"}}  # fmt: skip

    def loss(overrides):
        arm = next(override for override in overrides if override.startswith("+arm="))
        return 3.0 - len(best[arm] & set(overrides))

    launched, jobs = Launched(tmp_path, loss), jobs_of(*GRID)
    jobs.run(launched)
    grid, later = launched.goes
    assert (len(grid), len(later)) == (2 * 4, 2 * 2)
    assert len(grid) + len(later) == jobs.runs_per_arm * len(jobs.arms)
    assert all("seed=0" in job for job in grid)
    assert sorted(next(o for o in job if o.startswith("seed=")) for job in later) == ["seed=1"] * 2 + ["seed=2"] * 2
    assert all(best[next(o for o in job if o.startswith("+arm="))] <= set(job) for job in later)


def test_later_seeds_of_an_arm_wait_for_its_first(tmp_path, capsys):
    launched = Launched(tmp_path, lambda job: None if {"+arm=est", "optimizer.lr=0.001"} <= set(job) else 1.0)
    jobs_of(*GRID).run(launched)
    assert all("+arm=full" in job for job in launched.goes[1])
    assert "est: later seeds wait" in capsys.readouterr().err


def test_a_signal_ends_the_comparison(tmp_path):
    goes = []
    jobs_of(*GRID).run(goes.append)
    assert len(goes) == 1


def test_without_a_grid_all_seeds_run_at_once(tmp_path):
    launched = Launched(tmp_path, lambda job: 1.0)
    jobs_of("arms=[full,est]", "seed=0,1,2").run(launched)
    assert [len(go) for go in launched.goes] == [6]


def test_the_cost_is_known_before_the_start():
    jobs = jobs_of(*GRID)
    console = Console(file=io.StringIO(), width=80)
    jobs.show_cost(console)
    rows = {line.split()[0]: line.split()[1:] for line in console.file.getvalue().splitlines() if line.strip()}
    est, full = (spent(arm.config) for arm in reversed(jobs.arms))
    assert rows["full"][:2] == ["6", "100"] and rows["full"][-1] == "100.0%"
    assert rows["est"][-1] == f"{100 * est / full:.1f}%"
    assert f"12 runs, {format_flops(6 * (est + full))} in all" in console.file.getvalue()


def test_two_run_at_a_time_where_nobody_says_otherwise(monkeypatch, capsys):
    jobs = jobs_of("arms=[full,est]")

    def chosen(cores: int, found: bool = True, given: bool = False, launcher: str = "basic", jobs=jobs):
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
        monkeypatch.setattr(comparison, "is_installed", lambda name: found)
        return bool(side_by_side(jobs, master(launcher), given))

    def master(launcher: str):
        arguments = argparse.Namespace(overrides=[], config_name=None, config_dir=None)
        with Composer("train", arguments) as composer:
            composed = composer.compose()
        composed.hydra.runtime.choices["hydra/launcher"] = launcher
        return composed

    assert chosen(2)
    assert not any((chosen(1), chosen(2, given=True), chosen(2, launcher="submitit_slurm")))
    on_gpu = [replace(a, config=replace(a.config, trainer=replace(a.config.trainer, device="cuda"))) for a in jobs.arms]
    assert not chosen(2, jobs=replace(jobs, arms=tuple(on_gpu)))
    assert "one run after another" not in capsys.readouterr().err
    assert not chosen(2, found=False)
    assert "one run after another" in capsys.readouterr().err


def test_an_extra_below_a_package_that_is_missing_too_is_not_installed():
    """Without any launcher of Hydra's there is no hydra_plugins: a comparison then runs one job after another."""
    assert not is_installed("no_such_plugins.no_such_launcher")
    assert is_installed("hydra.core")


def test_jobs_side_by_side_have_one_thread_each_unless_told_otherwise():
    for given, wanted in (((), True), (("trainer.threads=2",), False)):
        jobs = jobs_of("arms=[full,est]", *given).on_one_thread_each()
        assert all(("trainer.threads=1" in arm.overrides) is wanted for arm in jobs.arms)


def record(arm: str, loss: float, flops: float, seconds: float, seed: int = 0, lr: float = 1e-3) -> RunRecord:
    columns = {"step": np.array([999.0]), "val/loss": np.array([loss]), "flops/total": np.array([flops]),
               "seconds": np.array([seconds])}  # fmt: skip
    summary = {"status": "done", "steps": 1000, "val_loss": loss, "flops_total": flops, "train_s": seconds}
    config = {"name": arm, "seed": seed, "optimizer": {"lr": lr}}
    return RunRecord(f"{arm}-{seed}-{lr}", Path("nowhere"), config, summary, columns, 1)


FULL_RUNS = [
    record(arm, loss + seed, flops, seconds, seed)
    for seed in (0, 1)
    for arm, loss, flops, seconds in (("full", 2.0, 4e12, 40.0), ("full_same_flops", 3.0, 1e12, 10.0))
]


def verdict_on(*runs: RunRecord) -> dict:
    return Verdict.of([*FULL_RUNS, *runs]).arms[0]


def test_an_arm_is_held_against_its_seeds_full_model_at_its_own_flops():
    arm = verdict_on(record("stacking", 2.4, 2e12, 25.0), record("stacking", 3.2, 2e12, 25.0, seed=1))
    assert arm["to_full"] == pytest.approx([0.4, 0.2])
    assert arm["to_same_flops"] == pytest.approx([-0.1, -0.3]), "2e12 is half way between 1e12 and 4e12"


def test_flops_outside_of_the_full_models_are_not_held_against_it():
    assert verdict_on(record("stacking", 2.4, 0.5e12, 25.0))["to_same_flops"] == [None]
    assert verdict_on(record("stacking", 2.4, 0.9996e12, 25.0))["to_same_flops"] == pytest.approx([-0.6])


def test_saved_at_equal_loss_is_read_off_the_full_models_frontier():
    saved = verdict_on(record("stacking", 2.5, 1.5e12, 16.0))["saved_at_equal_loss"]
    assert saved == {"flops": {"share": pytest.approx(0.25), "bound": None},
                     "seconds": {"share": pytest.approx(0.2), "bound": None}}  # fmt: skip


def test_as_good_as_all_of_the_full_run_saves_at_least_what_it_did_not_spend():
    for loss in (2.0, 1.5):
        saved = verdict_on(record("stacking", loss, 3e12, 44.0))["saved_at_equal_loss"]
        assert saved == {"flops": {"share": pytest.approx(0.25), "bound": "at least"},
                         "seconds": {"share": pytest.approx(-0.1), "bound": "at least"}}  # fmt: skip


def test_worse_than_the_shortest_full_run_saves_at_most_what_it_did_not_spend():
    saved = verdict_on(record("stacking", 3.5, 2e12, 20.0))["saved_at_equal_loss"]
    assert saved["flops"] == {"share": pytest.approx(-1.0), "bound": "at most"}


def test_a_full_model_that_does_not_gain_from_more_steps_has_no_frontier():
    runs = [record("full", 2.0, 4e12, 40.0), record("full_same_flops", 1.9, 1e12, 10.0), record("est", 2.1, 2e12, 9.0)]
    assert Verdict.of(runs).arms[0]["saved_at_equal_loss"]["flops"] == {"share": None, "bound": None}


def test_every_other_arm_gets_a_line_best_first():
    runs = [record("est", 2.5, 1.5e12, 16.0), record("stacking", 1.5, 3e12, 44.0), record("small", 2.2, 2e12, 20.0)]
    lines = Verdict.of([*FULL_RUNS, *runs]).sentences()
    assert [line.split(":")[0] for line in lines] == ["stacking", "small", "est"]
    assert (
        "for the same tokens 25.0% fewer FLOPs, and its loss is 0.5000 (one seed: no spread is known) below"
        in (lines[0])
    )
    assert "for the same loss it takes at least 25.0% fewer FLOPs and at most 10.0% more time" in lines[0]
    assert "for the same loss it takes 25.0% fewer FLOPs and 20.0% less time" in lines[2]


def test_an_arm_whose_best_learning_rate_is_an_edge_is_named():
    best = {"full": 2e-3, "est": 4e-3}
    runs = [record(arm, 2.0 + abs(math.log2(lr / best[arm])), 1e12, 1.0, lr=lr) for arm in best
            for lr in (1e-3, 2e-3, 4e-3)]  # fmt: skip
    verdict = Verdict.of(runs, ["optimizer.lr"])
    assert {arm["arm"]: arm["lr_at_edge"] for arm in verdict.arms} == {"full": False, "est": True}
    console = Console(file=io.StringIO(), width=80)
    verdict.show(console, at_a_time=2)
    shown = console.file.getvalue()
    assert "At an edge of the values of optimizer.lr that were tried: est (0.004).\n" in shown
    assert "Times are of 2 runs at a time." in shown


def test_a_setting_whose_run_failed_was_tried_too():
    done = [record("full", loss, 1e12, 1.0, lr=lr) for lr, loss in ((1e-3, 2.0), (2e-3, 1.0))]
    diverged = [record("full", 9.0, 1e12, 1.0, lr=4e-3)]
    assert Verdict.of(done, ["optimizer.lr"]).arms[0]["at_edge"] == ["optimizer.lr"]
    assert Verdict.of(done, ["optimizer.lr"], diverged).arms[0]["at_edge"] == []


def test_edges_of_other_settings_are_named_but_no_weight_decay_is_none():
    def edges(best: float) -> list[str]:
        runs = [record("full", 1.0 + abs(decay - best), 1e12, 1.0) for decay in (0.0, 0.1, 0.2)]
        for tried, decay in zip(runs, (0.0, 0.1, 0.2), strict=True):
            tried.config["optimizer"]["weight_decay"] = decay
        return Verdict.of(runs, ["optimizer.weight_decay"]).arms[0]["at_edge"]

    assert (edges(0.2), edges(0.1), edges(0.0)) == (["optimizer.weight_decay"], [], [])


def test_that_the_chord_flatters_is_said_where_there_is_one():
    runs = [record("full", 2.0, 2e12, 1.0), record("est", 2.0, 1e12, 1.0)]
    console = Console(file=io.StringIO(), width=80)
    Verdict.of(runs).show(console)
    assert "chord" not in console.file.getvalue()
    Verdict.of([*runs, record("full_same_flops", 3.0, 1e12, 1.0)]).show(console)
    assert "lies below this chord" in " ".join(console.file.getvalue().split())


def test_the_tables_of_many_arms_fit_into_80_columns():
    names = ("stacking", "layer_drop", "three_quarters")
    runs = [record(name, 2.5, 1.5e12, 1600.0, seed) for name in names for seed in (0, 1)]
    console = Console(file=io.StringIO(), width=80)
    Verdict.of([*FULL_RUNS, *runs], ["optimizer.lr", "optimizer.weight_decay"]).show(console)
    rows = [line for line in console.file.getvalue().splitlines() if line.startswith("full_same_flops")]
    assert len(rows) == 2 and all("…" not in row for row in rows)


@pytest.mark.slow
def test_one_command_tunes_compares_and_finds_its_runs_again(place):
    """Its jobs run side by side where joblib is installed, and are found by any launcher."""
    command = (
        "experiment=compare", *(key for key in ON_CORPUS if not key.startswith("optimizer.lr")), "format=json",
        "trainer.max_steps=8", "trainer.eval_every=4", "trainer.checkpoint_every=0", "arms=[full,stacking]",
        "optimizer.lr=0.003,0.01", "seed=0,1",
    )  # fmt: skip
    done = run("est-train", *command, cwd=place, figures=True)
    assert done.code == 0, done.err
    assert "FLOPs per run" in done.err
    names = {job["name"] for job in done.json["jobs"]}
    assert len(names) == 2 * 3
    assert {f"arm-stacking_lr-{lr}_seed-0" for lr in ("0.003", "0.01")} <= names
    assert all(arm["seeds"] == [0, 1] for arm in done.json["arms"])
    folder = Path(done.json["sweep_dir"])
    assert (folder / "report" / "comparison.png").stat().st_size > 10_000
    assert Path(done.json["report"]).exists()
    again = run("est-train", *command, "hydra/launcher=basic", cwd=place)
    assert again.err.count("done already, skipped") == len(names), again.err
    assert again.json["arms"] == done.json["arms"]
