"""experiment=compare: arms that differ in nothing but how they spend, and the verdict on them."""

import argparse
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from est_cli.composition.composer import compose
from est_cli.config import TrainConfig, as_plain, auto, read_train_config
from est_cli.errors import UserError
from est_cli.experiments.arms import with_arm
from est_cli.experiments.result import SweepResult
from est_cli.experiments.verdict import Verdict
from est_cli.reports.records import RunRecord
from est_cli.subnet.flops import config_ledger
from tests.commands.cli import train


def config_of(*overrides: str) -> TrainConfig:
    arguments = argparse.Namespace(overrides=["experiment=compare", *overrides], config_name=None, config_dir=None)
    return auto.choose(read_train_config(compose("train", arguments)[0]), auto.Device("cpu"))[0]


def spent(config: TrainConfig) -> int:
    return config_ledger(config).spent(config.trainer.max_steps).total


@pytest.mark.parametrize("scheduler", ["three_stage", "two_stage", "ramp"])
def test_the_third_arm_spends_what_est_spends(scheduler):
    config = config_of(f"scheduler={scheduler}", "trainer.max_steps=1000")
    arm = with_arm(config, "full_same_flops")
    assert len(arm.stages) == 1
    assert abs(spent(arm) - spent(config)) <= config_ledger(config).full.total / 2


def test_the_second_arm_trains_the_full_model_on_the_same_tokens():
    config = config_of()
    arm = with_arm(config, "full")
    assert arm.trainer.max_steps == config.trainer.max_steps
    assert spent(arm) == config.trainer.max_steps * config_ledger(config).full.total


def test_arms_differ_in_schedule_and_length_only():
    config = config_of()
    plain = [as_plain(with_arm(config, arm)) for arm in ("est", "full", "full_same_flops")]
    for arm in plain:
        del arm["name"], arm["scheduler"]["stages"], arm["trainer"]["max_steps"]
    assert plain[0] == plain[1] == plain[2]


def test_the_third_arm_has_a_learning_rate_schedule_of_its_own():
    config = config_of(
        "optimizer.decay=cosine", "trainer.max_steps=1000", "optimizer.warmup=100", "optimizer.decay_steps=1000"
    )
    arm = with_arm(config, "full_same_flops")
    assert arm.optimizer.decay_steps == arm.trainer.max_steps
    assert arm.optimizer.warmup == round(arm.trainer.max_steps / 10)
    shares = with_arm(config_of("optimizer.warmup=0.02"), "full_same_flops")
    assert shares.optimizer.warmup == 0.02


def test_the_decay_of_wsd_takes_the_same_share_of_the_third_arm():
    keys = ("optimizer.decay=wsd", "trainer.max_steps=1000", "optimizer.warmup=100")
    for length in ("optimizer.decay_steps=200", "optimizer.decay_steps=0.2", "optimizer.decay_fraction=0.2"):
        arm = with_arm(config_of(*keys, length), "full_same_flops")
        steps = arm.trainer.max_steps
        assert steps < 1000
        assert steps - arm.optimizer.decay_start(steps) == round(steps / 5)


@pytest.mark.parametrize(("warmup", "decay"), [(int, int), (float, int), (int, float), (float, float)])
def test_warmup_and_decay_that_touch_do_not_overlap_in_the_third_arm(warmup, decay):
    """Half of an odd number of steps each: both may be rounded up."""

    def half(kind: type, steps: int) -> int | float:
        return 0.5 if kind is float else steps // 2

    config = config_of("optimizer.decay=wsd", "optimizer.warmup=0", "trainer.max_steps=1000")
    for steps in range(1000, 1024, 2):
        optimizer = replace(config.optimizer, warmup=half(warmup, steps), decay_steps=half(decay, steps))
        touching = replace(config, optimizer=optimizer, trainer=replace(config.trainer, max_steps=steps))
        read_train_config(as_plain(with_arm(touching, "full_same_flops")))


def test_an_arm_that_there_is_not_is_bad_input():
    with pytest.raises(UserError, match=r"arm=ful: must be one of est, full, .* did you mean 'full'"):
        with_arm(config_of(), "ful")


def record(arm: str, seed: int, losses: list[float], flops: float, lr: float = 1e-3) -> RunRecord:
    n = len(losses)
    columns = {"step": np.arange(n) * 1.0, "val/loss": np.array(losses), "flops/total": flops * np.arange(1, n + 1),
               "seconds": np.arange(1, n + 1) * 2.0}  # fmt: skip
    summary = {"status": "done", "steps": n, "val_loss": losses[-1], "flops_total": flops * n, "train_s": 2.0 * n}
    config = {"name": arm, "seed": seed, "optimizer": {"lr": lr}}
    return RunRecord(f"{arm}-{seed}", Path("nowhere"), config, summary, columns, n)


def test_the_verdict_tells_when_a_run_was_as_good_as_its_seeds_full_model():
    runs = [
        record("full", 0, [4.0, 3.5, 3.0], 10), record("full", 1, [4.0, 3.5, 2.0], 10),
        record("est", 0, [3.5, 3.0, 2.5], 5), record("est", 1, [3.5, 3.0, 2.5], 5),
    ]  # fmt: skip
    est, full = Verdict.of(runs).arms
    assert est["to_baseline"] == {"steps": [2.0, None], "flops": [10.0, None], "seconds": [4.0, None]}
    assert full["to_baseline"]["steps"] == [3.0, 3.0]


def test_the_verdict_pairs_seeds():
    """Seeds differ by 10, the arms by 1: unpaired, the spread would hide the difference."""
    runs = [record(arm, seed, [10.0 * seed + loss], 1) for seed in (0, 1)
            for arm, loss in (("est", 1.0), ("full_same_flops", 2.0))]  # fmt: skip
    assert Verdict.of(runs).sentences() == [
        "est: for the same FLOPs its loss is 1.0000 ± 0.0000 (2 seeds) below the full model's."
    ]


def test_every_arm_stands_in_the_verdict_with_the_learning_rate_that_suits_it():
    """At equal rates EST seems to win by 1; each at its best, it loses by 1."""
    losses = {("est", 1e-3): 2.0, ("est", 8e-3): 4.0, ("full", 1e-3): 3.0, ("full", 8e-3): 1.0}
    runs = [record(arm, seed, [loss + seed], 1, lr) for (arm, lr), loss in losses.items() for seed in (0, 1)]
    verdict = Verdict.of(runs, ["optimizer.lr"])
    assert [arm["settings"] for arm in verdict.arms] == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 8e-3}]
    assert "its loss is 1.0000 ± 0.0000 (2 seeds) above the full model's" in verdict.sentences()[0]
    console = Console(file=io.StringIO(), width=100)
    verdict.show(console)
    shown = console.file.getvalue()
    rows = [line.split() for line in shown.splitlines() if line.startswith(("est", "full"))]
    assert [row[:3] for row in rows[:2]] == [["est", "0.001", "2"], ["full", "0.008", "2"]]
    assert [row[:2] for row in rows[2:4]] == [["est", "-"], ["full", "1"]], "steps to the full model's final loss"
    assert "Every arm at the best of its values of optimizer.lr" in shown


def test_a_setting_that_not_all_seeds_have_finished_is_not_the_best():
    runs = [record("est", seed, [2.0], 1, 1e-3) for seed in (0, 1)] + [record("est", 0, [1.0], 1, 8e-3)]
    [est] = Verdict.of(runs, ["optimizer.lr"]).arms
    assert est["settings"] == {"optimizer.lr": 1e-3}
    assert est["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        ({"arm", "seed", "optimizer.lr"}, "Every arm at the best of its values of optimizer.lr"),
        ({"arm", "trainer.max_steps"}, "No verdict: the jobs differ in trainer.max_steps too"),
    ],
)
def test_arms_that_share_too_little_get_no_verdict(tmp_path, capsys, swept, said):
    for arm in ("est", "full"):
        folder = tmp_path / arm
        folder.mkdir()
        (folder / "config.yaml").write_text(f"name: {arm}\nseed: 0\noptimizer: {{lr: 0.001}}\n")
        (folder / "summary.json").write_text('{"status": "done", "val_loss": 2.0, "flops_total": 1.0, "train_s": 1.0}')
        (folder / "metrics.jsonl").write_text('{"step": 0, "val/loss": 2.0, "flops/total": 1.0, "seconds": 1.0}\n')
    SweepResult.of(tmp_path, swept).show("text")
    assert said in " ".join(capsys.readouterr().out.split())


def test_one_seed_claims_no_spread():
    runs = [record("est", 0, [1.0], 1), record("full_same_flops", 0, [2.0], 1)]
    assert "one seed: no spread is known" in Verdict.of(runs).sentences()[0]


def test_a_difference_within_the_noise_is_not_called_one():
    runs = [record(arm, seed, [loss], 1) for arm, losses in (("est", (1.0, 3.0)), ("full_same_flops", (2.0, 2.1)))
            for seed, loss in enumerate(losses)]  # fmt: skip
    assert "no clear difference" in Verdict.of(runs).sentences()[0]


def test_one_command_trains_the_arms_and_compares_them(place):
    done = train(
        place, "experiment=compare", "trainer.max_steps=15", "trainer.eval_every=5", "trainer.checkpoint_every=0",
        "seed=3", "hydra/launcher=basic",
    )  # fmt: skip
    jobs = {job["name"]: job for job in done.json["jobs"]}
    assert set(jobs) == {"arm-est", "arm-doubling", "arm-full", "arm-full_same_flops"}
    cheapest = min((jobs["arm-est"], jobs["arm-doubling"]), key=lambda job: job["flops_total"])
    same = jobs["arm-full_same_flops"]
    assert same["steps"] == round(cheapest["flops_total"] / cheapest["flops_full_total"] * cheapest["steps"])
    assert {arm["arm"] for arm in done.json["arms"]} == {"est", "doubling", "full", "full_same_flops"}
