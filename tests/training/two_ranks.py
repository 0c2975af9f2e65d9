"""What each of two ranks does for test_ranks.py: `python -m tests.training.two_ranks FOLDER`, started twice.

Every case is a whole run of the training loop. FOLDER/CASE gets its checkpoints, FOLDER/CASE-RANK.json what the rank
saw: the plans, the bytes that it handed to each kind of collective in every step, what it holds, and the records.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny import GPT2, LLAMA, RandomTokens, Recorder, train_config

from est_cli.config import DataConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig
from est_cli.data import streams
from est_cli.data.tokens import prepare
from est_cli.subnet.schedule import StageSpec
from est_cli.training import loop
from est_cli.training.checkpoint import Checkpoints
from est_cli.training.distributed import World, join
from est_cli.training.loop import Training
from est_cli.training.peers import meet

STOP_AFTER = 6
"""In stage 2."""


def case(model, precision: str, unsampled: str, kernels: str = "torch") -> TrainConfig:
    optimizer = OptimizerConfig(lr=3e-3, unsampled=unsampled)
    return train_config(
        model, None, optimizer, kernels=kernels, precision=precision, strategy="ddp", devices=2, batch_size=1,
        grad_accum=2, eval_every=4, eval_tokens=40, save_final="full",
    )  # fmt: skip


CASES = {
    "llama-fp32-zero_grad": case(LLAMA, "fp32", "zero_grad"),
    "gpt2-fp32-freeze": case(GPT2, "fp32", "freeze"),
    "llama-bf16-freeze": case(LLAMA, "bf16", "freeze"),
    "gpt2-bf16-zero_grad": case(GPT2, "bf16", "zero_grad"),
    "llama-fp32-masked": case(LLAMA, "fp32", "zero_grad", "masked"),
}
STREAMED = case(LLAMA, "fp32", "zero_grad")
GROWING = replace(
    case(LLAMA, "fp32", "zero_grad"),
    scheduler=SchedulerConfig(
        (StageSpec(5, n_layers=2, n_heads=2), StageSpec(9, n_layers=2), StageSpec()), "interleave"
    ),
)
"""Heads join at step 5, and at 9 a layer in the middle: layers move, and their copies lie on other ranks."""


def sharded(config: TrainConfig) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, shard=True))


def stream_store(folder: Path):
    """A stream that must be read further than was written of it; see tests/data/test_stream.py."""
    streams.VAL_BYTES, streams.SHARD_TOKENS = 600, 300
    file = folder / "stream.jsonl"
    data = DataConfig(kind="hf", path=str(file), streaming=True, cache_dir=str(folder / "cache"), seq_len=8)
    return prepare(data, TokenizerConfig("byte"), 512, lambda _: None, False)


class Seen:
    """Plans and traffic of a run, a step each."""

    def __init__(self, monkeypatched=loop):
        self.plans: list[str] = []
        self.bytes: list[dict[str, int]] = []
        self.sample = monkeypatched.sample
        monkeypatched.sample = self._sample

    def _sample(self, *arguments):
        plan = self.sample(*arguments)
        self.plans.append(hashlib.sha256(json.dumps(plan.as_dict()).encode()).hexdigest())
        self.bytes.append({})
        return plan

    def watch(self, name: str) -> None:
        collective = getattr(dist, name)

        def counted(tensor, *arguments, **options):
            if self.bytes:
                self.bytes[-1][name] = self.bytes[-1].get(name, 0) + tensor.nbytes
            return collective(tensor, *arguments, **options)

        setattr(dist, name, counted)


def run(name: str, config: TrainConfig, tokens, world: World, seen: Seen, folder: Path, stop_after: int = 99) -> None:
    """A run from the start, or from where FOLDER/NAME stopped."""
    seen.plans, seen.bytes = [], []
    recorder, checkpoints = Recorder(), Checkpoints(folder / name)
    training = Training(config, tokens, world, [recorder])
    found = checkpoints.newest(lambda _: None)
    if found is not None:
        training.restore(found)
    training.run(checkpoints, lambda: training.step >= stop_after)
    masters = {name: p.detach() for name, p in training.model.named_parameters() if not p.is_meta}
    moments = [t for t in training.optimizer.state().values() if t.dtype == torch.float32 and not t.is_meta]
    found = {
        "plans": seen.plans,
        "bytes": seen.bytes,
        "held_bytes": sum(t.nbytes for t in (*masters.values(), *moments)),
        "weights": {name: hashlib.sha256(p.numpy().tobytes()).hexdigest() for name, p in masters.items()},
        "records": recorder.records,
    }
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    peers = meet()
    world, seen = join("cpu", peers), Seen()
    for name in ("all_reduce", "reduce", "broadcast"):
        seen.watch(name)
    for name, config in CASES.items():
        tokens = RandomTokens(config.model.vocab_size)
        run(name, config, tokens, world, seen, folder)
        run(f"{name}-sharded", sharded(config), tokens, world, seen, folder)
    name, config = next(iter(CASES.items()))
    for stop_after in (STOP_AFTER, 99):
        run("resumed", sharded(config), RandomTokens(LLAMA.vocab_size), world, seen, folder, stop_after)
    tokens = RandomTokens(LLAMA.vocab_size)
    run("growing", GROWING, tokens, world, seen, folder)
    for stop_after in (9, 99):
        run("growing-sharded", sharded(GROWING), tokens, world, seen, folder, stop_after)
    store = peers.agree("stream", lambda: stream_store(folder), main_first=True)
    run("streamed", STREAMED, SmallTokens(store), world, seen, folder)


class SmallTokens:
    """A store whose tokens, bytes, are folded into the tiny vocabulary."""

    def __init__(self, store):
        self.store, self.val = store, np.asarray(store.val) % LLAMA.vocab_size

    @property
    def train(self):
        return self

    def windows(self, seq_len: int, seed: int, first: int, count: int) -> np.ndarray:
        return self.store.train.windows(seq_len, seed, first, count) % LLAMA.vocab_size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
