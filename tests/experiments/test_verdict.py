"""What the verdict says of arms whose losses and costs are made up here."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from est_cli.experiments.result import SweepResult
from est_cli.experiments.verdict import Verdict
from est_cli.reports.records import RunRecord


def record(
    arm: str, loss: float, flops: float = 1e12, seconds: float = 1.0, seed: int = 0, before: tuple[float, ...] = (),
    **optimizer: float,
) -> RunRecord:  # fmt: skip
    """A run that was evaluated at equal distances: `before`, and with `loss` at its end."""
    spent = np.arange(1, len(before) + 2) / (len(before) + 1)
    columns = {"step": 600 * spent - 1, "val/loss": np.array([*before, loss]), "flops/total": flops * spent,
               "seconds": seconds * spent}  # fmt: skip
    summary = {"status": "done", "steps": 600, "val_loss": loss, "flops_total": flops, "train_s": seconds}
    config = {"name": arm, "seed": seed, "optimizer": {"lr": 1e-3, **optimizer}}
    return RunRecord(f"{arm}-{seed}", Path("nowhere"), config, summary, columns, len(spent))


FULL_RUNS = [
    record(arm, loss + seed, flops, seconds, seed)
    for seed in (0, 1)
    for arm, loss, flops, seconds in (("full", 2.0, 4e12, 40.0), ("full_same_flops", 3.0, 1e12, 10.0))
]


def facts(runs: list[RunRecord], *tuned: str, failed: tuple[RunRecord, ...] = ()) -> list[dict[str, Any]]:
    return [arm.facts() for arm in Verdict.of(runs, tuned, failed).arms]


def shown(verdict: Verdict, at_a_time: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=80)
    verdict.show(console, at_a_time)
    return console.file.getvalue()


def test_when_a_run_was_as_good_as_its_seeds_full_model():
    runs = [record("full", 3.0, 30, seed=0), record("full", 2.0, 30, seed=1),
            *(record("est", 2.5, 15, 6.0, seed, before=(3.5, 3.0)) for seed in (0, 1))]  # fmt: skip
    est, full = facts(runs)
    assert est["to_baseline"] == {"steps": [400.0, None], "flops": [10.0, None], "seconds": [4, None]}
    assert full["to_baseline"]["steps"] == [600.0, 600.0]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        # Seeds differ by 10, the arms by 1: unpaired, the spread would hide the difference.
        (((1.0, 11.0), (2.0, 12.0)), "is 1.0000 ± 0.0000 below the full model's (2 seeds)."),
        (((1.0, 3.0), (2.0, 2.1)), "is 0.0500 ± 1.3435 below the full model's (2 seeds, no clear difference)."),
        (((1.0,), (2.0,)), "is 1.0000 below the full model's (one seed: no spread is known)."),
    ],
)
def test_seeds_are_paired_and_noise_is_not_called_a_difference(losses, said):
    runs = [record(arm, loss, seed=seed) for arm, of_seeds in zip(("est", "full_same_flops"), losses, strict=True)
            for seed, loss in enumerate(of_seeds)]  # fmt: skip
    assert Verdict.of(runs).sentences() == [f"est: for the same FLOPs its loss {said}"]


def test_every_arm_stands_in_the_verdict_with_the_learning_rate_that_suits_it():
    """At equal rates EST seems to win by 1; each at its best, it loses by 1."""
    losses = {("est", 1e-3): 2.0, ("est", 8e-3): 4.0, ("full", 1e-3): 3.0, ("full", 8e-3): 1.0}
    runs = [record(arm, loss + seed, 3, seed=seed, lr=lr) for (arm, lr), loss in losses.items() for seed in (0, 1)]
    verdict = Verdict.of(runs, ["optimizer.lr"])
    assert [arm.settings for arm in verdict.arms] == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 8e-3}]
    assert "its loss is 1.0000 ± 0.0000 above the full model's (2 seeds)" in verdict.sentences()[0]
    text = shown(verdict)
    rows = [line.split() for line in text.splitlines() if line.startswith(("est", "full"))]
    assert [row[:3] for row in rows[:2]] == [["est", "0.001", "2"], ["full", "0.008", "2"]]
    assert [row[:2] for row in rows[2:4]] == [["est", "-"], ["full", "600"]], "steps to the full model's final loss"
    assert "Every arm at the best of its values of optimizer.lr" in text


def test_a_setting_that_not_all_seeds_have_finished_is_not_the_best():
    runs = [record("est", 2.0, seed=seed, lr=1e-3) for seed in (0, 1)] + [record("est", 1.0, lr=8e-3)]
    [est] = facts(runs, "optimizer.lr")
    assert (est["settings"], est["seeds"]) == ({"optimizer.lr": 1e-3}, [0, 1])


def test_an_arm_is_held_against_its_seeds_full_model_at_its_own_flops():
    runs = [record("stacking", 2.4, 2e12), record("stacking", 3.2, 2e12, seed=1)]
    arm = facts([*FULL_RUNS, *runs])[0]
    assert arm["to_full"] == pytest.approx([0.4, 0.2])
    assert arm["to_same_flops"] == pytest.approx([-0.1, -0.3]), "2e12 is half way between 1e12 and 4e12"


@pytest.mark.parametrize(("flops", "difference"), [(0.5e12, None), (5e12, None), (0.9996e12, -0.6)])
def test_only_flops_that_the_full_model_spent_are_held_against_it_but_half_a_step(flops, difference):
    arm = facts([*FULL_RUNS, record("stacking", 2.4, flops)])[0]
    assert arm["to_same_flops"] == [difference and pytest.approx(difference)]


@pytest.mark.parametrize(
    ("loss", "flops", "seconds", "saved"),
    [
        (2.5, 1.5e12, 16.0, ((0.25, None), (0.2, None))),  # half of the way needs 2e12 and 20 s
        (2.0, 3e12, 44.0, ((0.25, "at least"), (-0.1, "at least"))),  # as good as all of the full run
        (1.5, 3e12, 44.0, ((0.25, "at least"), (-0.1, "at least"))),
        (3.5, 2e12, 20.0, ((-1.0, "at most"), (-1.0, "at most"))),  # worse than the shortest
    ],
)
def test_saved_at_equal_loss_is_read_off_the_full_models_frontier(loss, flops, seconds, saved):
    arm = facts([*FULL_RUNS, record("stacking", loss, flops, seconds)])[0]
    assert arm["saved_at_equal_loss"] == {
        cost: {"share": pytest.approx(share), "bound": bound}
        for cost, (share, bound) in zip(("flops", "seconds"), saved, strict=True)
    }


def test_a_full_model_that_does_not_gain_from_more_steps_has_no_frontier():
    runs = [record("full", 2.0, 4e12, 40.0), record("full_same_flops", 1.9, 1e12, 10.0), record("est", 2.1, 2e12, 9.0)]
    assert facts(runs)[0]["saved_at_equal_loss"]["flops"] == {"share": None, "bound": None}


def test_every_other_arm_gets_a_line_best_first():
    runs = [record("est", 2.5, 1.5e12, 16.0), record("stacking", 1.5, 3e12, 44.0), record("small", 2.2, 2e12, 20.0)]
    best, small, est = Verdict.of([*FULL_RUNS, *runs]).sentences()
    assert best.startswith("stacking: for the same tokens 25.0% fewer FLOPs, and its loss is 0.5000 below the full")
    assert "for the same loss it takes at least 25.0% fewer FLOPs and at most 10.0% more time" in best
    assert small.startswith("small: ")
    assert est.startswith("est: ") and "for the same loss it takes 25.0% fewer FLOPs and 20.0% less time" in est


def test_an_arm_whose_best_learning_rate_is_an_edge_is_named():
    best = {"full": 2e-3, "est": 4e-3}
    runs = [record(arm, 2.0 + abs(math.log2(lr / best[arm])), lr=lr) for arm in best for lr in (1e-3, 2e-3, 4e-3)]
    assert {arm["arm"]: arm["lr_at_edge"] for arm in facts(runs, "optimizer.lr")} == {"full": False, "est": True}
    text = shown(Verdict.of(runs, ["optimizer.lr"]), at_a_time=2)
    assert "At an edge of the values of optimizer.lr that were tried: est (0.004).\n" in text
    assert "Times are of 2 runs at a time." in text


def test_a_setting_whose_run_failed_was_tried_too():
    done, diverged = [record("full", 2.0, lr=1e-3), record("full", 1.0, lr=2e-3)], record("full", 9.0, lr=4e-3)
    assert facts(done, "optimizer.lr")[0]["at_edge"] == ["optimizer.lr"]
    assert facts(done, "optimizer.lr", failed=(diverged,))[0]["at_edge"] == []


@pytest.mark.parametrize(("best", "edges"), [(0.2, ["optimizer.weight_decay"]), (0.1, []), (0.0, [])])
def test_edges_of_other_settings_are_named_but_no_weight_decay_is_none(best, edges):
    runs = [record("full", 1.0 + abs(decay - best), weight_decay=decay) for decay in (0.0, 0.1, 0.2)]
    assert facts(runs, "optimizer.weight_decay")[0]["at_edge"] == edges


def test_that_the_chord_flatters_is_said_where_there_is_one():
    runs = [record("full", 2.0, 2e12), record("est", 2.0, 1e12)]
    assert "chord" not in shown(Verdict.of(runs))
    runs.append(record("full_same_flops", 3.0))
    assert "lies below this chord" in " ".join(shown(Verdict.of(runs)).split())


def test_the_tables_of_many_arms_fit_into_80_columns():
    names = ("stacking", "layer_drop", "three_quarters")
    runs = [record(name, 2.5, 1.5e12, 1600.0, seed) for name in names for seed in (0, 1)]
    text = shown(Verdict.of([*FULL_RUNS, *runs], ["optimizer.lr", "optimizer.weight_decay"]))
    rows = [line for line in text.splitlines() if line.startswith("full_same_flops")]
    assert len(rows) == 2 and all("…" not in row for row in rows)


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
