"""Plain configuration becomes frozen dataclasses, or one error that holds every problem."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from tiny import GPT2, LLAMA, train_config

from est_cli.config import TrainConfig, as_plain, read_train_config
from est_cli.errors import UserError
from est_cli.subnet.schedule import Rates, StageSpec


def plain_config(changes: Mapping[str, Any] | None = None, model=LLAMA) -> dict[str, Any]:
    """A valid plain config, with dotted keys set to other values."""
    plain = copy.deepcopy(as_plain(train_config(model)))
    for key, value in (changes or {}).items():
        *path, leaf = key.split(".")
        node = plain
        for name in path:
            node = node[name]
        node[leaf] = value
    return plain


def problems_of(changes: Mapping[str, Any], model=LLAMA) -> list[str]:
    with pytest.raises(UserError) as error:
        read_train_config(plain_config(changes, model))
    return list(error.value.problems)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_config_survives_yaml(model):
    """config.yaml of a run directory is read again by est-eval, and by the run that continues."""
    changes = {"optimizer.lr": 6e-4, "optimizer.eps": 1e-8, "optimizer.warmup": 1.0, "optimizer.decay_steps": 1}
    config = read_train_config(plain_config(changes, model))
    again = read_train_config(yaml.safe_load(yaml.safe_dump(as_plain(config))))
    assert again == config
    assert type(again.optimizer.warmup) is float
    assert type(again.optimizer.decay_steps) is int


@pytest.mark.parametrize(
    ("changes", "value", "expected"),
    [
        ({"model.head_dim": None}, lambda config: config.model.head_dim, LLAMA.d_model // LLAMA.n_heads),
        ({"model.head_dim": 8}, lambda config: config.model.head_dim, 8),
        (
            {"trainer.batch_size": 3, "trainer.grad_accum": 5, "trainer.devices": 2, "trainer.strategy": "ddp"},
            lambda config: (config.sequences_per_step, config.tokens_per_step),
            (30, 30 * 8),
        ),
        ({"trainer.max_steps": "auto", "data.seq_len": "auto"}, lambda config: config.data.seq_len, "auto"),
        ({"name": 47113, "run_id": 7}, lambda config: (config.name, config.run_id), ("47113", "7")),
        (  # a decay that begins where warmup ends, down to nothing
            {"optimizer.decay": "wsd", "optimizer.warmup": 3, "optimizer.decay_steps": 12, "optimizer.min_lr_ratio": 0},
            lambda config: config.optimizer.min_lr_ratio,
            0,
        ),
    ],
)
def test_what_is_read(changes, value, expected):
    assert value(read_train_config(plain_config(changes))) == expected


EVERYTHING_WRONG = {
    "seeed": 1,
    "name": "a/b",
    "kernels": "tritn",
    "model.n_heads": 5,
    "model.n_kv_heads": 3,
    "model.head_dim": None,
    "data.seq_len": 4096,
    "tokenizer.vocab_size": 10**6,
    "sampling.heads": 1.5,
    "sampling.gqa": "grup",
    "optimizer.lr": 0,
    "optimizer.betas": [0.9],
    "optimizer.wight_decay": 0.1,
    "trainer.precision": "fp16",
    "logger.mode": "onlin",
    "logger.tags": ["a", 1],
}


def test_every_problem_is_collected_at_once():
    """Unknown keys, values out of range, items of lists and sizes that clash, over all sections, in one error."""
    problems = problems_of(EVERYTHING_WRONG)
    keys = [re.match(r"[\w.]+", problem)[0] for problem in problems]
    assert sorted(set(keys)) == sorted(set(EVERYTHING_WRONG) - {"model.head_dim"})
    assert len(problems) == len(set(problems))


@pytest.mark.parametrize("other", [{"sampling.gqa": "grup"}, {"sampling.heads": 1.5}, {"trainer.precision": "fp16"}])
def test_boundaries_out_of_order_are_collected_too(other):
    stages = [{"end": 10, "heads": 0.5}, {"end": 5, "heads": 0.5}, {}]
    problems = problems_of({"scheduler.stages": stages, **other})
    assert any(next(iter(other)) in problem for problem in problems)
    assert any("scheduler.stages[1].end=5 is step 5" in problem for problem in problems)


@pytest.mark.parametrize(
    "problem",
    [
        "sampling.heads=0.0: must be a number in (0, 1]",
        "sampling.mlp=1.01: must be a number in (0, 1]",
        "sampling.layers=-0.5: must be a number in (0, 1]",
        "sampling.mlp_block=3: must divide model.d_ff=16",
        "sampling.strategy=randm: must be one of random, prefix, ends, increasing, or the dotted path of a function; "
        "did you mean 'random'?",
        "model.n_kv_heads=4: must divide model.n_heads=6",
        "model=3: must be a mapping with n_layers, ",
        "data.seq_len=17: must be at most model.max_seq_len=16",
        "tokenizer.vocab_size=30: must be at most model.vocab_size=29",
        "trainer.max_steps=0: must be an integer of at least 1 or auto",
        "trainer.max_steps=1.5: must be an integer of at least 1 or auto",
        "trainer.shard=true: is gone; give trainer=fsdp",
        "optimizer.kind=sgd: is gone; leave it out",
        "optimizer.grad_clip=0.0: must be a number above 0 or null",
        "optimizer.unsampled=freze: must be one of zero_grad, freeze; did you mean 'freeze'?",
        "optimizer.decay_fraction=0.0: must be a number in (0, 1]",
        "optimizer.decay_fraction=1.1: must be a number in (0, 1]",
        "optimizer.decay_shape=sqr: must be one of sqrt, linear; did you mean 'sqrt'?",
        "optimizer.decay=wds: must be one of cosine, linear, wsd, none; did you mean 'wsd'?",
        "seed=-1: must be an integer in [0, ",
        f"seed={2**63}: must be an integer in [0, ",
        "run_id=../elsewhere: must be letters, digits",
        "scheduler.stages=[]: must name at least one stage",
        "scheduler.stages=null: must be a list",
        "scheduler.stages=rmp: must be one of ramp, raptr, layer_drop, stacking, or the dotted path of a function",
        "logger.kind=wandbb: must be one of wandb, tensorboard, csv, none, or the dotted path of a class; did you mean "
        "'wandb'?",
    ],
)
def test_a_value_that_cannot_be_is_one_message(problem):
    key, _, value = problem.partition(": ")[0].partition("=")
    (found,) = problems_of({key: yaml.safe_load(value)})
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.n_heads": 5, "model.n_kv_heads": 5}, "model.n_heads=5: must divide model.d_model=12"),
        ({"model.d_model": 18}, "model.n_heads=6: rotary positions need heads of an even width, and these are 3 wide"),
        (
            {"data.kind": "hf", "data.path": "x", "data.streaming": True, "data.train_tokens": 9},
            "data.train_tokens=9: must be null with data.streaming=true; a stream is read once",
        ),
        ({"tokenizer.kind": "hf"}, "tokenizer.path: is missing; must be a tokenizer.json or its folder"),
        ({"data.kind": "text"}, "data.path: is missing; must be a file, folder or glob"),
        (
            {"optimizer.decay": "wsd", "optimizer.warmup": 3, "optimizer.decay_steps": 13},
            "optimizer.decay_steps=13: with optimizer.decay=wsd the decay takes the last 13 of the 15 steps "
            "(trainer.max_steps), and warmup the first 3 (optimizer.warmup=3); together they must be at most 15",
        ),
        (
            {"optimizer.decay": "wsd", "optimizer.warmup": 0.5, "optimizer.decay_fraction": 0.8},
            "optimizer.decay_fraction=0.8: with optimizer.decay=wsd the decay takes the last 12 of the 15 steps",
        ),
        ({"optimizer.decay": "wsd", "optimizer.decay_steps": 16, "optimizer.warmup": 0}, "optimizer.decay_steps=16"),
        ({"optimizer.betas": [1.0, 0.95]}, "optimizer.betas[0]=1.0: must be a number in [0, 1)"),
        ({"optimizer.betas": [0.9, 1.0]}, "optimizer.betas[1]=1.0: must be a number in [0, 1)"),
        (
            {"model.position": "learned"},
            "model.n_kv_heads=3: GPT-2 style (model.position=learned) has no grouped-query attention; must equal "
            "model.n_heads=6",
        ),
        ({"model.n_head": 4}, "model.n_head: there is no such key; did you mean 'n_heads'?"),
        ({"samplng": {}}, "samplng: there is no such key; did you mean 'sampling'?"),
        ({"scheduler": None}, "scheduler: must be a mapping with stages"),
        ({"scheduler": {"stages": "no_such_module.schedule"}}, "schedule: cannot be imported"),
        ({"scheduler": {"stages": f"{__name__}.halves"}}, "missing a required argument: 'count'"),
        ({"scheduler": {"stages": f"{__name__}.halves", "cuont": 3}}, "missing a required argument: 'count'"),
        ({"scheduler": {"stages": f"{__name__}.fails"}}, f"scheduler.stages={__name__}.fails: no stages today"),
        ({"scheduler": {"stages": "ramp", "n_stages": 0}}, "scheduler.n_stages=0: must be an integer of at least 1"),
        ({"scheduler": {"stages": [{"end": 0}, {}]}}, "[0].end=0: must be an integer of at least 1"),
        ({"scheduler": {"stages": [{"mpl": 0.5}]}}, "stages[0].mpl: there is no such key; did you mean 'mlp'?"),
        ({"scheduler": {"stages": [{"end": 5, "mlp": 2.0}, {}]}}, "scheduler.stages[0].mlp=2.0: must be"),
        ({"scheduler": {"stages": [{"end": 15, "mlp": 0.5}, {}]}}, "the smallest trainer.max_steps that works is 16"),
        (
            {"scheduler": {"stage1_end": 12, "stage2_end": 10, "stages": [{"end": 12, "mlp": 0.5}, {"end": 10}, {}]}},
            "scheduler.stage2_end=10 is step 10, but scheduler.stage1_end=12 is step 12",
        ),
        ({"scheduler": {"stages": "stacking", "depths": 2.5}}, "scheduler.depths=2.5: must be"),
    ],
)
def test_values_that_clash_are_one_message(changes, problem):
    (found,) = problems_of({"model.head_dim": None, **changes} if "model" not in changes else changes)
    assert problem in found


def test_a_config_of_an_earlier_version_reads_as_it_trained():
    plain = plain_config({"optimizer.decay": "cosine", "optimizer.kind": "adamw", "trainer.shard": False})
    for key in ("decay_fraction", "decay_shape"):
        del plain["optimizer"][key]
    assert read_train_config(plain) == read_train_config(plain_config())


@pytest.mark.parametrize("section", ["model", "sampling", "scheduler", "trainer"])
def test_a_missing_section_is_named(section):
    plain = plain_config()
    del plain[section]
    with pytest.raises(UserError, match=f"{section}: is missing"):
        read_train_config(plain)


def read_stages(scheduler: dict[str, Any], **changes: Any) -> TrainConfig:
    return read_train_config(plain_config({"scheduler": scheduler, **changes}))


def test_stages_may_be_written_by_hand():
    config = read_stages({"stages": [{"end": 3, "mlp": 0.25}, {"end": 0.5, "heads": 0.5}, {"layers": 0.5}]})
    assert config.scheduler.stages == (StageSpec(3, mlp=0.25), StageSpec(0.5, heads=0.5), StageSpec(layers=0.5))
    assert [(s.first_step, s.end) for s in config.stages] == [(0, 3), (3, 8), (8, 15)]


@pytest.mark.parametrize(("end", "step"), [(1, 1), (1 / 15, 1), (14, 14), (0.9, 14)])
def test_a_boundary_is_a_step_or_a_fraction(end, step):
    assert read_stages({"stages": [{"end": end, "mlp": 0.5}, {}]}).stages[0].end == step


def test_a_ramp_starts_at_the_rates_of_sampling():
    config = read_stages({"stages": "ramp", "n_stages": 3}, **{"sampling.heads": 0.25})
    assert [stage.rates for stage in config.stages] == [Rates(0.25, 0.5, 0.5), Rates(0.625, 0.75, 0.75), Rates()]
    assert [stage.end for stage in config.stages] == [5, 10, 15]
    assert read_train_config(as_plain(config)) == config


def halves(rates: Rates, count: int) -> list[dict[str, Any]]:
    """A schedule of a person's own; plain mappings will do."""
    return [{"end": (i + 1) / count, "heads": rates.heads} for i in range(count - 1)] + [StageSpec()]


def fails(rates: Rates) -> list[StageSpec]:
    raise ValueError("no stages today")


def test_a_persons_own_schedule_is_called_by_its_dotted_path():
    config = read_stages({"stages": f"{__name__}.halves", "count": 3})
    assert config.scheduler.stages == (StageSpec(1 / 3, heads=0.5), StageSpec(2 / 3, heads=0.5), StageSpec())
