"""A run continues with the config that it had; what may change, and what is said of what may not."""

import contextlib
import shlex
from dataclasses import replace

import pytest
from tiny import train_config

from est_cli.composition.typed_text import as_typed, parse
from est_cli.config import LoggerConfig, OptimizerConfig
from est_cli.errors import UserError
from est_cli.runs.directory import RunDirectory, continue_command
from est_cli.subnet.schedule import StageSpec
from tests.training import runs

IN_STEPS = (StageSpec(4, 0.5, 0.5, 0.5), StageSpec(9, 0.5, 0.5), StageSpec())
STEADY = OptimizerConfig(warmup=3, decay_steps=12)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "run")


def begun(directory: RunDirectory, config) -> RunDirectory:
    directory.path.mkdir()
    directory.write_config(config)
    return directory


def longer(config, max_steps: int):
    return replace(config, trainer=replace(config.trainer, max_steps=max_steps))


def test_an_equal_config_continues_in_silence_also_from_before_a_key_was_there(directory):
    config = replace(train_config(), run_id="a")
    assert begun(directory, config).check(config) == []
    path = directory.path / "config.yaml"
    path.write_text(path.read_text().replace("  unsampled: zero_grad\n", ""))
    assert "unsampled" not in path.read_text()
    assert directory.check(config) == []
    with pytest.raises(UserError, match=r"optimizer.unsampled: was zero_grad, is freeze \(decides the weights\)"):
        directory.check(replace(config, optimizer=replace(config.optimizer, unsampled="freeze")))


def test_logging_evaluation_and_checkpoints_may_change_and_are_told(directory):
    config = train_config()
    trainer = replace(config.trainer, log_every=5, eval_every=7, checkpoint_every=3, on_nonfinite="skip")
    changed = replace(config, trainer=trainer, logger=LoggerConfig(project="other"))
    said = begun(directory, config).check(changed)
    assert "continues with a changed trainer.eval_every: was 0, is 7" in said
    assert {line.split()[4].rstrip(":") for line in said} == {
        "trainer.log_every", "trainer.eval_every", "trainer.checkpoint_every", "trainer.on_nonfinite",
        "logger.kind", "logger.project",
    }  # fmt: skip


def test_every_key_that_differs_is_listed_with_whether_it_matters(directory):
    config = train_config()
    changed = replace(
        config, seed=3, optimizer=replace(config.optimizer, lr=0.5), trainer=replace(config.trainer, log_every=5)
    )
    with pytest.raises(UserError) as caught:
        begun(directory, config).check(changed)
    assert caught.value.problems[1:] == (
        "optimizer.lr: was 0.0006, is 0.5 (decides the weights)",
        "trainer.log_every: was 1, is 5 (may change)",
        "seed: was 0, is 3 (decides the weights)",
    )


def test_max_steps_may_grow_where_everything_is_given_in_steps(directory):
    config = train_config(optimizer=STEADY, stages=IN_STEPS)
    assert begun(directory, config).check(longer(config, 20)) == [
        "continues with a changed trainer.max_steps: was 15, is 20"
    ]
    with pytest.raises(UserError, match=r"trainer.max_steps: was 15, is 14 \(may grow only\)"):
        directory.check(longer(config, 14))


@pytest.mark.parametrize(
    ("stages", "optimizer", "named"),
    [
        ((StageSpec(0.3, 0.5), StageSpec()), STEADY, "scheduler.stages[0].end=0.3"),
        (IN_STEPS, replace(STEADY, warmup=0.1), "optimizer.warmup=0.1"),
        (IN_STEPS, replace(STEADY, decay_steps=None), "optimizer.decay_steps=null"),
        (IN_STEPS, replace(STEADY, decay_steps=0.9), "optimizer.decay_steps=0.9"),
        (IN_STEPS, replace(STEADY, decay="wsd", decay_steps=5), "optimizer.decay=wsd"),
    ],
)
def test_max_steps_may_not_grow_where_a_fraction_would_change_the_past(directory, stages, optimizer, named):
    config = train_config(optimizer=optimizer, stages=stages)
    with pytest.raises(UserError) as caught:
        begun(directory, config).check(longer(config, 20))
    assert "may grow only where boundaries, warmup and decay are given in steps" in caught.value.problems[1]
    assert named in caught.value.problems[1]


@pytest.mark.parametrize("optimizer", [STEADY, OptimizerConfig(warmup=3, decay="none")], ids=["decay", "no decay"])
def test_a_run_that_grew_has_the_weights_of_one_that_was_as_long_from_the_start(tmp_path, optimizer):
    short = train_config(optimizer=optimizer, stages=IN_STEPS)
    begun(RunDirectory(tmp_path / "run"), short).check(longer(short, 20))

    folder = tmp_path / "parts"
    runs.train(runs.start(short)[0], folder, stop_after=11)
    grown, _ = runs.resumed(longer(short, 20), folder)
    runs.train(grown, folder)
    whole, _ = runs.finished(longer(short, 20), tmp_path / "whole")
    runs.assert_same_bits(grown, whole)


def test_a_finished_run_is_refused_and_told_how_to_train_on(directory):
    config = train_config(optimizer=STEADY, stages=IN_STEPS)
    begun(directory, config).write_summary({"status": "done"})
    with pytest.raises(UserError, match=r"this run is finished .* model.init_from=FOLDER"):
        directory.check(longer(config, 20))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("thesis.tex", b"", "holds other files and no run"),
        (".config.yaml.4711", b"model:", None),  # left by a process that died while it wrote
        *(("config.yaml", content, "config.yaml: is damaged") for content in (b"", b"a: [", b"\xff\xfe", b"5")),
    ],
)
def test_a_folder_that_holds_no_sound_run_is_refused_unless_none_has_begun(directory, file, content, said):
    directory.path.mkdir()
    (directory.path / file).write_bytes(content)
    with contextlib.nullcontext() if said is None else pytest.raises(UserError, match=said):
        assert directory.check(train_config()) == []


def test_a_run_directory_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"hydra.run.dir=.*file/run: cannot be a folder, because .*file is a file"):
        RunDirectory(tmp_path / "file" / "run").check(train_config())


@pytest.mark.parametrize("run_id", ["4711", "12_3", "20261123-163216-5bac", "a.b", "1e5"])
def test_the_command_that_continues_names_the_run_as_hydra_reads_it(run_id):
    command = continue_command(["trainer.max_steps=5"], replace(train_config(), run_id=run_id))
    [typed] = as_typed(shlex.split(command)[-1:])
    override = parse(typed)
    assert (override.key_or_group, override.value()) == ("run_id", run_id)
