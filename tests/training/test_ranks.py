"""Two and four ranks train as one process, whether they replicate the masters or share them: one start for all."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tiny import LLAMA, snapshot
from torch import Tensor
from torch.testing import assert_close

from est_cli.model.transformer import Transformer
from est_cli.subnet.memory import count_parameters, sent_bytes
from est_cli.subnet.plan import stage_subnetwork
from est_cli.training.checkpoint import Checkpoints
from tests.training import many_ranks
from tests.training.many_ranks import CASES, CHAIN, RUNS, STREAMED, SmallTokens, alone, mesh_name, on, stream_store
from tests.training.ranks import run_ranks

MESHES = {
    f"{name}-{mesh_name(ranks, shards)}": (name, ranks, shards) for ranks, runs in RUNS.items() for name, shards in runs
}
PACKED = [run for run in MESHES if "masked" not in run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rows = [f"row {i} " * (3 + i % 7) for i in range(60)]
    (folder / "stream.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert run_ranks(4, many_ranks.main, folder) == [0] * 4
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    @cache
    def run(name: str) -> tuple[dict[str, Tensor], list[dict]]:
        training, records = alone(CASES[name], tmp_path_factory.mktemp(name))
        return snapshot(training.model), records

    return run


def seen(folder: Path, run: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{run}-{rank}.json").read_text())


def weights(folder: Path, run: str, model) -> dict[str, Tensor]:
    found = Transformer(model)
    Checkpoints(folder / run).newest(pytest.fail).load_model(found)
    return snapshot(found)


def assert_same_curve(ours: list[dict], theirs: list[dict], tolerance: float = 1e-5) -> None:
    """To the rounding of another order of sums."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        for a, b in zip(ours, theirs, strict=True):
            assert a[key] == pytest.approx(b[key], abs=tolerance), f"{key} of step {a['step']}"


@pytest.mark.parametrize("run", MESHES)
def test_ranks_train_as_one_process_with_the_same_global_batch(folder, expected, run):
    """ddp, fsdp and hsdp; sampled and growing; fp32 and bf16; every loss, every norm, and the weights of the end."""
    name, _, _ = MESHES[run]
    config, (trained, records) = CASES[name], expected(name)
    assert len(records) == config.trainer.max_steps
    tolerance = 1e-5 if config.trainer.precision == "fp32" else 1e-3  # a rounding can flip the last bit of a bf16
    assert_same_curve(seen(folder, run)["records"], records, tolerance)
    assert_close(weights(folder, run, config.model), trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", MESHES)
def test_all_ranks_follow_the_same_plans_and_rank_0_tells(folder, run):
    _, ranks, shards = MESHES[run]
    found = [seen(folder, run, rank) for rank in range(ranks)]
    assert all(rank["plans"] == found[0]["plans"] for rank in found)
    assert len(set(found[0]["plans"])) > 4, "they differ from step to step"
    assert [bool(rank["records"]) for rank in found] == [True] + [False] * (ranks - 1)
    replicas = [json.dumps(found[rank]["weights"]) for rank in range(ranks)]
    assert replicas == replicas[:shards] * (ranks // shards), "replicas hold the same bits"
    assert len(set(replicas)) == shards


@pytest.mark.parametrize("run", MESHES)
def test_a_rank_holds_its_share_of_masters_and_moments(folder, run):
    name, ranks, shards = MESHES[run]
    whole = 12 * count_parameters(CASES[name].model).total
    vectors = 12 * sum(p.numel() for p in Transformer(CASES[name].model, "meta").parameters() if p.dim() == 1)
    for rank in range(ranks):
        assert seen(folder, run, rank)["held_bytes"] == (whole - vectors) // shards + vectors
    if CASES[name].model == LLAMA and shards == 2:
        assert seen(folder, run)["held_bytes"] <= 0.55 * whole


@pytest.mark.parametrize("run", PACKED)
def test_what_travels_is_the_small_model_and_one_message(folder, run):
    """est-plan's sent_bytes, from what was handed to PyTorch's collectives in every step without an evaluation."""
    name, ranks, shards = MESHES[run]
    config, replicas = on(CASES[name], ranks), ranks // shards
    config = replace(config, trainer=replace(config.trainer, shard_size=shards))
    for stage in config.stages:
        step = stage.first_step  # none of them evaluates
        handed = seen(folder, run)["bytes"][step]
        small = stage_subnetwork(config.model, config.sampling, stage).model
        message, whole = handed["all_reduce"][-1], sum(handed["all_reduce"][:-1])
        vectors = sum(p.numel() for p in Transformer(small, "meta").parameters() if p.dim() == 1)
        assert message == 8 * (vectors + 3), "loss, norm, the flag that asks for a stop, and the vectors' gradients"
        sent = 2 * message * (ranks - 1) / ranks + 2 * whole * (replicas - 1) / replicas
        for kind in ("all_gather", "reduce_scatter"):
            sent += sum(handed.get(kind, [])) * (shards - 1) / shards
        assert sent_bytes(config, stage) == pytest.approx(sent, rel=0.1)
        assert (whole == 0) is (replicas == 1)


def test_a_run_goes_on_with_other_ranks_as_if_never_stopped(folder, expected):
    """Two ranks that share, one process, four that replicate, four that share; a growth lies between."""
    trained, records = expected("llama")
    assert_same_curve(seen(folder, "chain")["records"], records[CHAIN[2] :])
    assert_close(weights(folder, "chain", LLAMA), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", MESHES)
def test_the_memory_of_a_stage_ends_with_it(folder, run):
    assert seen(folder, run)["alive"] == 0


def test_a_stream_gives_two_ranks_the_samples_of_one(folder, tmp_path):
    _, records = alone(STREAMED, tmp_path, SmallTokens(stream_store(folder)))
    assert_same_curve(seen(folder, "streamed")["records"], records)
