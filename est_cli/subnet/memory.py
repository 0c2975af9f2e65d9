"""Parameters, and the memory that a training step needs at its peak: an estimate, for planning.

The estimate adds what is known exactly (masters, moments, slots, gradients) to what is modelled (activations
kept for the backward pass, the chunk of logits) and, on a CPU, what a process holds before it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from est_cli.config import ModelConfig

CPU_PROCESS_BYTES = 300e6
"""Resident memory of the interpreter with torch and the tracking libraries loaded, measured on Linux x86-64."""
CPU_BF16_BYTES_PER_PARAMETER = 4
"""What bf16 products on a CPU hold beyond the slots: measured on GPT-2 124M, not derived."""
CPU_LOGITS = 32 << 20
CUDA_LOGITS = 256 << 20
"""Elements of the largest chunk of logits; see est_cli/kernels/linear_cross_entropy.py."""


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters."""

    blocks: int
    embeddings: int
    """Token and position embeddings, and the head where it is not tied."""
    norm: int

    @property
    def total(self) -> int:
        return self.blocks + self.embeddings + self.norm


def count_parameters(model: ModelConfig) -> Parameters:
    """Every parameter of the model that `est_cli.model.transformer.Transformer` builds."""
    query = model.n_heads * model.head_dim
    qkv = query + 2 * model.n_kv_heads * model.head_dim
    up = (2 if model.gated else 1) * model.d_ff
    norm = model.d_model * (2 if model.norm == "layernorm" else 1)
    matrices = model.d_model * (qkv + query + up + model.d_ff)
    biases = (qkv + up + 2 * model.d_model) if model.bias else 0
    tables = model.vocab_size * (1 if model.tie_embeddings else 2)
    tables += model.max_seq_len if model.position == "learned" else 0
    return Parameters(model.n_layers * (matrices + biases + 2 * norm), tables * model.d_model, norm)


def checkpoint_bytes(model: ModelConfig) -> tuple[int, int]:
    """Size of a checkpoint: weights alone, and with the optimizer's two moments."""
    weights = 4 * count_parameters(model).total
    return weights, 3 * weights


def training_bytes(
    full: ModelConfig,
    stages: Sequence[ModelConfig],
    batch_size: int,
    seq_len: int,
    bf16: bool,
    recompute: bool,
    cpu: bool,
    shards: int = 1,
) -> int:
    """Peak of the costliest stage: bytes on the device, or resident bytes of the process on a CPU.

    `shards` is the number of ranks that share the masters and moments, whole tensors each (trainer.shard).
    """
    largest = full.vocab_size * full.d_model
    masters_and_moments = 12 * max(count_parameters(full).total / shards, largest)
    peak = max(_stage_bytes(full, small, batch_size * seq_len, bf16, recompute, cpu, shards > 1) for small in stages)
    return int(masters_and_moments + peak + (CPU_PROCESS_BYTES if cpu else 0))


def sent_bytes(small: ModelConfig, devices: int, sharded: bool, bf16: bool) -> int:
    """Bytes that a device sends in an optimizer step whose subnetwork is `small`: gradients, and slots where sharded.

    Of a message a ring sends (devices - 1) / devices for a reduction or a broadcast, and twice that for an all-reduce.
    """
    element = (2 if bf16 else 4) + 4 if sharded else 2 * 4
    return element * count_parameters(small).total * (devices - 1) // devices


def _stage_bytes(
    full: ModelConfig, small: ModelConfig, tokens: int, bf16: bool, recompute: bool, cpu: bool, sharded: bool
) -> float:
    parameters, table = count_parameters(small), full.vocab_size * full.d_model
    if bf16:
        slots_and_gradients = (2 + 4) * parameters.total
        # The head's gradient: summed in fp32, then as bf16 beside the embedding's, and on its way to the sum.
        head_gradient = (4 + 3 * 2) * table
        slots_and_gradients += CPU_BF16_BYTES_PER_PARAMETER * parameters.total if cpu else 0
    else:
        packed = parameters.total if sharded else 0 if small == full else parameters.blocks
        slots_and_gradients = 4 * (packed + parameters.total)
        head_gradient = 4 * table
    element = 2 if bf16 else 4
    # Their gradient in bf16 is made from a copy in fp32, on a GPU of all at once.
    logit = element + (4 if bf16 and not cpu else 0)
    logits = logit * min(tokens * full.vocab_size, CPU_LOGITS if cpu else CUDA_LOGITS)
    activations = tokens * element * _activation_elements(small, recompute)
    return slots_and_gradients + head_gradient + logits + activations


def _activation_elements(model: ModelConfig, recompute: bool) -> float:
    """Numbers a token keeps for the backward pass."""
    width, query, key_value = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    block = 4 * width + 2 * (query + 2 * key_value) + 2 * query + (4 if model.gated else 2) * model.d_ff
    layers = model.n_layers
    return (layers * width + block if recompute else layers * block) + 4 * width
