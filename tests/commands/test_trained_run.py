"""What people do with a run: evaluate it, sample from it, export it, and start another from the export."""

import json
import shutil
from pathlib import Path

import pytest

from est_cli.commands.generate import take_prompt
from tests.commands.cli import ON_CORPUS, call, train, write_corpus

SHORT = ("trainer.max_steps=6", "scheduler=full")
NEEDS_TRANSFORMERS = "transformers is not installed: pip install 'est-cli[export]'"


@pytest.fixture(scope="module")
def trained(place) -> str:
    return train(place, *SHORT).json["run_dir"]


@pytest.fixture(scope="module")
def exported(place, trained) -> Path:
    pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    found = call("est-export", f"run={trained}", "to=hf", "out=exported", "format=json", cwd=place).json
    assert found.keys() == {"out", "max_logit_difference"}
    assert found["max_logit_difference"] <= 1e-5
    return Path(found["out"])


def test_training_from_an_export_begins_where_the_run_ended(place, trained, exported):
    first = call("est-eval", f"run={trained}", "format=json", cwd=place).json
    again = train(place, *SHORT, f"model.init_from={exported}", "optimizer.lr=1e-12", "trainer.max_steps=1").json
    assert again["val_loss"] == pytest.approx(first["val_loss"], abs=1e-6)


def test_an_export_of_other_sizes_is_refused_before_there_is_a_run_directory(place, exported):
    sizes = (f"model.init_from={exported}", "model.d_ff=32", "hydra.run.dir=elsewhere")
    done = call("est-train", *ON_CORPUS, *SHORT, *sizes, cwd=place)
    assert done.code == 2
    assert "model.d_ff=32: " in done.err
    assert "give model.d_ff=24" in done.err
    assert not (place / "elsewhere").exists()


def test_a_subnetwork_is_exported_by_rates_or_by_step(place, trained, exported):
    found = call("est-export", f"run={trained}", "out=small", "mlp=0.5", "layers=0.5", "format=json", cwd=place).json
    config = json.loads((Path(found["out"]) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 12)
    assert found["max_logit_difference"] <= 1e-5
    done = call("est-export", f"run={trained}", "out=other", "mlp=0.5", "plan_step=1", cwd=place)
    assert (done.code, "plan_step=1: goes without mlp" in done.err) == (2, True)


def test_nothing_is_exported_over_something(place, trained):
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    done = call("est-export", f"run={trained}", "out=full", cwd=place)
    assert (done.code, "must be a new or an empty folder" in done.err) == (2, True)


@pytest.mark.parametrize("prompt", ["def ", "f(x, y): [${a}] {b", "", " ", "it=5"])
def test_a_prompt_is_taken_as_it_is_typed(prompt):
    arguments = ["est-generate", f"prompt={prompt}", "run=folder"]
    assert take_prompt(arguments) == prompt
    assert arguments == ["est-generate", "run=folder"]


def test_a_prompt_in_hydras_quotes_is_left_to_hydra():
    arguments = ["est-generate", "prompt='def '", "run=folder"]
    assert take_prompt(arguments) is None
    assert arguments == ["est-generate", "prompt='def '", "run=folder"]


def test_text_is_sampled(place, trained):
    arguments = (f"run={trained}", "prompt=def f(${x}): ", "max_tokens=5")
    found = call("est-generate", *arguments, "format=json", cwd=place).json
    assert found["prompt"] == "def f(${x}): "
    assert found["tokens"] <= 5
    assert call("est-generate", *arguments, cwd=place).out == found["prompt"] + found["text"] + "\n"


def test_runs_are_evaluated_side_by_side(place, trained):
    one = call("est-eval", f"run={trained}", "format=json", cwd=place).json
    found = call("est-eval", f"run=[{trained},{trained}]", "format=json", cwd=place).json["runs"]
    assert found == [{"run": trained, **one}] * 2
    assert call("est-eval", f"run=[{trained},{trained}]", cwd=place).out.count(Path(trained).name) == 2


def test_a_run_is_evaluated_on_other_text_with_its_own_tokenizer(place, trained):
    write_corpus(place / "other")
    other = place / "other" / "more.txt"
    other.write_text("nothing like lines of numbers\n" * 50)
    own = call("est-eval", f"run={trained}", "format=json", cwd=place).json
    overrides = ("data=text", f"data.path={other}", "data.val_fraction=0.5", "tokens=128")
    found = call("est-eval", f"run={trained}", *overrides, "format=json", cwd=place).json
    assert found["val_loss"] != own["val_loss"]
    assert found["tokens"] == 128
    done = call("est-eval", f"run={trained}", "data=text", cwd=place)
    assert (done.code, "data.path: is missing" in done.err) == (2, True)


def test_tasks_run_from_the_command_line(place, trained):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'est-cli[tasks]'")
    tasks_dir = Path(__file__).parents[1] / "evaluation" / "tasks"
    arguments = (f"run={trained}", "tasks=[tiny_generation]", f"tasks_dir={tasks_dir}", "limit=2")
    found = call("est-eval", *arguments, "format=json", cwd=place).json
    assert found["step"] == 5
    assert found["tasks"]["tiny_generation"]["exact_match"] == 0


def test_a_run_is_read_without_its_corpus(place, exported):
    """A SentencePiece model of its own, trained on text that is gone."""
    corpus = write_corpus(place / "gone")
    own = ("tokenizer=sentencepiece", corpus, "data.cache_dir=gone-cache", "trainer.max_steps=2")
    folder = train(place, *SHORT, *own).json["run_dir"]
    shutil.rmtree(place / "gone")
    shutil.rmtree(place / "gone-cache")
    assert call("est-generate", f"run={folder}", "max_tokens=3", "format=json", cwd=place).json["tokens"] <= 3
    found = call("est-export", f"run={folder}", "out=from-sentencepiece", "format=json", cwd=place).json
    assert found["max_logit_difference"] <= 1e-5
    other = call("est-eval", f"run={folder}", "data=text", f"data.path={place / 'corpus'}", "format=json", cwd=place)
    assert other.json["val_loss"] > 0


def test_a_run_is_continued_evaluated_and_cooled_down_with_its_own_text_and_tokenizer(place):
    own = (
        "tokenizer=sentencepiece", write_corpus(place / "grows"), "hydra.run.dir=own", "optimizer.decay=none",
        "trainer.max_steps=4", "trainer.checkpoint_every=2",
    )  # fmt: skip
    train(place, *SHORT, *own)
    before = call("est-eval", "run=own", "format=json", cwd=place).json
    (place / "grows" / "more.txt").write_text("qxzjkv " * 3000)
    assert call("est-eval", "run=own", "format=json", cwd=place).json == before
    (place / "own" / "summary.json").unlink()
    shutil.rmtree(place / "own" / "checkpoints" / "step-00000004")
    pieces = (place / "own" / "tokenizer" / "tokenizer.model").read_bytes()
    cooldown = ("--cooldown", "own/checkpoints/step-00000002", "hydra.run.dir=cool")
    for arguments in ((*ON_CORPUS, *SHORT, *own), cooldown):
        done = call("est-train", *arguments, cwd=place)
        assert (done.code, "8 documents, now 9" in done.err) == (2, True), done.err
    assert not (place / "cool").exists()
    accepted = train(place, *SHORT, *own, "data.on_change=accept")
    assert "continuing at step 2" in accepted.err
    assert (place / "own" / "tokenizer" / "tokenizer.model").read_bytes() == pieces
