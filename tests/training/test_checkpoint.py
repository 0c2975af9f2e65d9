"""Checkpoints round-trip bit for bit, and a damaged one is noticed, named and passed over.

In both forms: as one process writes them, and as ranks that share the state do; any number of ranks reads either.
test_loop.py continues runs from them.
"""

import errno
import json
import math
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from est_cli.errors import UserError
from est_cli.training.checkpoint import Checkpoint, Checkpoints
from tests.training import sharded_ranks
from tests.training.sharded_ranks import FACTS, run, state

WHOLE = ["checksums.json", "model.safetensors", "optimizer.safetensors", "state.json"]
PARTS = [
    "checksums.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json",
]  # fmt: skip


def saved(folder: Path, *steps: int, facts: dict | None = None, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **{"keep": 10, **options})
    for step in steps:
        checkpoints.save(step, *state(step), facts or FACTS)
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_highest_step_not_the_last_name_or_the_last_written(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").newest(pytest.fail) is None
    (tmp_path / "notes.txt").write_text("something else")
    assert Checkpoints(tmp_path).newest(pytest.fail) is None
    checkpoints = saved(tmp_path, 20, 99_999_999, 100_000_000)
    os.utime(tmp_path / "step-00000020")
    assert checkpoints.newest(pytest.fail).step == 100_000_000


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({"keep": 2}, [40, 50]),
        ({"keep": 1, "lasting": frozenset({10, 30})}, [10, 30, 50]),
        ({"keep": 1, "keep_best": True}, [20, 50]),
    ],
    ids=["the newest", "lasting steps", "the best"],
)
def test_some_of_all_checkpoints_stay(tmp_path, options, stay):
    """Step 50 was not evaluated: its loss is step 45's."""
    for step, loss, val_step in ((10, 3.0, 10), (20, 1.0, 20), (30, 2.0, 30), (40, math.nan, 40), (50, 0.5, 45)):
        checkpoints = saved(tmp_path, step, facts={"val_loss": loss, "val_step": val_step}, **options)
    assert names(tmp_path) == [f"step-{step:08d}" for step in stay]
    assert checkpoints.newest(pytest.fail).step == 50


def test_a_checkpoint_that_was_just_written_is_never_dropped_for_a_damaged_one(tmp_path):
    """Step 20 is damaged, the run goes on from 10, and is stopped at 15."""
    saved(tmp_path, 10, 20)
    truncate(tmp_path / "step-00000020" / "model.safetensors")
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


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_half_of_one(tmp_path):
    saved(tmp_path, 10)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            saved(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno == errno.EFBIG
    assert names(tmp_path) == ["step-00000010"]
    assert Checkpoints(tmp_path).newest(pytest.fail).step == 10


def test_a_run_with_steps_to_go_passes_over_checkpoints_that_hold_only_weights(tmp_path):
    """A run with trainer.save_final=weights was killed before its summary, and is started again with more steps."""
    checkpoints, said = saved(tmp_path, 10), []
    folder = checkpoints.save(15, state(15)[0], None, FACTS)
    assert names(folder) == ["checksums.json", "model.safetensors", "state.json"]
    assert not checkpoints.newest(pytest.fail).can_resume
    assert checkpoints.to_resume(15, pytest.fail).step == 15
    assert checkpoints.to_resume(20, said.append).step == 10
    assert len(said) == 1 and "step-00000015: holds only weights" in said[0]
    shutil.rmtree(tmp_path / "step-00000010")
    with pytest.raises(UserError, match="no checkpoint of this run can be continued"):
        checkpoints.to_resume(20, said.append)


def test_a_checkpoint_says_which_code_wrote_it(tmp_path):
    code = {"commit": "0123abc", "dirty": False}
    found = saved(tmp_path, 7, facts={**FACTS, "config": {"seed": 3}}, code=code).newest(pytest.fail).state
    assert (found["code"], found["config"]) == (code, {"seed": 3})
    assert set(found["versions"]) == {"est_cli", "torch", "numpy"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def holding(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


def changing(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


HARMS = [
    *((form, name, harm) for form, files in (("whole", WHOLE), ("parts", PARTS)) for name in files
      for harm in (truncate, flip_a_bit, Path.unlink, empty)),
    *(("whole", name, holding(text)) for name in ("state.json", "checksums.json")
      for text in ("[]", "{}", '{"step": 7}', "5", "null")),
    ("whole", "state.json", changing('"train_s": 1.5', '"train_s": 2.5')),
    ("whole", "state.json", changing('"step": 7', '"step": 8')),
]  # fmt: skip


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of steps 3 and 7, of one process and of two ranks; the ranks found no room in between."""
    folder = tmp_path_factory.mktemp("forms")
    saved(folder / "whole", 3, 7)
    assert run((1, 2), folder / "parts", sharded_ranks.save_and_go_on, sharded_ranks.no_room) == [0, 0]
    return {name: folder / name for name in ("whole", "parts")}


@pytest.mark.parametrize(("form", "name", "harm"), HARMS)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(forms, tmp_path, form, name, harm):
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(forms[form], folder)
    harm(folder / "step-00000007" / name)
    assert Checkpoints(folder).newest(said.append).step == 3
    assert len(said) == 1 and "step-00000007" in said[0]
    assert name in said[0] or harm not in (truncate, flip_a_bit, Path.unlink, empty)


def test_half_a_folder_is_no_checkpoint(tmp_path):
    """A process that died while it wrote leaves .writing-…, which nothing reads and the next save replaces."""
    checkpoints = saved(tmp_path, 10)
    half = tmp_path / ".writing-step-00000020"
    (tmp_path / "step-00000010").rename(half)
    assert checkpoints.newest(pytest.fail) is None
    (half / "state.json").unlink()
    saved(tmp_path, 20)
    assert names(tmp_path) == ["step-00000020"]
    assert checkpoints.newest(pytest.fail).step == 20


def test_a_run_whose_checkpoints_are_all_damaged_refuses_to_start_over(tmp_path):
    checkpoints, said = saved(tmp_path, 10, 20), []
    truncate(tmp_path / "step-00000010" / "model.safetensors")
    (tmp_path / "step-00000020" / "state.json").unlink()
    with pytest.raises(UserError, match=r"(?s)step-00000020.*step-00000010") as error:
        checkpoints.newest(said.append)
    assert len(error.value.problems) == 3


def header(path: Path) -> dict:
    """The JSON at the start of a .safetensors file."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def test_files_hold_tensors_only_in_a_fixed_order(forms, tmp_path):
    """safetensors without metadata, JSON, and nothing that runs code when it is read; readable as any file is."""
    folders = [forms["whole"] / "step-00000007", saved(tmp_path, 7).newest(pytest.fail).folder]
    (tmp_path / "any").touch()
    for folder in folders:
        assert names(folder) == WHOLE
        for name in WHOLE[1:3]:
            assert all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in header(folder / name).values())
        assert sorted(json.loads((folder / "checksums.json").read_text())) == WHOLE[1:]
        assert {(folder / name).stat().st_mode for name in WHOLE} == {(tmp_path / "any").stat().st_mode}
    for name in WHOLE[1:3]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_ranks_write_safetensors_and_json_and_nothing_else(forms):
    folder = forms["parts"] / "step-00000007"
    assert names(folder) == PARTS
    assert sorted(json.loads((folder / "checksums.json").read_text())) == PARTS[1:]
    for name in PARTS[1:5]:
        tensors = header(folder / name)
        offsets = json.loads(tensors.pop("__metadata__")["DCP_SHARDING_INFO"])
        assert offsets.keys() == tensors.keys()
        for tensor, entry in tensors.items():
            if entry["dtype"] == "F32" and len(entry["shape"]) == 2:
                assert entry["shape"][1] == 4, "half of the columns"
                assert offsets[tensor]["saved_offsets"] == [0, 4 * int("00002-of" in name)]


@pytest.mark.parametrize("form", ["whole", "parts"])
def test_a_checkpoint_of_another_model_is_refused(forms, form):
    found, weights = Checkpoints(forms[form]).newest(pytest.fail), state(0)[0]
    with pytest.raises(ValueError, match=r"differ in \['b.0.norm'\]"):
        found.load_weights({name: tensor for name, tensor in weights.items() if name != "b.0.norm"})
    with pytest.raises(ValueError, match=r"b.0.norm has shape \(8,\), expected \(9,\)"):
        found.load_weights({**weights, "b.0.norm": torch.zeros(9)})


def assert_loads(folder: Path, seed: int) -> None:
    """In one process, the newest is the state of this seed."""
    found = Checkpoints(folder).newest(pytest.fail)
    states = zip(state(seed), state(seed + 1), strict=True)
    for load, (expected, other) in zip((found.load_weights, found.load_moments), states, strict=True):
        load(other)
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("form", "files"), [("whole", WHOLE), ("parts", PARTS)])
def test_every_bit_comes_back_in_one_process_also_in_a_run_that_adopts_the_files_as_links(forms, tmp_path, form, files):
    """Each holds the state of its step though training went on."""
    assert names(forms[form]) == ["step-00000003", "step-00000007"]
    newest = Checkpoints(forms[form]).newest(pytest.fail)
    assert (newest.step, newest.can_resume, newest.state["val_loss"]) == (7, True, 2.5)
    for step in (3, 7):
        folder = forms[form] / f"step-{step:08d}"
        Checkpoints(tmp_path / str(step)).adopt(Checkpoint(folder))
        adopted = tmp_path / str(step) / folder.name
        assert Checkpoint(adopted).damage() is None
        assert all((adopted / name).samefile(folder / name) for name in files)
        assert_loads(tmp_path / str(step), seed=step)


def test_four_ranks_and_two_replicas_go_on_from_two_ranks_and_from_one_process(forms, tmp_path):
    shutil.copytree(forms["parts"], tmp_path / "all" / "two")
    Checkpoints(tmp_path / "all" / "one").save(5, *state(1), FACTS)
    assert run((2, 2), tmp_path / "all", sharded_ranks.load_both_forms) == [0, 0, 0, 0]
    assert_loads(tmp_path / "all" / "four", seed=8)
    assert run((2, 1), tmp_path / "all", sharded_ranks.only_load) == [0, 0]


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    assert run((1, 2), tmp_path / "killed", sharded_ranks.killed) == [0, -signal.SIGKILL]
    assert names(tmp_path / "killed") == [".writing-step-00000009", "step-00000003"]
    assert_loads(tmp_path / "killed", seed=3)
