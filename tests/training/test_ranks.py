"""Two ranks train as one, with whole parameters on each or shared between them; one start of two processes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, RandomTokens, Recorder, snapshot

from est_cli.commands.launcher import launch
from est_cli.config import TrainConfig
from est_cli.model.transformer import Transformer
from est_cli.subnet.memory import count_parameters
from est_cli.subnet.plan import subnetwork
from est_cli.subnet.schedule import stage_at
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World
from est_cli.training.loop import Training
from est_cli.training.shards import Shards
from tests.training.two_ranks import CASES, GROWING, STREAMED, SmallTokens, stream_store

CPU = World(torch.device("cpu"))
PACKED = [name for name in CASES if "masked" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, monkeypatch_module) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    rows = [f"row {i} " * (3 + i % 7) for i in range(60)]
    (folder / "stream.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    monkeypatch_module.setenv("OMP_NUM_THREADS", "1")
    root = Path(__file__).parents[2]
    monkeypatch_module.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
    assert launch(2, ["-m", "tests.training.two_ranks", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as context:
        yield context


def seen(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def alone(config: TrainConfig, tokens, folder: Path) -> tuple[Training, list[dict]]:
    """The same run in this process: the same global batch in more micro-batches."""
    trainer = replace(config.trainer, strategy="single", devices=1, grad_accum=2 * config.trainer.grad_accum)
    recorder = Recorder()
    training = Training(replace(config, trainer=trainer), tokens, CPU, [recorder])
    training.run(Checkpoints(folder), lambda: False)
    return training, recorder.records


def assert_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        for a, b in zip(ours, theirs, strict=True):
            assert a[key] == pytest.approx(b[key], abs=tolerance), f"{key} of step {a['step']}"


def without_speed(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in r.items() if not key.startswith("perf/")} for r in records]


def files(folder: Path, name: str) -> dict[str, bytes]:
    newest = Checkpoints(folder / name).newest(pytest.fail).folder
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_follow_the_same_plans_to_the_same_weights(folder, name):
    ours, theirs = (seen(folder, name, rank) for rank in (0, 1))
    assert ours["plans"] == theirs["plans"]
    assert len(set(ours["plans"])) == 8, "two, five, and the full model"
    assert ours["weights"] == theirs["weights"]
    assert len(ours["weights"]) == len(list(Transformer(CASES[name].model, "meta").parameters()))


def test_only_rank_0_tells(folder):
    assert len(seen(folder, PACKED[0], 0)["records"]) == 15
    assert seen(folder, PACKED[0], 1)["records"] == []


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_with_the_same_global_batch(folder, tmp_path, name):
    config = CASES[name]
    training, records = alone(config, RandomTokens(config.model.vocab_size), tmp_path)
    tolerance = 1e-5 if config.trainer.precision == "fp32" else 1e-3
    assert_close(seen(folder, name)["records"], records, tolerance)
    model = Transformer(config.model)
    Checkpoints(folder / name).newest(pytest.fail).load_model(model)
    for parameter, weight in snapshot(training.model).items():
        torch.testing.assert_close(snapshot(model)[parameter], weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_only_sampled_gradients_travel(folder, name):
    """In fp32, once a step: the small model's parameters and the loss; the flag that asks for a stop comes beside."""
    config = CASES[name]
    for step, sent in enumerate(seen(folder, name)["bytes"]):
        stage = stage_at(config.stages, step)
        small = count_parameters(subnetwork(config.model, config.sampling, stage.rates).model).total
        evaluation = 8 if (step + 1) % 4 == 0 or step == 14 else 0
        assert sent == {"all_reduce": 4 * (small + 1) + 4 + evaluation}, f"step {step}"
    full = count_parameters(config.model).total
    first = seen(folder, name)["bytes"][0]["all_reduce"]
    assert first < 0.6 * 4 * full


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_has_the_bits_of_one_that_is_not(folder, name):
    """Weights, moments, step counts, in files that either can go on from; and everything that is logged."""
    assert files(folder, f"{name}-sharded") == files(folder, name)
    ours, theirs = (seen(folder, case)["records"] for case in (f"{name}-sharded", name))
    assert without_speed(ours) == without_speed(theirs)


def test_a_sharded_run_that_goes_on_has_the_bits_of_an_uninterrupted_one(folder):
    assert [r["step"] for r in seen(folder, "resumed")["records"]] == list(range(6, 15))
    assert files(folder, "resumed") == files(folder, PACKED[0])


@pytest.mark.parametrize("name", CASES)
def test_every_master_and_its_moments_are_on_one_rank_of_a_sharded_run(folder, name):
    config = CASES[name]
    held = [seen(folder, f"{name}-sharded", rank) for rank in (0, 1)]
    assert not held[0]["weights"].keys() & held[1]["weights"].keys()
    assert {**held[0]["weights"], **held[1]["weights"]} == seen(folder, name)["weights"]
    whole = 12 * count_parameters(config.model).total
    assert seen(folder, name)["held_bytes"] == whole == sum(rank["held_bytes"] for rank in held)
    assert max(rank["held_bytes"] for rank in held) < 0.55 * whole


@pytest.mark.parametrize("name", PACKED)
def test_a_sharded_run_sends_no_more_than_slots_gradients_and_norms(folder, name):
    config = CASES[name]
    slot_bytes = 4 if config.trainer.precision == "fp32" else 2
    for step, sent in enumerate(seen(folder, f"{name}-sharded")["bytes"][:3]):
        shape = subnetwork(config.model, config.sampling, stage_at(config.stages, step).rates)
        small = count_parameters(shape.model).total
        n_tensors = len(list(Transformer(shape, "meta").parameters()))
        assert sent == {
            "broadcast": slot_bytes * small,
            "reduce": 4 * small,
            "all_reduce": 4 * (n_tensors + 2),
        }, f"step {step}"


def test_no_rank_holds_more_than_its_share_and_one_large_matrix():
    """TinyLlama's sizes, whose tables are 6% of the model each."""
    tinyllama = replace(LLAMA, n_layers=22, n_heads=32, n_kv_heads=4, d_model=2048, d_ff=5632, vocab_size=32000)
    model = Transformer(replace(tinyllama, head_dim=64), "meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for ranks in (2, 3, 8):
        holders = Shards.of(model, World(CPU.device, 0, ranks), True).holders
        held = [sum(size for name, size in sizes.items() if holders[name] == rank) for rank in range(ranks)]
        assert sum(held) == sum(sizes.values())
        assert max(held) < 1.01 * sum(held) / ranks


def test_a_stream_gives_two_ranks_the_samples_of_one(folder, tmp_path):
    _, records = alone(STREAMED, SmallTokens(stream_store(folder)), tmp_path)
    assert_close(seen(folder, "streamed")["records"], records, 1e-5)


def test_two_ranks_grow_as_one(folder, tmp_path):
    training, records = alone(GROWING, RandomTokens(LLAMA.vocab_size), tmp_path)
    assert_close(seen(folder, "growing")["records"], records, 1e-5)
    assert seen(folder, "growing", 0)["weights"] == seen(folder, "growing", 1)["weights"]
    model = Transformer(LLAMA)
    Checkpoints(folder / "growing").newest(pytest.fail).load_model(model)
    for parameter, weight in snapshot(training.model).items():
        torch.testing.assert_close(snapshot(model)[parameter], weight, rtol=0, atol=1e-5)


def test_a_sharded_run_that_stops_before_its_growth_grows_to_the_same_bits(folder):
    assert files(folder, "growing-sharded") == files(folder, "growing")


def test_one_process_has_nobody_to_share_with():
    model = Transformer(LLAMA, "meta")
    assert not Shards.of(model, CPU, True).is_sharded
