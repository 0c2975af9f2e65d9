"""Bad input: one message, exit code 2, no run directory, no traceback."""

import pytest

from tests.commands.cli import call, run, write_corpus

CASES = {
    "a misspelt option": (["model=tinylama"], ["model=tinylama", "did you mean 'tinyllama'"]),
    "a number for an option": (["model=nan"], ["model=nan", "must be one of", "nano"]),
    "a misspelt group": (["modle=gpt2"], ["modle", "did you mean 'model'"]),
    "a misspelt experiment": (["experiment=quickstrt"], ["experiment=quickstrt", "did you mean 'quickstart'"]),
    "a misspelt key": (["trainer.max_step=5"], ["trainer.max_step:", "did you mean 'trainer.max_steps'"]),
    "an added key that does not exist": (["+trainer.max_stps=5"], ["trainer.max_stps", "did you mean 'max_steps'"]),
    "no KEY=VALUE": (["gpt2"], ["gpt2: cannot be read", "KEY=VALUE"]),
    "a word for a number": (["trainer.max_steps=abc"], ["trainer.max_steps=abc", "an integer of at least 1"]),
    "a rate of zero": (["sampling.heads=0"], ["sampling.heads=0", "in (0, 1]"]),
    "a rate above one": (["sampling.layers=1.5"], ["sampling.layers=1.5", "in (0, 1]"]),
    "reversed boundaries": (
        ["scheduler.stage1_end=0.5", "scheduler.stage2_end=0.2"],
        ["scheduler.stage2_end=0.2", "reversed"],
    ),
    "a stage without steps": (
        ["trainer.max_steps=4", "scheduler.stage1_end=1", "scheduler.stage2_end=5"],
        ["scheduler.stage2_end=5 is step 5", "smallest trainer.max_steps that works is 6"],
    ),
    "heads that do not divide": (["model.n_heads=3"], ["model.n_heads=3", "must divide model.d_model=128"]),
    "GQA in GPT-2 style": (["model=gpt2", "model.n_kv_heads=4"], ["model.n_kv_heads=4", "GPT-2 style"]),
    "a sequence too long": (["data.seq_len=9999"], ["data.seq_len=9999", "model.max_seq_len=256"]),
    "no path": (["data=text"], ["data.path: is missing"]),
    "a missing file": (["data=text", "data.path=nowhere/at/all"], ["data.path=nowhere/at/all"]),
    "a text too small": (
        ["data=text", "data.path=corpus", "tokenizer=byte", "trainer.batch_size=100000"],
        ["data.seq_len", "trainer.batch_size"],
    ),
    "kernels for another device": (["kernels=triton", "trainer.device=cpu"], ["kernels=triton", "needs a GPU"]),
    "no GPU": (["trainer.device=cuda"], ["trainer.device=cuda"]),
    "a name that leaves the folder": (["name=../x"], ["name=../x"]),
    "a boundary of no kind": (["scheduler.stage2_end=2.5"], ["scheduler.stage2_end=2.5: must be"]),
    "a growth of no kind": (
        ["scheduler=stacking", "scheduler.depths=[1,2]", "scheduler.grow_at=[0.2,x]"],
        ["scheduler.grow_at[1]=x: must"],
    ),
    "a sweep without -m": (["seed=0,1"], ["seed=0,1: is a sweep; add -m", "seed=[0,1]"]),
    "a value that needs quotes": (["optimizer.lr=a#ü"], ["cannot be read", "quote it: \"optimizer.lr='a#ü'\""]),
    "a sweep with a word for a number": (["-m", "seed=0,zero"], ["seed=zero: must be an integer"]),
    "a tab in YAML": (
        ["--config-dir=.", "experiment=tab"],
        ["tab.yaml, line 3, column 1", "YAML is indented with spaces"],
    ),
    "an experiment in no package": (["--config-dir=.", "experiment=plain"], ["# @package _global_"]),
    "an unknown strategy": (["sampling.strategy=randm"], ["sampling.strategy=randm", "did you mean 'random'"]),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_named_and_nothing_is_left(case, tmp_path):
    arguments, words = CASES[case]
    write_corpus(tmp_path / "corpus")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "tab.yaml").write_text("# @package _global_\noptimizer:\n\tlr: 0.1\n")
    (tmp_path / "experiment" / "plain.yaml").write_text("optimizer:\n  lr: 0.1\n")
    # Only a process of its own can be sure not to see a GPU.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if case == "no GPU" else {}
    done = (run if hidden else call)("est-train", *arguments, "logger=none", cwd=tmp_path, **hidden)
    assert done.code == 2, done.err
    assert all(word in done.err for word in words), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "outputs").exists()


def test_all_mistakes_are_told_at_once(tmp_path):
    done = call(
        "est-train", "sampling.heads=2", "optimizer.lr=-1", "model.n_heads=3", "trainer.max_steps=0", cwd=tmp_path
    )
    assert done.code == 2
    for key in ("sampling.heads", "optimizer.lr", "model.n_heads", "trainer.max_steps"):
        assert f"error: {key}=" in done.err


def test_misspelt_overrides_are_told_at_once(tmp_path):
    done = call("est-train", "modle=gpt2", "trainer.max_step=5", "data=txt", cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("error:") == 3


@pytest.mark.parametrize(
    ("command", "argument"),
    [("est-eval", "run=nowhere"), ("est-eval", "run=null"), ("est-report", "runs=nowhere"), ("est-plan", "step=-1"),
     ("est-plan", "target_saved_blocks=0.9"), ("est-data", "samples=-1"), ("est-bench", "against=tensorflow"),
     ("est-export", "format=jsonn"), ("est-generate", "format=jsonn")],
)  # fmt: skip
def test_every_command_says_what_is_wrong(command, argument, tmp_path):
    done = call(command, argument, cwd=tmp_path)
    assert done.code == 2, done.err
    assert argument.split("=")[0] in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize("flags", [("--cfg", "job"), ("--info", "config")])
def test_hydras_own_flags_change_nothing_about_mistakes(flags, tmp_path):
    done = call("est-train", *flags, "trainer.max_step=5", cwd=tmp_path)
    assert done.code == 2
    assert done.err == "error: trainer.max_step: there is no such key; did you mean 'trainer.max_steps'?\n"
    done = call("est-plan", "-m", "seed=0,1", "modle=gpt2", cwd=tmp_path)
    assert done.code == 2
    assert "modle" in done.err and "Traceback" not in done.err


def test_one_of_hydras_flags_at_a_time(tmp_path):
    done = call("est-train", "-m", "--cfg", "job", cwd=tmp_path)
    assert (done.code, done.err) == (2, "error: --multirun --cfg: only one of them at a time\n")


@pytest.mark.parametrize("content", ["- a\n- list\n", "model: {n_layers: [\n"])
def test_a_damaged_config_in_a_run_directory_is_told(content, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text(content)
    done = call("est-eval", "run=damaged", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("error: run=damaged: its config.yaml ")
    assert "Traceback" not in done.err


def test_runs_that_cannot_be_analyzed_are_told_before_anything_is_measured(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    done = call("est-analyze", "run=[begun,./begun]", cwd=tmp_path)
    assert done.code == 2
    assert "run=begun: has logged no step yet" in done.err
    assert "run=begun: is named twice" in done.err


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    done = call("est-report", "runs=run", "out=/proc/nowhere", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("error: out=/proc/nowhere: cannot be written")


def test_a_sweep_that_cannot_make_its_folder_is_told(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in ("/proc/nowhere", "taken"):
        done = call("est-train", "-m", "seed=0,1", "logger=none", f"hydra.sweep.dir={folder}", cwd=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.startswith(
            f"error: hydra.sweep.dir={folder if folder[0] == '/' else tmp_path / folder}: cannot be"
        )
