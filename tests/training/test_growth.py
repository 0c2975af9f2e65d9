"""What joins: where it starts from, what it leaves as it was, and a growth that is interrupted.

test_equivalence.py compares grown runs with the reference, test_loop.py stops them around their growth.
"""

from dataclasses import replace

import pytest
import torch
from tiny import random_batch, random_master, snapshot

from est_cli.config import ModelConfig, SchedulerConfig
from est_cli.model.transformer import Transformer, layer_of
from est_cli.subnet.plan import Growth, Subnetwork, grown_model
from est_cli.subnet.schedule import StageSpec
from est_cli.training.optimizer import SampledAdamW
from est_cli.training.subnetwork import PackedSubnetwork
from tests.training.runs import ARMS, OPTIMIZER, SIX, SIX_LLAMA, assert_same_bits, finished, resumed, start, train


def whole_loss(master: Transformer, model: ModelConfig) -> float:
    """The loss of the part of the model that has joined."""
    subnet = PackedSubnetwork(master, Subnetwork(model), torch.float64)
    subnet.load_whole()
    return subnet.loss(*random_batch(model)).item()


def grown(master: Transformer, before: StageSpec, method: str) -> tuple[float, float]:
    """The loss before and after a growth to the whole model."""
    model = master.config
    small = grown_model(model, before.grown)
    optimizer = SampledAdamW(master, OPTIMIZER, grown=small)
    first = whole_loss(master, small)
    optimizer.grow(Growth(small, model, method), "copy")
    return first, whole_loss(master, model)


@pytest.mark.parametrize("model", [SIX, SIX_LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("before", "method"),
    [
        (StageSpec(n_layers=2), "zero"),
        (StageSpec(n_layers=0), "zero"),
        (StageSpec(n_heads=0.5), "stack"),
        (StageSpec(d_ff=4), "stack"),
        (StageSpec(n_layers=0.5, n_heads=0.5, d_ff=0.25), "zero"),
    ],
)
def test_what_joins_with_outputs_of_zero_changes_no_function(model, before, method):
    first, second = grown(random_master(model), before, method)
    assert second == pytest.approx(first, abs=1e-12)
    assert abs(whole_loss(random_master(model), model) - first) > 1e-3, "without the zeros it would have changed"


@pytest.mark.parametrize(
    ("method", "old", "new", "sources", "joined"),
    [
        ("stack", 3, 7, [0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 6]),
        ("interleave", 3, 5, [0, 0, 1, 1, 2], [1, 3]),
        ("middle", 4, 6, [0, 1, 2, 1, 2, 3], [3, 4]),
        ("middle", 1, 4, [0, 0, 0, 0], [1, 2, 3]),
        ("middle", 2, 7, [0, 1, 0, 1, 0, 1, 0], [2, 3, 4, 5, 6]),
        ("zero", 2, 4, [0, 1, None, None], [2, 3]),
        ("random", 1, 3, [0, None, None], [1, 2]),
    ],
)
def test_every_layer_knows_where_it_starts_from(method, old, new, sources, joined):
    growth = Growth(replace(SIX, n_layers=old), replace(SIX, n_layers=new), method)
    assert growth.sources == sources
    assert growth.joined == joined
    assert all(source is None or source <= layer for layer, source in enumerate(sources)), "safe from the last down"


def test_a_layer_that_has_not_joined_stands_still_has_no_moments_and_is_not_evaluated(tmp_path):
    config = ARMS["stack"].config(eval_every=3)
    training, recorder = start(config)
    before = snapshot(training.model)
    train(training, tmp_path, stop_after=5)
    after = snapshot(training.model)
    late = [name for name in before if (layer_of(name) or 0) >= 2]
    assert late and all(torch.equal(before[name], after[name]) for name in late)
    assert not any(name.partition(".")[2] in late for name in training.moments())
    small, _ = start(replace(config, model=replace(SIX, n_layers=2), scheduler=SchedulerConfig((StageSpec(),))))
    small.model.load_state_dict({k: v for k, v in after.items() if k not in late})
    assert small.validate(small._build(small.stages[0])) == training.validate(training._build(training.stages[0]))
    assert {record["grown/layers"] for record in recorder.records} == {2 / 6}


def test_a_run_that_dies_in_the_middle_of_a_growth_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """A growth writes nothing: the run goes on from the checkpoint before it."""
    config, copy, copied = ARMS["interleave"].config(checkpoint_every=3), SampledAdamW._copy, []

    def dies(*arguments):
        copied.append(copy(*arguments))
        if len(copied) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SampledAdamW, "_copy", dies)
        finished(config, tmp_path / "parts")
    second, _ = resumed(config, tmp_path / "parts")
    assert second.step == 6
    train(second, tmp_path / "parts")
    assert_same_bits(second, finished(config, tmp_path / "whole")[0])
