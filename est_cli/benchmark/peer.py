"""The peer: the same architecture in another library's own code, trained in its fastest honest setting.

SDPA attention, no cache, fused AdamW, the same tokens, threads and optimizer, compiled if ours is. In bf16 the faster
of two settings counts: autocast over fp32 weights, or bf16 weights with fp32 masters. transformers must be installed;
nanoGPT and litgpt may be folders that a person names. Nothing of theirs is kept here.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from est_cli.benchmark.case import Case
from est_cli.benchmark.steps import device_time
from est_cli.config import ModelConfig
from est_cli.errors import UserError
from est_cli.model.huggingface import to_config
from est_cli.model.transformer import Transformer

SETTINGS = {"fp32": ("fp32",), "bf16": ("autocast", "bf16 weights, fp32 masters")}


@dataclass(frozen=True)
class PeerCode:
    """What trains the same architecture elsewhere."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    """Mean cross-entropy of inputs and targets [B, T]; targets are shifted already."""


def find_peer(against: str, path: str | None, case: Case) -> PeerCode:
    """The code of `against`, once it has built the case's model. Raises UserError if it cannot."""
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints, and ours may be JSON
        code = PEERS[against](path and Path(path).expanduser(), case.model)
        if case.recompute and against != "transformers":
            raise UserError(f"against={against}: has no recomputation of activations; leave recompute out")
        with torch.device("meta"), _told(f"against={against}: cannot build this model"):
            ours, theirs = (
                sum(parameter.numel() for parameter in model.parameters())
                for model in (Transformer(case.model, "meta"), code.build())
            )
    if ours != theirs:
        raise UserError(
            f"against={against}: its model has {theirs:,} parameters where ours has {ours:,}; nanogpt trains models as "
            "model=gpt2, litgpt as model=tinyllama, transformers both"
        )
    return code


def _transformers(path: Path | None, model: ModelConfig) -> PeerCode:
    """GPT2LMHeadModel or LlamaForCausalLM, of the config.json of an export."""
    if path is not None:
        raise UserError(f"against_path={path}: only for against=nanogpt and litgpt; transformers must be installed")
    with _told("against=transformers: cannot be imported"):
        import transformers
    sizes = to_config(model)
    kind = getattr(transformers, sizes["architectures"][0])
    config = kind.config_class(**sizes, attn_implementation="sdpa", use_cache=False)

    def loss(peer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        # shift_labels: every position counts, as in our loss.
        return peer(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return PeerCode(f"transformers {kind.__name__}", lambda: kind(config), loss)


def _nanogpt(path: Path | None, model: ModelConfig) -> PeerCode:
    """GPT of a checkout's model.py, which is GPT-2 of any size."""
    needs = "against=nanogpt needs the folder of nanoGPT"
    if path is None:
        raise UserError(f"against_path: is missing; {needs}, which holds model.py")
    file = _file(path, path if path.suffix == ".py" else path / "model.py", needs)
    with _told(f"against_path={path}: model.py cannot be imported"):
        spec = importlib.util.spec_from_file_location("nanogpt_model", file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def build() -> nn.Module:
        sizes = {"n_layer": model.n_layers, "n_head": model.n_heads, "n_embd": model.d_model, "bias": model.bias}
        sizes |= {"block_size": model.max_seq_len, "vocab_size": model.vocab_size}
        return module.GPT(module.GPTConfig(**sizes, dropout=0.0))

    return PeerCode("nanoGPT", build, lambda peer, inputs, targets: peer(inputs, targets)[1])


def _litgpt(path: Path | None, model: ModelConfig) -> PeerCode:
    """litgpt's GPT, which is a Llama of any size; installed, or the folder that holds the package, or the package."""
    before, hint = list(sys.path), "" if path else " (pip install litgpt, or against_path=)"
    if path is not None:
        folder = path.parent if path.name == "litgpt" and (path / "model.py").is_file() else path
        needs = "against=litgpt needs the folder that holds the package litgpt (its checkout, or site-packages)"
        _file(path, folder / "litgpt" / "model.py", needs)
        sys.path.insert(0, str(folder.resolve()))
    try:
        with _told(f"against=litgpt: litgpt cannot be imported{hint}"):
            module = importlib.import_module("litgpt.model")
    finally:
        sys.path[:] = before

    def build() -> nn.Module:
        config = module.Config(
            name="peer",
            block_size=model.max_seq_len,
            vocab_size=model.vocab_size,
            padded_vocab_size=model.vocab_size,
            n_layer=model.n_layers,
            n_embd=model.d_model,
            n_head=model.n_heads,
            n_query_groups=model.n_kv_heads,
            head_size=model.head_dim,
            intermediate_size=model.d_ff,
            rotary_percentage=1.0,
            rope_base=int(model.rope_theta),
            parallel_residual=False,
            bias=model.bias,
            norm_class_name={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
            norm_eps=model.norm_eps,
            mlp_class_name={"swiglu": "LLaMAMLP", "gelu": "GptNeoxMLP"}[model.mlp],
            gelu_approximate="tanh",
        )
        peer = module.GPT(config)
        if model.tie_embeddings:
            peer.transformer.wte.weight = peer.lm_head.weight
        return peer

    def loss(peer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(peer(inputs).flatten(0, 1), targets.flatten())

    try:
        name = f"litgpt {version('litgpt')}"
    except PackageNotFoundError:
        name = "litgpt"
    return PeerCode(name, build, loss)


PEERS = {"transformers": _transformers, "nanogpt": _nanogpt, "litgpt": _litgpt}


@contextlib.contextmanager
def _told(problem: str) -> Iterator[None]:
    """An error in another's code becomes a problem with the input that named it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {type(error).__name__}: {error}") from error


def _file(given: Path, file: Path, needs: str) -> Path:
    """`file`, which the folder that a person gave must hold. Raises UserError if it does not."""
    if not file.is_file():
        lacks = f"holds no {file.relative_to(given)}" if given.exists() else "there is no such file or folder"
        raise UserError(f"against_path={given}: {lacks}; {needs}")
    return file


class Peer:
    """Optimizer steps of the full model in the code of others; `setting` is one of SETTINGS[precision]."""

    def __init__(self, case: Case, code: PeerCode, setting: str):
        self.case, self.code, self.setting = case, code, setting
        with contextlib.redirect_stdout(sys.stderr):
            self.model = code.build().to(case.device).train()
        if case.recompute:
            self.model.gradient_checkpointing_enable()
        if case.compile:
            self.model.compile(dynamic=False)
        self.masters: list[Tensor] = []
        if setting.startswith("bf16"):
            self.masters = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
            self.model.to(torch.bfloat16)
        self.trained = self.masters or list(self.model.parameters())
        optimizer, self.batch = case.optimizer, case.batch()
        groups = [
            {"params": [p for p in self.trained if p.dim() >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in self.trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, optimizer.lr, optimizer.betas, optimizer.eps, fused=True)

    def step(self) -> float:
        """One optimizer step; its seconds."""
        start = device_time(self.case.device)
        for _ in range(self.case.grad_accum):
            with torch.autocast(self.case.device, torch.bfloat16, enabled=self.setting == "autocast"):
                loss = self.code.loss(self.model, *self.batch)
            loss.div(self.case.grad_accum).backward()
        if self.masters:
            for master, weight in zip(self.masters, self.model.parameters(), strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        if self.case.optimizer.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.case.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), self.masters)
        return device_time(self.case.device) - start


def fastest(case: Case, code: PeerCode, warmup: int) -> Peer:
    """The peer in its faster setting, judged on `warmup` steps after one that is not counted."""
    seconds = {}
    for setting in SETTINGS[case.precision]:
        peer = Peer(case, code, setting)
        peer.step()
        seconds[setting] = min(peer.step() for _ in range(max(2, warmup)))
        del peer
    return Peer(case, code, min(seconds, key=seconds.get))
