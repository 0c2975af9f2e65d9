"""Checkpoints of a state that ranks share are written beside training, and any number of ranks reads them."""

import json
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch

from est_cli.training.checkpoint import Checkpoints, damage
from est_cli.training.files import checksum
from tests.training import sharded_ranks
from tests.training.sharded_ranks import FACTS, run, state
from tests.training.test_checkpoint import empty, flip_a_bit, names, remove, silent, truncate

FILES = [
    "checksums.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Checkpoints of two ranks: step 3, and after two that found no room, step 7."""
    folder = tmp_path_factory.mktemp("sharded") / "two"
    assert run((2,), folder, sharded_ranks.save_and_go_on, sharded_ranks.no_room) == [0, 0]
    return folder


def assert_loads(folder: Path, seed: int) -> None:
    """In one process."""
    found = Checkpoints(folder).newest(silent)
    for load, expected, other in zip(
        (found.load_weights, found.load_moments), state(seed), state(seed + 1), strict=True
    ):
        load(other)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.items())


def as_before(folder: Path) -> None:
    """Put the tensors in the order of the parameters, as est-cli wrote them before the library did."""
    for name, tensors in zip(("model.safetensors", "optimizer.safetensors"), state(1), strict=True):
        header, content = {}, b""
        for key, tensor in tensors.items():
            data = tensor.contiguous().numpy().tobytes()
            kind = "F32" if tensor.is_floating_point() else "I64"
            offsets = [len(content), len(content) + len(data)]
            header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
            content += data
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        written = struct.pack("<Q", len(encoded)) + encoded + content
        assert written != (folder / name).read_bytes()
        (folder / name).write_bytes(written)
    checksums = {name: checksum(folder / name) for name in names(folder) if name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps(checksums))


def test_two_ranks_write_their_parts_and_one_process_reads_them(two):
    assert names(two) == ["step-00000003", "step-00000007"]
    newest = Checkpoints(two).newest(silent)
    assert (newest.step, newest.can_resume, newest.state["val_loss"]) == (7, True, 2.5)
    assert_loads(two, seed=7)


def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(two, tmp_path):
    shutil.copytree(two / "step-00000003", tmp_path / "step-00000003")
    assert_loads(tmp_path, seed=3)


def test_files_are_safetensors_and_json_and_nothing_else(two):
    folder = two / "step-00000007"
    assert names(folder) == FILES
    assert sorted(json.loads((folder / "checksums.json").read_text())) == FILES[1:]
    for name in FILES[1:5]:
        content = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        offsets = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        assert offsets.keys() == header.keys()
        for tensor, entry in header.items():
            if entry["dtype"] == "F32" and len(entry["shape"]) == 2:
                assert entry["shape"][1] == 4, "half of the columns"
                assert offsets[tensor]["saved_offsets"] == [0, 4 * int("00002-of" in name)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, remove, empty])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(two, tmp_path, harm, name):
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(two, folder)
    harm(folder / "step-00000007", name)
    assert Checkpoints(folder).newest(said.append).step == 3
    assert len(said) == 1 and "step-00000007" in said[0] and name in said[0]


def test_another_model_is_refused(two):
    found = Checkpoints(two).newest(silent)
    weights = state(0)[0]
    with pytest.raises(ValueError, match=r"differ in \['b.0.norm'\]"):
        found.load_weights({name: tensor for name, tensor in weights.items() if name != "b.0.norm"})
    with pytest.raises(ValueError, match=r"b.0.norm has shape \(8,\), expected \(9,\)"):
        found.load_weights({**weights, "b.0.norm": torch.zeros(9)})


def test_another_run_adopts_all_parts_as_links(two, tmp_path):
    Checkpoints(tmp_path / "other").adopt(two / "step-00000007")
    folder = tmp_path / "other" / "step-00000007"
    assert damage(folder) is None
    assert all((folder / name).samefile(two / "step-00000007" / name) for name in FILES)
    assert_loads(tmp_path / "other", seed=7)


def test_four_ranks_and_two_replicas_go_on_from_two_ranks_and_from_one_process(two, tmp_path):
    shutil.copytree(two, tmp_path / "all" / "two")
    Checkpoints(tmp_path / "all" / "one").save(5, *state(1), FACTS)
    as_before(tmp_path / "all" / "one" / "step-00000005")
    assert_loads(tmp_path / "all" / "one", seed=1)
    assert run((2, 2), tmp_path / "all", sharded_ranks.load_both_forms) == [0, 0, 0, 0]
    assert_loads(tmp_path / "all" / "four", seed=8)
    assert run((2, 1), tmp_path / "all", sharded_ranks.only_load) == [0, 0]


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    assert run((2,), tmp_path / "killed", sharded_ranks.killed) == [0, -signal.SIGKILL]
    assert names(tmp_path / "killed") == [".writing-step-00000009", "step-00000003"]
    assert_loads(tmp_path / "killed", seed=3)
