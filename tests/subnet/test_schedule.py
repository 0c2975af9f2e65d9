"""Stages: where boundaries lie, which stage a step belongs to, and what is said of boundaries that cannot work."""

import pytest
from tiny import THREE_STAGES

from est_cli.errors import UserError
from est_cli.subnet.schedule import (
    GROWTHS,
    Rates,
    StageSpec,
    boundary_step,
    build_stages,
    layer_sources,
    ramp,
    stage_at,
)

HALF = Rates(0.5, 0.5, 0.5)
NAMES = ("scheduler.stage1_end", "scheduler.stage2_end", "scheduler.stages[2].end")


@pytest.mark.parametrize(
    ("boundary", "max_steps", "step"),
    [(1, 10, 1), (1.0, 10, 10), (0.5, 10, 5), (0.5, 11, 6), (0.25, 10, 3), (0.24, 10, 2), (7, 3, 7), (None, 10, 10),
     (2 / 15, 150_000, 20_000), (7 / 15, 150_000, 70_000)],
)  # fmt: skip
def test_an_int_is_a_step_and_a_float_is_a_fraction_rounded_half_up(boundary, max_steps, step):
    assert boundary_step(boundary, max_steps) == step


@pytest.mark.parametrize("max_steps", [6, 15, 16, 17, 100, 999])
def test_stages_cover_every_step_once(max_steps):
    stages = build_stages(THREE_STAGES, max_steps)
    covered = [(step, stage.number) for stage in stages for step in range(stage.first_step, stage.last_step + 1)]
    assert [step for step, _ in covered] == list(range(max_steps))
    assert covered == [(step, stage_at(stages, step).number) for step in range(max_steps)]
    assert [stage.rates for stage in stages] == [HALF, Rates(0.5, 0.5), Rates()]


@pytest.mark.parametrize(
    ("ends", "max_steps", "parts", "smallest"),
    [
        ((2 / 15, 7 / 15), 3, ["scheduler.stage1_end=0.1333", "is step 0", "stage 1 would be empty"], 4),
        ((0.5, 0.25), 100, ["scheduler.stage2_end=0.25 is step 25", "is step 50", "stage 2 would be reversed"], None),
        ((0.5, 0.5), 100, ["scheduler.stage2_end=0.5 is step 50", "stage 2 would be empty"], None),
        ((20, 70), 70, ["scheduler.stage2_end=70 is step 70", "ends at step 70", "stage 3 would be empty"], 71),
        ((20, 70), 10, ["scheduler.stage1_end=20 is step 20", "ends at step 10", "stage 2 would be empty"], 71),
        ((50, 0.25), 100, ["scheduler.stage2_end=0.25 is step 25", "is step 50", "stage 2 would be reversed"], 202),
        ((0.1, 50), 1000, ["scheduler.stage2_end=50 is step 50", "is step 100", "stage 2 would be reversed"], 51),
        ((0.001, 0.9995), 1000, ["scheduler.stage2_end=0.9995 is step 1000"], 1001),
        ((1, 0.002), 500, ["scheduler.stage2_end=0.002 is step 1", "stage 2 would be empty"], 750),
        ((20_000, 0.05), 30_000, ["scheduler.stage2_end=0.05 is step 1500"], 400_010),
        ((10, 50, 100), 10, ["scheduler.stage1_end=10 is step 10", "stage 2 would be empty"], 100),
    ],
)
def test_an_empty_or_reversed_stage_names_the_boundary_the_step_and_what_would_work(ends, max_steps, parts, smallest):
    specs = [StageSpec(end, 0.5) for end in (*ends, None)[:3]]
    works = f"the smallest trainer.max_steps that works is {smallest}"
    if smallest is None:
        works = "no trainer.max_steps makes these boundaries increase"
    with pytest.raises(ValueError) as error:
        build_stages(specs, max_steps, NAMES)
    assert all(part in str(error.value) for part in (*parts, works)), str(error.value)
    if smallest:
        assert len(build_stages(specs, smallest)) == 3
        with pytest.raises(ValueError):
            build_stages(specs, smallest - 1)


def test_a_last_stage_with_an_end_must_end_with_the_training_and_is_named_by_its_place():
    with pytest.raises(UserError, match=r"scheduler\.stages\[1\]\.end=8: the last stage must end with the training"):
        build_stages([StageSpec(5), StageSpec(8)], 10)


@pytest.mark.parametrize("n_stages", [1, 2, 4, 5])
def test_a_ramp_rises_in_equal_stages_to_the_full_model(n_stages):
    stages = build_stages(ramp(Rates(0.5, 0.25, 1.0), n_stages), 1000)
    assert [stage.steps for stage in stages] == [1000 // n_stages] * n_stages
    risen = [i / max(1, n_stages - 1) for i in range(n_stages - 1)]
    assert [stage.rates.heads for stage in stages] == pytest.approx([*(0.5 + 0.5 * r for r in risen), 1.0])
    assert [stage.rates.mlp for stage in stages] == pytest.approx([*(0.25 + 0.75 * r for r in risen), 1.0])
    assert all(stage.rates.layers == 1.0 for stage in stages)


@pytest.mark.parametrize("n_stages", [0, -1, 2.0, True, "4"])
def test_a_ramp_needs_a_whole_number_of_stages(n_stages):
    with pytest.raises(ValueError, match=r"scheduler\.n_stages="):
        ramp(HALF, n_stages)


@pytest.mark.parametrize(
    "sources", [[0, 1], [1, 1, 1, 1], [0, 1, 2, 3], [0.0, 0.5, 1.0, 1.5]],
    ids=["too few", "from above", "past the end", "fractions"],
)  # fmt: skip
def test_a_growth_that_returns_something_else_is_refused(sources, monkeypatch):
    monkeypatch.setitem(GROWTHS, "odd", lambda old, new: sources)
    with pytest.raises(UserError, match="must return 4 sources to grow from 2 layers to 4, each None or a layer below"):
        layer_sources("odd", 2, 4)
