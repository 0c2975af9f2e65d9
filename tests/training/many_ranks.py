"""What each rank does for test_ranks.py: two of them together, then one process, then four.

Every case is a whole run of the training loop on one mesh. FOLDER/CASE-MESH gets its checkpoints,
FOLDER/CASE-MESH-RANK.json what the rank saw: the plans, the bytes that it handed to each kind of collective in every
step, what it holds, and the records.
"""

import gc
import hashlib
import json
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import GPT2, LLAMA, RandomTokens, Recorder, train_config

from est_cli.config import DataConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig
from est_cli.data import streams
from est_cli.data.tokens import open_store
from est_cli.subnet.schedule import StageSpec
from est_cli.training import inputs
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import Peers, World, _mesh, join, leave
from est_cli.training.loop import Training
from tests.training.runs import CPU

SEQUENCES = 8
"""Of a step, on any number of ranks."""
GROWING = SchedulerConfig(
    (
        StageSpec(4, 0.5, 0.5, 0.5, n_layers=2, n_heads=2),
        StageSpec(8, 0.5, 0.5, n_layers=2),
        StageSpec(12, 1.0, 0.5),
        StageSpec(),
    ),
    "interleave",
)
"""Heads join at step 4, and at 8 a layer in the middle; the last three steps train everything."""


def case(model, precision: str, unsampled: str, kernels: str = "torch", **trainer) -> TrainConfig:
    optimizer = OptimizerConfig(lr=3e-3, unsampled=unsampled, grad_clip=0.5)
    options = {"max_steps": 9, "eval_every": 7, "eval_tokens": 40, "save_final": "full", **trainer}
    return train_config(model, None, optimizer, kernels=kernels, precision=precision, **options)


CASES = {
    "llama": replace(case(LLAMA, "fp32", "zero_grad", max_steps=15), scheduler=GROWING),
    "gpt2-freeze-recompute": case(GPT2, "fp32", "freeze", recompute="block"),
    "llama-bf16-freeze": case(LLAMA, "bf16", "freeze"),
    "gpt2-bf16": case(GPT2, "bf16", "zero_grad"),
    "masked": case(LLAMA, "fp32", "zero_grad", "masked"),
    "masked-bf16": case(GPT2, "bf16", "freeze", "masked"),
}
STREAMED = case(LLAMA, "fp32", "zero_grad")
CHAIN = (3, 6, 9)
"""Steps after which a run of `llama` stops, to go on with other ranks: 1x2, one process, 4x1, 1x4."""
RUNS = {
    2: [("llama", 1), ("gpt2-freeze-recompute", 2), ("llama-bf16-freeze", 2), ("masked", 1),
        ("masked-bf16", 2)],
    4: [("llama", 2), ("llama", 4), ("gpt2-bf16", 4)],
}  # fmt: skip
"""Cases, and how many ranks share the masters, by the number of ranks."""


def mesh_name(ranks: int, shards: int) -> str:
    return f"{ranks // shards}x{shards}"


def on(config: TrainConfig, ranks: int, batch_size: int = 1) -> TrainConfig:
    """The same run on `ranks` ranks, with the same sequences in a step."""
    numbers = {"devices": ranks, "batch_size": batch_size, "grad_accum": SEQUENCES // ranks // batch_size}
    return replace(config, trainer=replace(config.trainer, strategy="ddp", **numbers))


def stream_store(folder: Path):
    """A stream that must be read further than was written of it; see tests/data/test_stream.py."""
    streams.VAL_BYTES, streams.SHARD_TOKENS = 600, 300
    file = folder / "stream.jsonl"
    data = DataConfig(kind="hf", path=str(file), streaming=True, cache_dir=str(folder / "cache"), seq_len=8)
    return open_store(data, TokenizerConfig("byte"), 512, lambda _: None, False)


COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter",
}  # fmt: skip
"""PyTorch's collectives, under the names of old and new versions."""


class Seen:
    """The plan and the traffic of each step of a run."""

    def __init__(self):
        self.plans: list[str] = []
        self.bytes: list[dict[str, list[int]]] = []
        self.sample, inputs.sample = inputs.sample, self._sample
        for name in COLLECTIVES.keys() & vars(dist).keys():
            self.watch(name)

    def _sample(self, *arguments):
        plan = self.sample(*arguments)
        self.plans.append(hashlib.sha256(json.dumps(plan.as_dict()).encode()).hexdigest())
        self.bytes.append({})
        return plan

    def watch(self, name: str) -> None:
        collective = getattr(dist, name)

        def counted(*tensors, **options):
            if self.bytes:
                given = [*tensors, *(t for t in options.values() if isinstance(t, torch.Tensor))]
                largest = max(t.nbytes for t in given if isinstance(t, torch.Tensor))
                self.bytes[-1].setdefault(COLLECTIVES[name], []).append(largest)
            return collective(*tensors, **options)

        setattr(dist, name, counted)


def run(name: str, config: TrainConfig, tokens, world: World, seen: Seen, folder: Path, stop_after: int = 99) -> None:
    """Run from the start, or from the newest checkpoint in FOLDER/NAME, to the end or to step `stop_after`."""
    seen.plans, seen.bytes, subnets = [], [], []
    training, recorder = begin(config, tokens, world, folder / name)
    build = training._build

    def built(stage):
        subnet = build(stage)
        subnets.append(weakref.ref(subnet.module))
        return subnet

    training._build = built
    # The ranks agree in the middle of a step.
    training.run(Checkpoints(folder / name), lambda: training.step + 1 >= stop_after)
    gc.collect()
    masters = {name: p.detach() for name, p in training.model.named_parameters()}
    moments = [t for t in training.optimizer.state().values() if t.dtype == torch.float32]
    found = {
        "plans": seen.plans,
        "bytes": seen.bytes,
        "held_bytes": sum(t.nbytes for t in (*masters.values(), *moments)),
        "weights": {name: hashlib.sha256(p.numpy().tobytes()).hexdigest() for name, p in masters.items()},
        "records": recorder.records,
        "alive": sum(module() is not None for module in subnets),
    }
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(found))


def begin(config: TrainConfig, tokens, world: World, folder: Path) -> tuple[Training, Recorder]:
    """A run at its start, or at its newest checkpoint in `folder`."""
    recorder = Recorder()
    training = Training(config, tokens, world, [recorder])
    if (found := Checkpoints(folder).newest(pytest.fail)) is not None:
        training.restore(found)
    return training, recorder


def alone(config: TrainConfig, folder: Path, tokens=None, stop_after: int = 99) -> tuple[Training, list[dict]]:
    """The same run in one process."""
    config = on(config, 1)
    config = replace(config, trainer=replace(config.trainer, strategy="single"))
    training, recorder = begin(config, tokens or RandomTokens(config.model.vocab_size), CPU, folder)
    training.run(Checkpoints(folder), lambda: training.step >= stop_after)
    return training, recorder.records


def together(size: int, rank: int, store: dist.Store, seen: Seen, folder: Path) -> None:
    """All runs with `size` ranks."""
    peers = Peers(rank, size, dist.PrefixStore(str(size), store))
    world = join("cpu", peers)
    worlds = {n: replace(world, mesh=_mesh("cpu", size, n, timedelta(minutes=2))) for n in {1, 2, size}}
    for name, shards in RUNS[size]:
        tokens = RandomTokens(CASES[name].model.vocab_size)
        run(f"{name}-{mesh_name(size, shards)}", on(CASES[name], size), tokens, worlds[shards], seen, folder)
    tokens = RandomTokens(LLAMA.vocab_size)
    if size == 2:
        run("chain", on(CASES["llama"], 2), tokens, worlds[2], seen, folder, CHAIN[0])
        store = peers.agree("stream", lambda: stream_store(folder), main_first=True)
        run("streamed", on(STREAMED, 2, 2), SmallTokens(store), worlds[2], seen, folder)
    else:
        run("chain", on(CASES["llama"], 4), tokens, worlds[1], seen, folder, CHAIN[2])
        run("chain", on(CASES["llama"], 4, 2), tokens, worlds[4], seen, folder)
    leave()


def main(rank: int, store: dist.Store, folder: Path) -> None:
    """Two of the four ranks begin, rank 0 continues their run by itself, and then all four do."""
    seen = Seen()
    if rank < 2:
        together(2, rank, store, seen, folder)
    if rank == 0:
        alone(CASES["llama"], folder / "chain", stop_after=CHAIN[1])
    together(4, rank, store, seen, folder)


class SmallTokens:
    """A store of bytes that folds them into the tiny vocabulary."""

    def __init__(self, store):
        self.store, self.val = store, np.asarray(store.val) % LLAMA.vocab_size

    @property
    def train(self):
        return self

    def windows(self, seq_len: int, seed: int, first: int, count: int) -> np.ndarray:
        return self.store.train.windows(seq_len, seed, first, count) % LLAMA.vocab_size
