"""A case is what a run of the same config does, and a child process measures the same case."""

import argparse
import json
from dataclasses import asdict, replace

import pytest
from tiny import GPT2, train_config

from est_cli.benchmark.__main__ import main, parser, to_case
from est_cli.benchmark.case import PRESETS, THREE_STAGES, Case, case_of
from est_cli.benchmark.measure import Stepper
from est_cli.composition.composer import compose
from est_cli.config import OptimizerConfig, SamplingConfig, read_train_config
from est_cli.subnet.schedule import StageSpec

HALF_FIRST = (StageSpec(None, 0.5, 0.5, 0.5), StageSpec())
PLAIN = Case(GPT2, stages=HALF_FIRST, batch_size=2, seq_len=8)
UNUSUAL = Case(
    GPT2,
    SamplingConfig(mlp_block=4),
    OptimizerConfig(unsampled="freeze", betas=(0.8, 0.9), grad_clip=None),
    (StageSpec(None, 0.5, 0.5, 0.5, n_layers=2), StageSpec()),
    *(3, 7, 2, "bf16", "cuda", "torch", True, True, 1e12),
)


def case_from(*arguments: str) -> Case:
    return to_case(parser().parse_args(arguments))


@pytest.mark.parametrize("case", [PLAIN, UNUSUAL])
def test_a_child_process_reads_the_same_case(case):
    assert case_from("--case", json.dumps(asdict(case))) == case


def test_flags_describe_a_case():
    flags = ["--batch-size=3", "--seq-len=7", "--grad-accum=2", "--precision=bf16", "--device=cuda", "--kernels=torch"]
    flags += ["--recompute", "--compile", "--peak-flops=1e12", '--sampling={"mlp_block": 4}']
    flags += ['--optimizer={"unsampled": "freeze", "betas": [0.8, 0.9], "grad_clip": null}']
    flags += [
        '--rates=[{"heads": 0.5, "mlp": 0.5, "layers": 0.5, "n_layers": 2}, {}]',
        "--model",
        json.dumps(asdict(GPT2)),
    ]
    assert case_from(*flags) == UNUSUAL
    assert case_from() == Case(PRESETS["gpt2"])
    assert case_from().stages == THREE_STAGES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_models_of_conf(name):
    arguments = argparse.Namespace(overrides=[f"model={name}"], config_name=None, config_dir=None)
    model = read_train_config(compose("train", arguments)[0]).model
    assert replace(PRESETS[name], init=model.init) == model


def test_a_case_takes_what_the_trainer_was_told():
    config = train_config(GPT2, precision="bf16", compile=True, recompute="block", grad_accum=3)
    case = case_of(config)
    assert (case.precision, case.compile, case.recompute, case.grad_accum) == ("bf16", True, True, 3)
    assert case.stages[-1] == StageSpec()


def test_stages_keep_their_numbers_where_one_of_them_is_the_full_model():
    config = train_config(GPT2)
    half, full = StageSpec(heads=0.5), StageSpec()
    stages = (replace(full, end=2), replace(half, end=4), full)
    measured = case_of(replace(config, scheduler=replace(config.scheduler, stages=stages))).stages
    assert measured == (full, half, full)
    sampled = case_of(replace(config, scheduler=replace(config.scheduler, stages=(half,)))).stages
    assert sampled == (half, full), "the full model is what the others are compared with"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--batch-size", "0"], "--batch-size=0: must be an integer of at least 1"),
        (["--device", "cuda"], "trainer.device=cuda: torch sees no GPU"),
        (["--kernels", "triton"], "kernels=triton: needs a GPU"),
        (["--rates", '[{"head": 0.5}, {}]'], "--rates[0].head: there is no such key; did you mean 'heads'"),
        (["--rates", "[]"], "the last must be the full model"),
        (["--against", "nanogpt"], "against_path: is missing"),
        (["--model", '{"n_layers": 1}'], "--model.d_ff: is missing"),
    ],
)
def test_mistakes_on_the_plain_command_line_are_told(monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("kernels", ["auto", "masked"])
def test_every_stage_is_compiled_where_the_trainer_compiles(monkeypatch, kernels):
    compiled = []
    monkeypatch.setattr("est_cli.model.transformer.Transformer.compile_blocks", lambda model: compiled.append(model))
    stepper = Stepper(replace(PLAIN, compile=True, kernels=kernels))
    for stage in (0, 1, 0):
        stepper.step(stage)
    assert len(compiled) == 2
    Stepper(PLAIN).step(0)
    assert len(compiled) == 2
