"""The peer: the same architecture in Hugging Face transformers, trained in its fastest honest setting.

SDPA attention, no cache, fused AdamW, the same tokens and threads, compiled if ours is. In bf16, the better of
autocast over fp32 weights and of bf16 weights with fp32 masters is the one that counts.
"""

import time

import torch
from torch import Tensor, nn

from est_cli.benchmark.case import Case

SETTINGS = {"fp32": ("fp32",), "bf16": ("autocast", "bf16 weights, fp32 masters")}


def build_model(case: Case) -> nn.Module:
    """GPT2LMHeadModel or LlamaForCausalLM of the case's sizes. Raises ImportError without transformers."""
    import transformers

    model = case.model
    if model.position == "learned":
        config = transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_seq_len,
            n_embd=model.d_model,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            n_inner=model.d_ff,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_seq_len,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        intermediate_size=model.d_ff,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


class Peer:
    """Optimizer steps of the full model in transformers; `setting` is one of SETTINGS[precision]."""

    def __init__(self, case: Case, setting: str):
        self.case, self.setting = case, setting
        model = build_model(case).to(case.device).train()
        if case.recompute:
            model.gradient_checkpointing_enable()
        if case.compile:
            model.compile(dynamic=False)
        self.masters: list[Tensor] = []
        if setting.startswith("bf16"):
            self.masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
            model = model.to(torch.bfloat16)
        self.model = model
        trained = self.masters or list(model.parameters())
        optimizer = case.optimizer
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.trained = trained
        self.batch = case.batch()

    def step(self) -> float:
        """One optimizer step; its seconds."""
        start = self._now()
        for _ in range(self.case.grad_accum):
            self._loss().div(self.case.grad_accum).backward()
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
        return self._now() - start

    def _loss(self) -> Tensor:
        inputs, targets = self.batch
        with torch.autocast(self.case.device, torch.bfloat16, enabled=self.setting == "autocast"):
            # shift_labels: our targets are shifted already, and every position counts, as in our loss.
            return self.model(input_ids=inputs, labels=targets, shift_labels=targets).loss

    def _now(self) -> float:
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def fastest(case: Case, warmup: int) -> Peer:
    """The peer in the faster of its settings, judged on `warmup` steps after one that is not counted."""
    best: tuple[float, str] | None = None
    for setting in SETTINGS[case.precision]:
        peer = Peer(case, setting)
        peer.step()
        seconds = min(peer.step() for _ in range(max(2, warmup)))
        del peer
        if best is None or seconds < best[0]:
            best = (seconds, setting)
    return Peer(case, best[1])
