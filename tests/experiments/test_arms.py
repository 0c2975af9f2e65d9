"""The arms of a comparison differ in nothing but how they spend."""

import argparse
from dataclasses import replace

import pytest

from est_cli.composition.composer import compose
from est_cli.config import TrainConfig, as_plain, auto, read_train_config
from est_cli.errors import UserError
from est_cli.experiments.arms import spent, with_arm
from est_cli.subnet.flops import config_ledger


def config_of(*overrides: str) -> TrainConfig:
    arguments = argparse.Namespace(overrides=["experiment=compare", *overrides], config_name=None, config_dir=None)
    return auto.choose(read_train_config(compose("train", arguments)[0]), auto.Device("cpu"))[0]


@pytest.mark.parametrize("scheduler", ["three_stage", "two_stage", "ramp"])
def test_the_full_model_trains_on_the_same_tokens_or_for_the_same_flops_and_nothing_else_differs(scheduler):
    config = config_of(f"scheduler={scheduler}", "trainer.max_steps=1000")
    arms = {name: with_arm(config, name) for name in ("est", "full", "full_same_flops")}
    full_step = config_ledger(config).full.total
    assert spent(arms["full"]) == 1000 * full_step
    assert abs(spent(arms["full_same_flops"]) - spent(config)) <= full_step / 2
    plain = [as_plain(arm) for arm in arms.values()]
    for arm in plain:
        del arm["name"], arm["scheduler"]["stages"], arm["trainer"]["max_steps"]
    assert plain[0] == plain[1] == plain[2]


@pytest.mark.parametrize(
    ("overrides", "warmup", "decay"),
    [
        (("decay=cosine", "warmup=100", "decay_steps=1000"), 0.1, 1.0),
        (("decay=wsd", "warmup=0.02", "decay_steps=200"), 0.02, 0.2),
        (("decay=wsd", "warmup=100", "decay_steps=0.2"), 0.1, 0.2),
        (("decay=wsd", "warmup=100", "decay_fraction=0.2"), 0.1, 0.2),
    ],
)
def test_warmup_and_decay_take_the_same_shares_of_a_shorter_arm(overrides, warmup, decay):
    config = config_of("trainer.max_steps=1000", *(f"optimizer.{override}" for override in overrides))
    arm = with_arm(config, "full_same_flops")
    steps, optimizer = arm.trainer.max_steps, arm.optimizer
    assert steps < 1000
    assert optimizer.warmup == (round(warmup * steps) if isinstance(config.optimizer.warmup, int) else warmup)
    decays = steps - optimizer.decay_start(steps) if optimizer.decay == "wsd" else optimizer.decay_steps
    assert decays == round(decay * steps)


@pytest.mark.parametrize(("warmup", "decay"), [(int, int), (float, int), (int, float), (float, float)])
def test_warmup_and_decay_that_touch_do_not_overlap_in_a_shorter_arm(warmup, decay):
    """Half of an odd number of steps each: both may be rounded up."""

    def half(kind: type, steps: int) -> int | float:
        return 0.5 if kind is float else steps // 2

    config = config_of("optimizer.decay=wsd", "optimizer.warmup=0", "trainer.max_steps=1000")
    for steps in range(1000, 1024, 2):
        optimizer = replace(config.optimizer, warmup=half(warmup, steps), decay_steps=half(decay, steps))
        touching = replace(config, optimizer=optimizer, trainer=replace(config.trainer, max_steps=steps))
        read_train_config(as_plain(with_arm(touching, "full_same_flops")))


@pytest.mark.parametrize(
    ("arm", "overrides", "said"),
    [
        ("ful", (), r"arm=ful: must be one of est, full, .* did you mean 'full'"),
        ("small", ("model.n_layers=1",), "leaves no smaller model"),
    ],
)
def test_an_arm_that_cannot_be_is_bad_input(arm, overrides, said):
    with pytest.raises(UserError, match=said):
        with_arm(config_of(*overrides), arm)
