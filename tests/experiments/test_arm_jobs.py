"""experiment=compare arms=[…]: which jobs it makes, what they cost, and how it tunes."""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from est_cli.composition.composer import Composer
from est_cli.config import TrainConfig
from est_cli.errors import UserError
from est_cli.experiments import arm_jobs
from est_cli.experiments.arm_jobs import ComparisonJobs, side_by_side
from est_cli.experiments.arms import spent, with_arm
from est_cli.experiments.naming import SweepRequest
from est_cli.plugins import is_installed
from est_cli.subnet.flops import config_ledger
from est_cli.units import format_flops
from tests.commands.cli import ON_CORPUS, run
from tests.experiments.test_arms import config_of

CPU = ("trainer.device=cpu", "trainer.max_steps=100", "model.n_layers=6")


def composer_of(*overrides: str, config_dir: str | None = None) -> Composer:
    task = ["experiment=compare", *CPU, *overrides]
    return Composer("train", argparse.Namespace(overrides=task, config_name=None, config_dir=config_dir))


def jobs_of(*overrides: str, config_dir: str | None = None) -> ComparisonJobs:
    with composer_of(*overrides, config_dir=config_dir) as composer:
        return ComparisonJobs.of(composer, composer.compose_sweep())


def configs_of(*overrides: str, **options: str) -> dict[str, TrainConfig]:
    return {arm.name: arm.config for arm in jobs_of(*overrides, **options).arms}


def test_an_arm_is_the_scheduler_of_that_name_as_hydra_composes_it():
    """raptr and layer_drop also say how layers are sampled."""
    names = ("three_quarters", "stacking", "raptr", "layer_drop")
    for name, arm in configs_of(f"arms=[{','.join(names)}]").items():
        assert arm == replace(config_of(*CPU, f"scheduler={name}"), name=name, run_id=arm.run_id)


def test_what_is_said_of_the_scheduler_is_said_of_est_and_not_of_other_arms():
    assert list(configs_of()) == ["full", "full_same_flops", "doubling", "est"]
    configs = configs_of("arms=[est,ramp]", "scheduler=ramp", "scheduler.n_stages=2")
    assert [len(configs[arm].stages) for arm in ("est", "ramp")] == [2, 4]


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


def test_the_problems_of_all_arms_are_told_before_anything_runs_also_of_schedulers_of_ones_own(tmp_path):
    (tmp_path / "scheduler").mkdir()
    for name in ("one", "two"):
        (tmp_path / "scheduler" / f"{name}.yaml").write_text("stages: [{end: 0.5, layer: 0.5}, {}]\n")
    with pytest.raises(UserError) as raised:
        jobs_of("arms=[one,full,two]", config_dir=str(tmp_path))
    problem = "scheduler.stages[0].layer: there is no such key; did you mean 'layers'?"
    assert raised.value.problems == (f"arms: one: {problem}", f"arms: two: {problem}")


def test_a_sweep_over_arm_is_no_comparison():
    with composer_of("+arm=est,full") as composer:
        assert SweepRequest(composer.compose_sweep()).arms is None


def test_the_controls_spend_what_the_cheapest_arm_does():
    """The full model's two runs bracket the FLOPs of every arm; the small one has the layers that cost closest."""
    configs = configs_of("arms=[full,full_same_flops,small,est,stacking,one_layer]")
    least = min(spent(configs[arm]) for arm in ("est", "stacking", "one_layer"))
    assert abs(spent(configs["full_same_flops"]) - least) <= config_ledger(configs["full"]).full.total / 2
    assert spent(configs["full"]) >= max(map(spent, configs.values()))

    small = configs["small"]
    assert small.trainer.max_steps == configs["est"].trainer.max_steps and len(small.stages) == 1
    miss = {n: abs(spent(replace(small, model=replace(small.model, n_layers=n))) - least) for n in range(1, 6)}
    assert small.model.n_layers == min(miss, key=miss.get)
    assert replace(small.model, n_layers=6) == configs["est"].model


def test_without_an_evolving_arm_the_composed_scheduler_says_how_many_flops():
    arm = configs_of("arms=[full_same_flops]")["full_same_flops"]
    assert arm.trainer == with_arm(config_of(*CPU), "full_same_flops").trainer


class Launched:
    """Runs no job: writes the summary of one, whose loss `loss(overrides)` is; None leaves it stopped."""

    def __init__(self, folder: Path, loss: Callable[[set[str]], float | None] = lambda job: 1.0):
        self.folder, self.loss, self.goes = folder, loss, []

    def __call__(self, jobs: Sequence[Sequence[str]]) -> list[Path]:
        self.goes.append(jobs := list(map(set, jobs)))
        folders = [self.folder / f"{len(self.goes)}-{number}" for number in range(len(jobs))]
        for folder, loss in zip(folders, map(self.loss, jobs), strict=True):
            folder.mkdir()
            summary = {"status": "stopped"} if loss is None else {"status": "done", "val_loss": loss}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folders


GRID = ("arms=[full,est]", "seed=0,1,2", "optimizer.lr=0.001,0.002", "optimizer.weight_decay=0,0.1")


def test_later_seeds_run_each_arm_at_the_setting_that_was_best_on_the_first(tmp_path):
    best = {"+arm=full": {"optimizer.lr=0.002", "optimizer.weight_decay=0"},
            "+arm=est": {"optimizer.lr=0.001", "optimizer.weight_decay=0.1"}}  # fmt: skip

    def best_of(job: set[str]) -> set[str]:
        return next(best[override] for override in job if override in best)

    launched, jobs = Launched(tmp_path, lambda job: 3.0 - len(best_of(job) & job)), jobs_of(*GRID)
    jobs.run(launched)
    grid, later = launched.goes
    assert (len(grid), len(later)) == (2 * 4, 2 * 2)
    assert len(grid) + len(later) == jobs.runs_per_arm * len(jobs.arms)
    assert all("seed=0" in job for job in grid)
    assert [sum(seed in job for job in later) for seed in ("seed=1", "seed=2")] == [2, 2]
    assert all(best_of(job) <= job for job in later)


def test_later_seeds_of_an_arm_wait_for_its_first(tmp_path, capsys):
    launched = Launched(tmp_path, lambda job: None if {"+arm=est", "optimizer.lr=0.001"} <= job else 1.0)
    jobs_of(*GRID).run(launched)
    assert all("+arm=full" in job for job in launched.goes[1])
    assert "est: later seeds wait" in capsys.readouterr().err


def test_a_signal_ends_the_comparison():
    goes = []
    jobs_of(*GRID).run(goes.append)
    assert len(goes) == 1


def test_without_a_grid_all_seeds_run_at_once(tmp_path):
    launched = Launched(tmp_path)
    jobs_of("arms=[full,est]", "seed=0,1,2").run(launched)
    assert [len(go) for go in launched.goes] == [6]


def test_the_cost_is_known_before_the_start():
    jobs, console = jobs_of(*GRID), Console(file=io.StringIO(), width=80)
    jobs.show_cost(console)
    text = console.file.getvalue()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    full, est = (spent(arm.config) for arm in jobs.arms)
    assert rows["full"][:2] == ["6", "100"] and rows["full"][-1] == "100.0%"
    assert rows["est"][-1] == f"{100 * est / full:.1f}%"
    assert f"12 runs, {format_flops(6 * (est + full))} in all" in text


@pytest.mark.parametrize(
    ("cores", "differs", "together"),
    [
        (2, {}, True),
        (1, {}, False),
        (2, {"given": True}, False),
        (2, {"launcher": "submitit_slurm"}, False),
        (2, {"device": "cuda"}, False),
        (2, {"installed": False}, False),
    ],
    ids=lambda value: str(value),
)
def test_two_run_at_a_time_where_nobody_says_otherwise(monkeypatch, capsys, cores, differs, together):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(arm_jobs, "is_installed", lambda name: differs.get("installed", True))
    with composer_of("arms=[full,est]") as composer:
        master = composer.compose_sweep()
        jobs = ComparisonJobs.of(composer, master)
    master.hydra.runtime.choices["hydra/launcher"] = differs.get("launcher", "basic")
    trainer = replace(jobs.arms[0].config.trainer, device=differs.get("device", "cpu"))
    arms = tuple(replace(arm, config=replace(arm.config, trainer=trainer)) for arm in jobs.arms)
    assert bool(side_by_side(replace(jobs, arms=arms), master, differs.get("given", False))) == together
    assert ("one run after another" in capsys.readouterr().err) == ("installed" in differs)


def test_an_extra_below_a_package_that_is_missing_too_is_not_installed():
    """Without any launcher of Hydra's there is no hydra_plugins: a comparison then runs one job after another."""
    assert not is_installed("no_such_plugins.no_such_launcher")
    assert is_installed("hydra.core")


@pytest.mark.parametrize(("given", "one_each"), [((), True), (("trainer.threads=2",), False)])
def test_jobs_side_by_side_have_one_thread_each_unless_told_otherwise(given, one_each):
    jobs = jobs_of("arms=[full,est]", *given).on_one_thread_each()
    assert {"trainer.threads=1" in arm.overrides for arm in jobs.arms} == {one_each}


@pytest.mark.slow
def test_one_command_tunes_compares_and_finds_its_runs_again(place):
    """Its jobs run side by side where joblib is installed, and are found by any launcher."""
    command = (
        "experiment=compare", *(key for key in ON_CORPUS if not key.startswith("optimizer.lr")), "format=json",
        "trainer.max_steps=8", "trainer.eval_every=4", "trainer.checkpoint_every=0", "arms=[full_same_flops,stacking]",
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
