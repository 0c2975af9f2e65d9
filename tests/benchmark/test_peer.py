"""Peers: the same architecture in another library's code, found where a person says it is, or told what is missing."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, GPT2, LLAMA
from torch import nn

from est_cli.benchmark import peer as module
from est_cli.benchmark.case import Case
from est_cli.benchmark.measure import measure
from est_cli.benchmark.peer import Peer, find_peer
from est_cli.config import OptimizerConfig
from est_cli.errors import UserError
from est_cli.subnet.schedule import StageSpec

SQUARE = replace(GPT2, d_ff=4 * GPT2.d_model)
"""Of the width that nanoGPT's MLP has."""

NANOGPT = '''
"""A stand-in with nanoGPT's names and signatures, made of our own decoder."""
from dataclasses import make_dataclass, replace
from torch import nn
from est_cli.model.transformer import Transformer
from tiny import GPT2

GPTConfig = make_dataclass("GPTConfig", "block_size vocab_size n_layer n_head n_embd dropout bias".split())

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: many")
        assert config.dropout == 0
        sizes = dict(n_heads=config.n_head, n_kv_heads=config.n_head, head_dim=config.n_embd // config.n_head)
        self.model = Transformer(replace(GPT2, n_layers=config.n_layer, d_model=config.n_embd, d_ff=4 * config.n_embd,
                                         vocab_size=config.vocab_size, max_seq_len=config.block_size, **sizes))

    def forward(self, idx, targets=None):
        return None, self.model(idx, targets)
'''


def case(model, **options) -> Case:
    return Case(model, stages=(StageSpec(None, 0.5, 0.5), StageSpec()), batch_size=2, seq_len=8, **options)


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    return tmp_path


@pytest.mark.parametrize(("precision", "file"), [("fp32", ""), ("bf16", "model.py")])
def test_nanogpt_is_timed_from_its_folder_and_prints_nothing_on_standard_output(nanogpt, capsys, precision, file):
    found = measure(case(SQUARE, precision=precision), 1, 1, "nanogpt", str(nanogpt / file), memory=False)["against"]
    assert found["name"] == "nanoGPT" and found["step_s"] > 0
    assert "number of parameters" not in capsys.readouterr().out


@pytest.mark.parametrize("compiles", [False, True])
def test_a_peer_takes_the_steps_that_torchs_adamw_takes_compiled_where_ours_is(monkeypatch, nanogpt, compiles):
    """Weights decay and biases do not, as ours; so its time is the time of the same training."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(options))
    square = case(SQUARE, compile=compiles)
    peer = Peer(square, find_peer("nanogpt", str(nanogpt), square), "fp32")
    assert compiled == [{"dynamic": False}] * compiles
    decays = {(p.dim() >= 2, g["weight_decay"]) for g in peer.optimizer.param_groups for p in g["params"]}
    assert decays == {(True, OptimizerConfig().weight_decay), (False, 0.0)}
    before = [p.detach().clone() for p in peer.model.parameters()]
    peer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, peer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("against", "contents", "words"),
    [
        ("nanogpt", None, "against_path: is missing; against=nanogpt needs the folder"),
        ("nanogpt", "no folder", "there is no such file or folder"),
        ("nanogpt", {}, "holds no model.py"),
        ("nanogpt", {"model.py": "GPT = 1"}, "has no attribute 'GPTConfig'"),
        ("nanogpt", {"model.py": "import nothing_here"}, "cannot be imported: ModuleNotFoundError"),
        ("nanogpt", {"model.py": NANOGPT.replace("n_layers=c", "n_layers=1 + c")}, "parameters where ours has"),
        ("nanogpt", {"model.py": NANOGPT.replace("dropout == 0", "dropout")}, "cannot build this model"),
        ("nanogpt with recompute", {"model.py": NANOGPT}, "against=nanogpt: has no recomputation"),
        ("litgpt", "no folder", "there is no such file or folder"),
        ("litgpt", {"model.py": ""}, "holds no litgpt/model.py"),
        ("litgpt", {"litgpt/model.py": "import nothing_here"}, "litgpt cannot be imported: ModuleNotFoundError"),
        ("litgpt", {"litgpt/model.py": "GPT = 1"}, "has no attribute 'Config'"),
        ("transformers", {}, "only for against=nanogpt and litgpt"),
        ("transformers", None, "against=transformers: cannot be imported"),
    ],
)
def test_what_is_missing_or_cannot_be_used_is_told(tmp_path, monkeypatch, against, contents, words):
    folder = None if contents is None else tmp_path / "given"
    if isinstance(contents, dict):
        folder.mkdir()
        for name, text in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    monkeypatch.setitem(module.sys.modules, "transformers", None)
    for name in ("litgpt", "litgpt.model"):
        monkeypatch.delitem(module.sys.modules, name, raising=False)
    path, (name, *recompute) = list(module.sys.path), against.split(" with ")
    with pytest.raises(UserError) as refused:
        find_peer(name, folder and str(folder), case(SQUARE if name == "nanogpt" else LLAMA, recompute=bool(recompute)))
    [problem] = refused.value.problems
    assert words in problem and problem.startswith("against")
    assert module.sys.path == path


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_as_many_parameters_sdpa_and_no_cache(family):
    pytest.importorskip("transformers")
    theirs = find_peer("transformers", None, case(FAMILIES[family])).build()
    assert (theirs.config._attn_implementation, theirs.config.use_cache) == ("sdpa", False)
