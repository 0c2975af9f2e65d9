"""Bad input: one message, exit code 2, no run directory, no traceback.

Every kind of message once, through the command that a person typed. The tests of what makes a message have the values.
"""

import shlex
from pathlib import Path

import pytest

from tests.commands.cli import call, run, write_corpus

TRAIN = [
    ("model=tinylama", "model=tinylama", "did you mean 'tinyllama'"),
    ("model=nan", "model=nan", "must be one of", "nano"),
    ("modle=gpt2", "modle", "did you mean 'model'"),
    ("experiment=quickstrt", "experiment=quickstrt", "did you mean 'quickstart'"),
    ("trainer.max_step=5", "trainer.max_step:", "did you mean 'trainer.max_steps'"),
    ("+trainer.max_stps=5", "trainer.max_stps", "did you mean 'max_steps'"),
    ("modle=gpt2 trainer.max_step=5 data=txt", "error: modle", "error: trainer.max_step", "error: data=txt"),
    (
        "sampling.heads=2 optimizer.lr=-1 model.n_heads=3 trainer.max_steps=0",
        "error: sampling.heads=2: must be a number in (0, 1]", "error: optimizer.lr=", "error: trainer.max_steps=",
        "error: model.n_heads=3: must divide model.d_model=128",
    ),
    ("gpt2", "gpt2: cannot be read", "KEY=VALUE"),
    ("trainer.max_steps=abc", "trainer.max_steps=abc", "an integer of at least 1"),
    ("scheduler.stage1_end=0.5 scheduler.stage2_end=0.2", "scheduler.stage2_end=0.2", "reversed"),
    (
        "trainer.max_steps=4 scheduler.stage1_end=1 scheduler.stage2_end=5",
        "scheduler.stage2_end=5 is step 5", "smallest trainer.max_steps that works is 6",
    ),
    ("model=gpt2 model.n_kv_heads=4", "model.n_kv_heads=4", "GPT-2 style"),
    ("data.seq_len=9999", "data.seq_len=9999", "model.max_seq_len=256"),
    ("data=text", "data.path: is missing"),
    ("data=text data.path=nowhere/at/all", "data.path=nowhere/at/all"),
    ("data=text data.path=corpus tokenizer=byte trainer.batch_size=100000", "data.seq_len", "trainer.batch_size"),
    ("kernels=triton trainer.device=cpu", "kernels=triton", "needs a GPU"),
    ("trainer.device=cuda", "trainer.device=cuda"),
    ("name=../x", "name=../x"),
    ("scheduler.stage2_end=2.5", "scheduler.stage2_end=2.5: must be"),
    ("scheduler=stacking scheduler.depths=[1,2] scheduler.grow_at=[0.2,x]", "scheduler.grow_at[1]=x: must"),
    ("seed=0,1", "seed=0,1: is a sweep; add -m", "seed=[0,1]"),
    ("optimizer.lr=a#ü", "cannot be read", "quote it: \"optimizer.lr='a#ü'\""),
    ("-m seed=0,zero", "seed=zero: must be an integer"),
    ("--config-dir=. experiment=tab", "tab.yaml, line 3, column 1", "YAML is indented with spaces"),
    ("--config-dir=. experiment=plain", "# @package _global_"),
    ("sampling.strategy=randm", "sampling.strategy=randm", "did you mean 'random'"),
    ("-m --cfg job", "error: --multirun --cfg: only one of them at a time"),
    ("--cfg job trainer.max_step=5", "trainer.max_step: there is no such key; did you mean 'trainer.max_steps'?"),
    ("--info config trainer.max_step=5", "trainer.max_step: there is no such key; did you mean 'trainer.max_steps'?"),
    ("-m seed=0,1 hydra.sweep.dir=/proc/nowhere", "error: hydra.sweep.dir=/proc/nowhere: cannot be"),
    ("-m seed=0,1 hydra.sweep.dir=taken", "error: hydra.sweep.dir=", "taken: cannot be"),
    ("-m seed=0,1 hydra/launcher=joblob", "did you mean 'joblib'"),
    ("-m seed=0,1 hydra/sweeper=optuna_tp", "did you mean 'optuna_tpe'"),
    ("replay=corpus trainer.max_steps=4", "goes only with format"),
    ("replay=corpus", "replay=corpus: must be a folder"),
    ("--config-path elsewhere", "--config-path=elsewhere"),
    ("--config-name mine --rerun x", "--config-name=mine: goes without --rerun"),
    ("--config-name mine --cooldown x", "--config-name=mine: goes without --cooldown"),
    ("tokenizer=byte tokenizer.path=x", "tokenizer.path=x: tokenizer=byte reads no file"),
    ("data.path=x", "data.path=x: data.kind=stdlib does not read it"),
    ("data=text data.path=x data.streaming=true", "data.streaming=true: data.kind=text"),
    ("data=text data.path=x data.column=body", "data.column=body: data.kind=text"),
    ("data=hf data.path=x data.sources=[{path:y,weight:1}]", "data.path=x: must be null beside"),
    ("WANDB_MODE=sometimes seed=0", "WANDB_MODE=sometimes: must be"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2: RANK, MASTER_ADDR, MASTER_PORT must be set too"),
    ("WORLD_SIZE=two", "WORLD_SIZE=two: must be a number of processes"),
    ("CXX=no-such-compiler trainer.compile=true", "trainer.compile=true: torch.compile needs a C++ compiler"),
]  # fmt: skip
"""Arguments of est-train, after environment variables in capitals; and what the message says."""
PLAN = [
    ("step=-1", "step=-1"),
    ("target_saved_blocks=0.9", "target_saved_blocks=0.9"),
    ("-m seed=0,1 modle=gpt2", "modle"),
    ("device_memory=80 trainer.batch_size=0", "device_memory=80: must be a number and a unit", "trainer.batch_size=0"),
    ("'scheduler.stages=[{end: 0.2, mlp: 0.5}, {}]' trainer.max_steps=2", "scheduler.stages[0].end"),
    ("trainer=fsdp trainer.devices=5", "divide model.d_model=128: 1, 2, 4, 8, 16, 32, 64, 128"),
    ("trainer=hsdp trainer.devices=12 trainer.shard_size=3", "trainer.shard_size=3: trainer=hsdp gives"),
    ("trainer=hsdp trainer.devices=4 trainer.shard_size=8", "must divide the 4 devices"),
    ("trainer=ddp trainer.shard_size=2", "trainer.shard_size=2: needs trainer=hsdp"),
    ("trainer.shard=true", "trainer.shard: is gone; give trainer=fsdp"),
    ("scheduler=stacking scheduler.depths=5", "scheduler.depths=5: must be in [0, 4], or a fraction"),
    ("scheduler=stacking scheduler.grow=stak", "scheduler.grow=stak: must be one of stack, interleave"),
    ("scheduler=stacking scheduler.grow_moments=keep", "grow_moments=keep: must be one of copy, reset"),
    ("scheduler=stacking scheduler.depths=0", "scheduler.grow=stack: there is no layer to copy from 0"),
    ("scheduler=stacking scheduler.grow_at=2000", "scheduler.grow_at=2000 is step 2000, but training ends"),
    ("scheduler=stacking scheduler.depths=[1,2]", "scheduler.depths=[1, 2]: must be as many"),
    ("scheduler=stacking 'scheduler.stages=[{end: 5, n_layers: 3}, {n_layers: 2}]'", "a model only grows"),
    ("scheduler=stacking 'scheduler.stages=[{end: 5, n_heads: 3}, {}]'", "n_heads=3: must be in [2, 4]"),
    ("scheduler=raptr scheduler.n_stages=0", "scheduler.n_stages=0: must be an integer of at least 1"),
    ("scheduler=layer_drop scheduler.p_max=1.5", "scheduler.p_max=1.5: must be a number in (0, 1]"),
    ("sampling.rescale.layers=square", "sampling.rescale.layers=square: must be one of none, sqrt, inverse"),
    ("sampling.rescale_layers=true sampling.rescale.layers=sqrt", "sampling.rescale.layers=sqrt: "),
    ("sampling.layer_strategy=increasing sampling.layers=0.25", "increasing: keeps at least half"),
    ("sampling.layer_strategy=end", "did you mean 'ends'?"),
]
OTHERS = [
    ("est-eval run=nowhere", "run"),
    ("est-eval run=null", "run"),
    ("est-eval run=list", "error: run=list: its config.yaml "),
    ("est-eval run=damaged", "error: run=damaged: its config.yaml "),
    ("est-report runs=nowhere", "runs"),
    ("est-report runs=logged out=/proc/nowhere", "error: out=/proc/nowhere: cannot be written"),
    ("est-data samples=-1", "samples"),
    ("est-bench against=tensorflow", "against"),
    ("est-export format=jsonn", "format"),
    ("est-generate format=jsonn", "format"),
    ("est-analyze run=[list,./list]", "run=list: has logged no step yet", "run=list: is named twice"),
]
CASES = [(f"est-train {line}", *words) for line, *words in TRAIN]
CASES += [(f"est-plan {line}", *words) for line, *words in PLAN] + OTHERS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_corpus(place / "corpus")
    (place / "taken").write_text("a file")
    for name, text in {
        "experiment/tab.yaml": "# @package _global_\noptimizer:\n\tlr: 0.1\n",
        "experiment/plain.yaml": "optimizer:\n  lr: 0.1\n",
        "list/config.yaml": "- a\n- list\n",
        "damaged/config.yaml": "model: {n_layers: [\n",
        "logged/metrics.jsonl": '{"step": 0}\n',
    }.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    return place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_it_is_named_and_nothing_is_left(case, place):
    line, *words = case
    command, *arguments = shlex.split(line)
    variables = [word for word in arguments if word.partition("=")[0].replace("_", "").isupper()]
    environment = dict(word.split("=") for word in variables)
    # Only a process of its own can be sure not to see a GPU.
    start = call
    if "trainer.device=cuda" in arguments:
        start, environment = run, {"CUDA_VISIBLE_DEVICES": ""}
    done = start(command, *(word for word in arguments if word not in variables), cwd=place, **environment)
    assert (done.code, done.out) == (2, ""), done.err
    assert all(word in done.err for word in words), done.err
    assert "Traceback" not in done.err
    assert not (place / "outputs").exists()
