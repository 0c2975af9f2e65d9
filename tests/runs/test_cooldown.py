"""est-train --cooldown CHECKPOINT: a trunk's steps and a decay make the run that a straight one would have been."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny import train_config

from est_cli.commands.train import primary_config
from est_cli.composition.composer import compose
from est_cli.config import OptimizerConfig, TrainConfig, read_train_config
from est_cli.errors import UserError
from est_cli.runs.cooldown import Trunk, cooldown_config, take_trunk
from est_cli.runs.directory import RunDirectory
from est_cli.subnet.schedule import StageSpec
from est_cli.tracking.metrics import to_line
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.optimizer import learning_rate
from tests.commands.cli import ON_CORPUS, Finished, assert_same_bits, call, metrics, run, without_speed
from tests.training import runs

CONSTANT = OptimizerConfig(warmup=0.2, decay="none")
SHARED = (*ON_CORPUS, "checkpoint.keep=100", "trainer.checkpoint_every=4", "trainer.eval_every=3", "format=json")
TRUNK = ("trainer.max_steps=20", "optimizer.warmup=0.1", "optimizer.decay=none")
STRAIGHT = (
    "trainer.max_steps=13", "optimizer.warmup=2", "optimizer.decay=wsd", "optimizer.decay_steps=5",
    "optimizer.min_lr_ratio=0.0", "scheduler=full",
)  # fmt: skip
COOLDOWN = ("optimizer.decay_steps=5", "optimizer.min_lr_ratio=0.0", "format=json")
AT = "trunk/checkpoints/step-00000008"


def train(place: Path, *arguments: str, code: int = 0) -> Finished:
    done = run("est-train", *arguments, cwd=place)
    assert done.code == code, done.err
    return done


@pytest.fixture(scope="module")
def trunk(place) -> Path:
    """A run of 20 steps at a constant rate, over three stages that end at 3, 9 and 20."""
    train(place, *SHARED, *TRUNK, "scheduler=three_stage", "hydra.run.dir=trunk")
    return place / "trunk"


@pytest.fixture(scope="module")
def cooled(place, trunk) -> Path:
    """The cooldown of the trunk from step 8 over 5 steps."""
    train(place, "--cooldown", AT, *COOLDOWN, "hydra.run.dir=cooled")
    return place / "cooled"


def assert_equal_runs(one: Path, other: Path) -> None:
    """To the bit: weights, moments, and every number but those of time."""
    assert_same_bits(one, other)
    assert len(metrics(one)) == 13
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    keys = ("status", "steps", "tokens", "val_loss", "flops_total", "flops_full_total", "flops_saved_blocks")
    ours, theirs = ([*(s[key] for key in keys), *(stage["flops"] for stage in s["stages"])] for s in summaries)
    assert ours == theirs


@pytest.mark.parametrize(
    ("scheduler", "stages"),
    [
        # The third stage begins after the checkpoint, at step 9, and is left out.
        (("scheduler=three_stage",), "[{end: 3, heads: 0.5, mlp: 0.5, layers: 0.5}, {heads: 0.5, mlp: 0.5}]"),
        (("scheduler=stacking", "scheduler.grow_at=0.3", "scheduler.depths=2"), "[{end: 6, n_layers: 2}, {}]"),
        # Growth at the checkpoint would come after it.
        (("scheduler=stacking", "scheduler.grow_at=0.4", "scheduler.depths=2"), "[{n_layers: 2}]"),
    ],
    ids=["three stages", "growth before the checkpoint", "growth at the checkpoint"],
)
def test_trunk_and_cooldown_make_a_straight_run_to_the_bit(place, tmp_path, scheduler, stages):
    train(place, *SHARED, *TRUNK, *scheduler, f"hydra.run.dir={tmp_path}/trunk")
    checkpoint = f"{tmp_path}/trunk/checkpoints/step-00000008"
    train(place, "--cooldown", checkpoint, *COOLDOWN, f"hydra.run.dir={tmp_path}/cooled")
    train(place, *SHARED, *STRAIGHT, f"scheduler.stages={stages}", f"hydra.run.dir={tmp_path}/straight")
    assert_equal_runs(tmp_path / "cooled", tmp_path / "straight")


def test_the_folder_has_the_straight_runs_config_names_its_trunk_and_shares_the_checkpoints_files(place, cooled):
    config = read_train_config(yaml.safe_load((cooled / "config.yaml").read_text()))
    assert config.trainer.max_steps == 13
    assert (config.optimizer.decay, config.optimizer.decay_steps, config.optimizer.warmup) == ("wsd", 5, 2)
    assert config.scheduler.stages == (StageSpec(3, 0.5, 0.5, 0.5), StageSpec(None, 0.5, 0.5))
    assert metrics(cooled)[-1]["train/lr"] < metrics(place / "trunk")[12]["train/lr"]
    assert json.loads((cooled / "summary.json").read_text())["train_s"] > 0
    trunk = json.loads((cooled / "environment.json").read_text())["cooldown_of"]
    assert (trunk["checkpoint"], trunk["step"]) == (str(place / AT), 8)
    assert (cooled / "checkpoints" / "step-00000008" / "model.safetensors").samefile(place / AT / "model.safetensors")
    assert len(metrics(place / "trunk")) == 20, "the trunk is left as it was"


def killed(cooled: Path, copy: Path) -> Path:
    """What a cooldown that was killed between steps 12 and 13 leaves."""
    shutil.copytree(cooled, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000013")
    return copy


@pytest.mark.parametrize("flags", [("--cooldown", AT, *COOLDOWN), ("--rerun", "killed", "format=json")])
def test_a_cooldown_that_was_killed_continues_by_the_same_command_or_by_its_own_config(place, cooled, flags):
    """Its own config needs no trunk."""
    folder = killed(cooled, place / "killed")
    assert "continuing at step 12" in train(place, *flags, f"hydra.run.dir={folder}").err
    assert_equal_runs(folder, cooled)
    shutil.rmtree(folder)


def test_a_cooldown_that_died_before_it_had_the_checkpoint_begins_again(place, cooled):
    folder = killed(cooled, place / "early")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / ".writing-step-00000008").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{")
    assert "continuing at step 8" in train(place, "--cooldown", AT, *COOLDOWN, "hydra.run.dir=early").err
    assert_equal_runs(folder, cooled)


def test_one_trunk_serves_many_budgets_in_a_sweep(place, cooled):
    jobs = train(place, "--cooldown", AT, *COOLDOWN, "-m", "optimizer.decay_steps=2,5").json["jobs"]
    assert sorted(job["steps"] for job in jobs) == [10, 13]
    same = next(Path(job["run_dir"]) for job in jobs if job["steps"] == 13)
    assert without_speed(metrics(same)) == without_speed(metrics(cooled))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cooldown", AT, "trainer.batch_size=4"), "trainer.batch_size=2 trainer.grad_accum=1"),
        (("--cooldown", AT, "optimizer.decay_steps=0"), "optimizer.decay_steps=0: must be"),
        (("--cooldown", AT, "--rerun", "trunk"), "only one of them"),
    ],
)
def test_bad_input_is_one_message_and_makes_no_folder(place, trunk, arguments, said):
    done = call("est-train", *arguments, "hydra.run.dir=refused", cwd=place)
    assert (done.code, said in done.err, "Traceback" in done.err) == (2, True, False), done.err
    assert not (place / "refused").exists()


def test_help_and_cfg_know_the_flag(place, trunk):
    assert "est-train --cooldown" in train(place, "--help").out
    shown = yaml.safe_load(train(place, "--cooldown", AT, "--cfg", "job").out)
    assert (shown["optimizer"]["decay"], shown["optimizer"]["warmup"]) == ("wsd", 2)


def trunk_in(run_dir: Path, config: TrainConfig, steps: int = 6) -> Path:
    """A run of `config` that has taken `steps` steps; returns its checkpoint."""
    training, recorder = runs.start(config)
    runs.train(training, run_dir / "checkpoints", steps)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(to_line, recorder.records)))
    return run_dir / "checkpoints" / f"step-{steps:08d}"


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Path:
    """The checkpoint of step 6 of 15, at a constant rate."""
    return trunk_in(tmp_path_factory.mktemp("constant") / "trunk", train_config(optimizer=CONSTANT))


@pytest.fixture
def at(tmp_path, constant) -> Path:
    """A copy, to change."""
    shutil.copytree(constant.parents[1], tmp_path / "trunk")
    return tmp_path / "trunk" / "checkpoints" / constant.name


def settled(checkpoint: Path, *overrides: str) -> TrainConfig:
    """The config of the cooldown, as est-train composes it."""
    arguments = argparse.Namespace(
        overrides=list(overrides), config_name=None, config_dir=None, cooldown=str(checkpoint)
    )
    composed, _ = compose(primary_config(arguments), arguments)
    trunk = take_trunk(composed)
    config = read_train_config(composed)
    trunk.check(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "max_steps", "decay_steps"),
    [
        (("optimizer.decay_steps=4",), 10, 4),
        (("optimizer.decay_steps=0.4",), 10, 4),
        (("optimizer.decay_fraction=0.5", "optimizer.decay_shape=linear"), 12, 6),
        ((), 8, 2),  # the nearest to a fifth, which is the default
        (("optimizer.decay_steps=0.001",), 7, 1),
    ],
)
@pytest.mark.parametrize("before_wsd", [False, True])
def test_the_decay_is_so_many_steps_or_a_share_of_the_whole_new_run(at, before_wsd, overrides, max_steps, decay_steps):
    """A trunk from before wsd has no keys for it, and they can be given."""
    if before_wsd:
        change_state(at, lambda config: [config["optimizer"].pop(key) for key in ("decay_fraction", "decay_shape")])
    config = settled(at, *overrides)
    assert (config.trainer.max_steps, config.optimizer.decay_steps) == (max_steps, decay_steps)
    assert config.optimizer.decay_start(max_steps) == 6


def test_a_share_of_the_run_is_the_share_that_a_straight_run_would_take(constant):
    trunk = Trunk.at(str(constant))
    for step in (6, 100, 1001):
        for share in (0.05, 0.1, 0.15, 1 / 3, 0.5, 0.77):
            length = replace(trunk, step=step).length(share, 0.2)
            straight = OptimizerConfig(decay="wsd", decay_steps=share)
            assert straight.decay_start(step + length) == step


@pytest.mark.parametrize(("step", "stages"), [(2, 1), (3, 2), (7, 2), (8, 3)])
def test_a_stage_that_begins_at_the_checkpoint_or_later_is_dropped(tmp_path, step, stages):
    trunk = Trunk.at(str(trunk_in(tmp_path, train_config(optimizer=OptimizerConfig(warmup=0, decay="none")), step)))
    config = trunk.cooled(5)
    assert len(config.stages) == stages
    assert config.stages[-1].end == step + 5
    assert config.stages[:-1] == trunk.config.stages[: stages - 1]
    assert ("left out" in trunk.note(config)) == (stages < 3)


def test_within_warmup_the_warmup_ends_first(tmp_path):
    config = train_config(optimizer=CONSTANT)
    cooled = settled(trunk_in(tmp_path, config, 2), "optimizer.decay_steps=4")
    assert (cooled.trainer.max_steps, cooled.optimizer.decay_steps) == (7, 4)
    assert cooled.optimizer.decay_start(7) == 3
    for step in range(3):
        assert learning_rate(cooled.optimizer, step, 7) == learning_rate(config.optimizer, step, 15)


@pytest.mark.parametrize(
    ("optimizer", "refused_at"),
    [
        (replace(CONSTANT, decay="cosine"), 3),
        (replace(CONSTANT, decay="linear", decay_steps=10), 3),
        (replace(CONSTANT, decay="wsd", decay_steps=9), 6),
        (CONSTANT, 15),
    ],
)
def test_a_trunk_is_taken_up_to_the_step_at_which_its_rate_falls(tmp_path, optimizer, refused_at):
    config = train_config(optimizer=optimizer, save_final="full")
    for step in range(refused_at - 1, min(15, refused_at + 1) + 1):
        at = str(trunk_in(tmp_path / str(step), config, step))
        if step <= refused_at:
            assert Trunk.at(at).step == step
        else:
            with pytest.raises(UserError, match=rf"rate began to fall at step {refused_at} \(optimizer.decay="):
                Trunk.at(at)


def test_what_the_trunk_has_decided_is_refused_by_its_name(constant):
    overrides = [
        "model.n_layers=2", "model=gpt2", "data=text", "data.seq_len=4", "tokenizer.kind=byte", "seed=1",
        "sampling.heads=0.25", "sampling=all", "scheduler=full", "scheduler.grow=zero", "optimizer.lr=1.0",
        "optimizer.betas=[0.9,0.99]", "optimizer.weight_decay=0", "optimizer.warmup=1", "optimizer.decay=cosine",
        "optimizer.unsampled=freeze", "optimizer=adamw", "trainer.precision=bf16", "trainer.compile=true",
        "trainer=gpu", "kernels=masked", "experiment=quickstart", "+arm=full",
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        cooldown_config(str(constant), [*overrides, "logger=none"])
    *decided, allowed = caught.value.problems
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    assert decided == [f"{key}: the trunk has decided this" for key in keys]
    assert "may change only optimizer.decay_steps, " in allowed


def test_the_length_is_given_by_the_decay_and_a_mistyped_key_is_told(constant):
    with pytest.raises(UserError) as caught:
        cooldown_config(str(constant), ["trainer.max_steps=50", "optimizer.decay_step=5"])
    assert caught.value.problems == (
        "trainer.max_steps: follows from the checkpoint and the length of the decay; give optimizer.decay_steps",
        "optimizer.decay_step: there is no such key; did you mean 'optimizer.decay_steps'?",
    )
    with pytest.raises(UserError, match=r"optimizer.decay_steps=1.0: must be below 1 in a cooldown"):
        settled(constant, "optimizer.decay_steps=1.0")


def test_what_does_not_change_the_result_may_change(constant):
    """Sizes of a micro-batch too, as long as a step has as many sequences."""
    overrides = (
        "trainer.eval_every=2", "trainer.eval_tokens=8", "trainer.log_every=3", "trainer.checkpoint_every=1",
        "trainer.save_final=none", "trainer.threads=1", "trainer.device=cpu", "logger=csv", "logger.project=p",
        "checkpoint.keep=7", "name=other", "run_id=mine", "format=json", "hydra.run.dir=elsewhere",
        "optimizer.decay_shape=linear", "optimizer.min_lr_ratio=0.0", "hydra/launcher=basic",
        "trainer.batch_size=1", "trainer.grad_accum=2",
    )  # fmt: skip
    config = settled(constant, *overrides)
    assert (config.name, config.trainer.eval_every, config.logger.kind) == ("other", 2, "csv")
    assert (config.optimizer.decay_shape, config.optimizer.min_lr_ratio) == ("linear", 0.0)


def problem_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Trunk.at(str(path)).verify()
    (problem,) = caught.value.problems
    assert problem.startswith(f"--cooldown={path}: ")
    return problem


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trunk", "trunk/checkpoints/step-00000006"),
        ("trunk/checkpoints", "trunk/checkpoints/step-00000006"),
        ("trunk/checkpoints/step-5", "trunk/checkpoints/step-00000006"),
        ("trunk/step-00000006", "trunk/checkpoints/step-00000006"),
        ("trnk/checkpoints/step-00000006", "trunk"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_answered_with_the_nearest(tmp_path, at, typed, meant):
    problem = problem_of(tmp_path / typed)
    assert "must be a checkpoint, a folder RUN/checkpoints/step-…" in problem
    assert problem.endswith(f"did you mean '{tmp_path / meant}'?")


def test_a_file_of_a_checkpoint_names_it(at):
    assert Trunk.at(str(at / "model.safetensors")).folder == at


def test_weights_without_moments_and_a_checkpoint_away_from_its_run_are_refused(tmp_path, at):
    weights = trunk_in(tmp_path / "weights", train_config(optimizer=CONSTANT, save_final="weights"), 15)
    assert "holds weights and no optimizer moments" in problem_of(weights)
    away = shutil.copytree(at, tmp_path / "away" / "checkpoints" / at.name)
    assert "must lie in its run directory" in problem_of(away)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}" + path.read_bytes()[2:])])
def test_a_damaged_checkpoint_is_refused(at, name, damage):
    damage(at / name)
    assert "this checkpoint is damaged: " in problem_of(at)


def change_state(checkpoint: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    change(state["config"])
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_config_of_another_version_is_told(at):
    change_state(at, lambda config: config["optimizer"].update(lookahead=3))
    with pytest.raises(UserError, match=r"its config is of another version:\noptimizer.lookahead: there is no such"):
        Trunk.at(str(at))


def test_where_the_file_system_has_no_hard_links_the_checkpoint_is_copied(tmp_path, at, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("not here")))
    trunk, directory = Trunk.at(str(at)), RunDirectory(tmp_path / "new")
    directory.path.mkdir()
    trunk.begin(directory, trunk.cooled(5))
    found = Checkpoints(directory.checkpoints).to_resume(11, pytest.fail)
    assert (found.step, found.can_resume) == (6, True)
    assert not (found.folder / "model.safetensors").samefile(at / "model.safetensors")
