"""Checkpoints round-trip bit for bit, and a damaged one is noticed, named and passed over."""

import errno
import json
import math
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from tiny import GPT2, LLAMA, random_batch, random_master, snapshot, train_config

from est_cli.config import OptimizerConfig
from est_cli.errors import UserError
from est_cli.model.transformer import Transformer
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.sampler import sample
from est_cli.subnet.schedule import Rates, Stage
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import PackedSubnetwork

FACTS = {"train_s": 1.5, "val_loss": 2.5}
FILES = ["checksums.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def trained(seed: int = 0) -> tuple[Transformer, SampledAdamW]:
    """A model after a few steps that froze rows: its moments and step counts differ from row to row."""
    model = random_master(LLAMA, torch.float32, seed)
    optimizer = SampledAdamW(model, OptimizerConfig(unsampled="freeze"))
    config, rates = train_config(LLAMA), Rates(0.5, 0.5, 0.5)
    subnet = PackedSubnetwork(model, subnetwork(LLAMA, config.sampling, rates), torch.float32)
    for step in range(3):
        subnet.load(sample(seed, step, Stage(1, 0, 3, rates), LLAMA, config.sampling))
        subnet.loss(*random_batch(LLAMA, seed=step)).backward()
        optimizer.step(subnet.updates(), 1e-3)
    return model, optimizer


def state(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, optimizer = trained(seed)
    return snapshot(model), optimizer.state()


def saved(folder: Path, *steps: int, keep: int = 10) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *state(step), FACTS)
    return checkpoints


def silent(message: str) -> None:
    raise AssertionError(f"nothing should be said: {message}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_moments_and_counts_come_back_bit_for_bit(tmp_path):
    model, optimizer = trained()
    Checkpoints(tmp_path).save(7, snapshot(model), optimizer.state(), FACTS)
    found = Checkpoints(tmp_path).newest(silent)
    other_model, other_optimizer = trained(seed=1)
    found.load_model(other_model)
    found.load_moments(other_optimizer.state())
    assert (found.step, found.can_resume, found.state["val_loss"]) == (7, True, 2.5)
    expected, moments = snapshot(model), optimizer.state()
    assert len({count.item() for name, counts in moments.items() if "counts" in name for count in counts}) > 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(other_model).items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in other_optimizer.state().items())


def test_a_restored_optimizer_takes_the_same_next_step(tmp_path):
    model, optimizer = trained()
    Checkpoints(tmp_path).save(3, snapshot(model), optimizer.state(), FACTS)
    other_model, other_optimizer = trained(seed=1)
    found = Checkpoints(tmp_path).newest(silent)
    found.load_model(other_model)
    found.load_moments(other_optimizer.state())
    for m, o in ((model, optimizer), (other_model, other_optimizer)):
        subnet = PackedSubnetwork(m, subnetwork(LLAMA, train_config().sampling, Rates()), torch.float32)
        subnet.load(sample(0, 3, Stage(2, 3, 4, Rates()), LLAMA, train_config().sampling))
        subnet.loss(*random_batch(LLAMA)).backward()
        o.step(subnet.updates(), 1e-3)
    expected = snapshot(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(other_model).items())


def test_weights_alone_cannot_resume(tmp_path):
    folder = Checkpoints(tmp_path).save(7, state()[0], None, FACTS)
    assert names(folder) == ["checksums.json", "model.safetensors", "state.json"]
    assert not Checkpoints(tmp_path).newest(silent).can_resume


def test_there_may_be_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").newest(silent) is None
    (tmp_path / "notes.txt").write_text("something else")
    assert Checkpoints(tmp_path).newest(silent) is None


def test_the_newest_is_the_highest_step_not_the_last_name_or_the_last_written(tmp_path):
    checkpoints = saved(tmp_path, 20, 99_999_999, 100_000_000)
    os.utime(tmp_path / "step-00000020")
    assert checkpoints.newest(silent).step == 100_000_000


def test_only_the_newest_stay(tmp_path):
    saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_the_best_stays_too_where_that_is_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, math.nan)):
        checkpoints.save(step, *state(step), {"val_loss": loss, "val_step": step})
    # The loss of another step says nothing of this one.
    checkpoints.save(50, *state(50), {"val_loss": 0.5, "val_step": 45})
    assert names(tmp_path) == ["step-00000020", "step-00000050"]
    assert checkpoints.newest(silent).step == 50


def test_those_at_lasting_steps_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, lasting=frozenset({10, 30}))
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, *state(step), FACTS)
    assert names(tmp_path) == ["step-00000010", "step-00000030", "step-00000050"]


def test_a_checkpoint_that_was_just_written_is_never_dropped_for_a_damaged_one(tmp_path):
    """Step 20 is damaged, the run goes on from 10, and is stopped at 15."""
    saved(tmp_path, 10, 20)
    truncate(tmp_path / "step-00000020", "model.safetensors")
    checkpoints = saved(tmp_path, 15, keep=1)
    assert checkpoints.newest(lambda message: None).step == 15


def test_a_process_that_dies_while_it_removes_a_checkpoint_leaves_no_half_of_one(tmp_path, monkeypatch):
    def die(path, **_):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("est_cli.training.checkpoint.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 10, 20, keep=1)
    assert names(tmp_path) == [".dropped-step-00000010", "step-00000020"]
    saved(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]


def full_disk(tensors, path):
    path.write_bytes(b"the first bytes")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoints_of_before_and_no_half_of_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 10, 20)
    monkeypatch.setattr("est_cli.training.checkpoint.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path, 30)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert checkpoints.newest(silent).step == 20


def test_weights_alone_are_passed_over_by_a_run_that_has_steps_to_go(tmp_path):
    """A run with trainer.save_final=weights was killed before its summary, and is started again with more steps."""
    checkpoints, said = saved(tmp_path, 10), []
    checkpoints.save(15, state()[0], None, FACTS)
    assert checkpoints.to_resume(15, silent).step == 15
    assert checkpoints.to_resume(20, said.append).step == 10
    assert len(said) == 1 and "step-00000015: holds weights alone" in said[0]
    shutil.rmtree(tmp_path / "step-00000010")
    with pytest.raises(UserError, match="no checkpoint of this run can be continued"):
        checkpoints.to_resume(20, said.append)


def test_a_checkpoint_says_which_code_wrote_it(tmp_path):
    code = {"commit": "0123abc", "dirty": False}
    Checkpoints(tmp_path, code=code).save(7, *state(), {**FACTS, "config": {"seed": 3}})
    found = Checkpoints(tmp_path).newest(silent).state
    assert (found["code"], found["config"]) == (code, {"seed": 3})
    assert set(found["versions"]) == {"est_cli", "torch", "numpy"}


def truncate(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def flip_a_bit(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0x80
    (folder / name).write_bytes(content)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, empty])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage, name):
    checkpoints, said = saved(tmp_path, 10, 20), []
    damage(tmp_path / "step-00000020", name)
    assert checkpoints.newest(said.append).step == 10
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert name in said[0]


@pytest.mark.parametrize("key", ["train_s", "step"])
def test_a_changed_digit_in_the_state_is_noticed(tmp_path, key):
    checkpoints, said = saved(tmp_path, 10, 20), []
    path = tmp_path / "step-00000020" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(path.read_text().replace(f'"{key}": {state[key]}', f'"{key}": {state[key] + 1}'))
    assert checkpoints.newest(said.append).step == 10
    assert "step-00000020" in said[0]


@pytest.mark.parametrize("name", ["state.json", "checksums.json"])
@pytest.mark.parametrize("content", ["[]", "{}", '{"step": 20}', "5", "null"])
def test_json_that_says_something_else_is_damage(tmp_path, content, name):
    checkpoints, said = saved(tmp_path, 10, 20), []
    (tmp_path / "step-00000020" / name).write_text(content)
    assert checkpoints.newest(said.append).step == 10
    assert "step-00000020" in said[0]


def test_half_a_folder_is_no_checkpoint(tmp_path):
    """A process that died while it wrote leaves .writing-…, which nothing reads and the next save replaces."""
    checkpoints = saved(tmp_path, 10)
    half = tmp_path / ".writing-step-00000020"
    (tmp_path / "step-00000010").rename(half)
    assert checkpoints.newest(silent) is None
    remove(half, "state.json")
    saved(tmp_path, 20)
    assert names(tmp_path) == ["step-00000020"]
    assert checkpoints.newest(silent).step == 20


def test_where_all_are_damaged_the_run_refuses_to_start_over(tmp_path):
    checkpoints, said = saved(tmp_path, 10, 20), []
    truncate(tmp_path / "step-00000010", "model.safetensors")
    remove(tmp_path / "step-00000020", "state.json")
    with pytest.raises(UserError) as error:
        checkpoints.newest(said.append)
    assert len(error.value.problems) == 3
    assert "step-00000010" in str(error.value)
    assert "step-00000020" in str(error.value)


def test_files_hold_tensors_only_in_a_fixed_order(tmp_path):
    """safetensors without metadata, JSON, and nothing that runs code when it is read."""
    folders = [saved(tmp_path / name, 10).newest(silent).folder for name in ("a", "b")]
    for folder in folders:
        assert names(folder) == FILES
        for name in FILES[1:3]:
            content = (folder / name).read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            assert "__metadata__" not in header
            assert all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in header.values())
        assert set(json.loads((folder / "state.json").read_text())) >= {"step", "versions"}
        assert sorted(json.loads((folder / "checksums.json").read_text())) == FILES[1:]
    for name in FILES[1:3]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_others_may_read_what_they_may_read_of_any_file(tmp_path, name):
    """The library would let only the owner."""
    folder = saved(tmp_path, 10).newest(silent).folder
    (tmp_path / "any").touch()
    assert (folder / name).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_what_the_disk_refuses_is_an_error_of_the_system(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            saved(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    found = saved(tmp_path, 10).newest(silent)
    with pytest.raises(ValueError, match="differ in"):
        found.load_model(random_master(GPT2, torch.float32))
