"""A case is what a run of the same config does."""

import argparse
import json
from dataclasses import asdict, replace

import pytest
from tiny import GPT2, train_config

from est_cli.benchmark.__main__ import main, parser, to_case
from est_cli.benchmark.case import PRESETS, Case, case_of
from est_cli.composition.composer import compose
from est_cli.config import OptimizerConfig, SamplingConfig, read_train_config
from est_cli.subnet.schedule import StageSpec

UNUSUAL = Case(
    GPT2,
    SamplingConfig(mlp_block=4),
    OptimizerConfig(unsampled="freeze", betas=(0.8, 0.9), grad_clip=None),
    (StageSpec(None, 0.5, 0.5, 0.5, n_layers=2), StageSpec()),
    *(3, 7, 2, "bf16", "cuda", "torch", True, True, 1e12),
)
FLAGS = ["--batch-size=3", "--seq-len=7", "--grad-accum=2", "--precision=bf16", "--device=cuda", "--kernels=torch",
         "--recompute", "--compile", "--peak-flops=1e12", '--sampling={"mlp_block": 4}', "--model",
         json.dumps(asdict(GPT2)), '--optimizer={"unsampled": "freeze", "betas": [0.8, 0.9], "grad_clip": null}',
         '--rates=[{"heads": 0.5, "mlp": 0.5, "layers": 0.5, "n_layers": 2}, {}]']  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "case"),
    [(FLAGS, UNUSUAL), ([], Case(PRESETS["gpt2"]))],
    ids=["flags", "the defaults"],
)
def test_a_command_line_describes_a_case(arguments, case):
    assert to_case(parser().parse_args(arguments)) == case


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_models_of_conf(name):
    arguments = argparse.Namespace(overrides=[f"model={name}"], config_name=None, config_dir=None)
    model = read_train_config(compose("train", arguments)[0]).model
    assert replace(PRESETS[name], init=model.init) == model


HALF, FULL = StageSpec(heads=0.5), StageSpec()


@pytest.mark.parametrize(
    ("stages", "measured"), [((FULL, HALF, FULL), (FULL, HALF, FULL)), ((HALF,), (HALF, FULL))],
    ids=["stages keep their numbers", "the full model is there to compare with"],
)  # fmt: skip
def test_a_case_takes_what_the_trainer_was_told(stages, measured):
    ended = tuple(replace(stage, end=2 * number) for number, stage in enumerate(stages, 1))
    config = train_config(GPT2, stages=ended, precision="bf16", compile=True, recompute="block", grad_accum=3)
    case = case_of(config)
    assert (case.precision, case.compile, case.recompute, case.grad_accum) == ("bf16", True, True, 3)
    assert case.stages == measured


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--batch-size", "0"], "--batch-size=0: must be an integer of at least 1"),
        (["--precision", "fp64"], "--precision=fp64: must be one of fp32, bf16"),
        (["--device", "cuda"], "trainer.device=cuda: torch sees no GPU"),
        (["--kernels", "triton"], "kernels=triton: needs a GPU"),
        (["--rates", '[{"head": 0.5}, {}]'], "--rates[0].head: there is no such key; did you mean 'heads'"),
        (["--rates", "[]"], "the last must be the full model"),
        (["--against", "nanogpt"], "against_path: is missing"),
        (["--model", '{"n_layers": 1}'], "--model.d_ff: is missing"),
        (["--model", "gpt3"], "gpt3: must be nano, gpt2,"),
    ],
)
def test_mistakes_on_the_plain_command_line_are_told(monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert problem in capsys.readouterr().err
