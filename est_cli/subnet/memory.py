"""Parameters, and the memory that a training step needs at its peak: an estimate, for planning.

The estimate adds what is known exactly (masters, moments, slots, gradients) to what is modelled (activations
kept for the backward pass, the chunk of logits) and, on a CPU, what a process holds before it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from est_cli.config import ModelConfig

CPU_PROCESS_BYTES = 300e6
"""Resident memory of the interpreter with torch and the tracking libraries loaded, measured on Linux x86-64."""
CPU_RANK_BYTES = 470e6
"""The same of one among several ranks, with PyTorch's distributed libraries and gloo's buffers."""
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
    vectors: int
    """Biases and norms, which are among the others too."""

    @property
    def total(self) -> int:
        return self.blocks + self.embeddings + self.norm

    @property
    def matrices(self) -> int:
        return self.total - self.vectors

    @property
    def block_matrices(self) -> int:
        return self.matrices - self.embeddings


@dataclass(frozen=True)
class Ranks:
    """The ranks that train together, `shards` of which share one copy of the master weights and moments."""

    total: int
    shards: int = 1

    @property
    def replicas(self) -> int:
        return self.total // self.shards


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
    vectors = model.n_layers * (biases + 2 * norm)
    return Parameters(model.n_layers * matrices + vectors, tables * model.d_model, norm, vectors + norm)


def checkpoint_bytes(model: ModelConfig) -> tuple[int, int]:
    """Size of a checkpoint: the weights only, and with the optimizer's two moments."""
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
    ranks: Ranks | None = None,
    grad_accum: int = 1,
) -> int:
    """Peak of the costliest stage: bytes on the device, or resident bytes of the process on a CPU.

    `ranks` are those that train together, None for one process.
    """
    tokens, total, shards = batch_size * seq_len, count_parameters(full), 1 if ranks is None else ranks.shards
    logits, peak = _logits(full, tokens, bf16, cpu), 0.0
    for small in stages:
        forward = logits + tokens * (2 if bf16 else 4) * _activation_elements(small, recompute)
        if ranks is None:
            peak = max(peak, forward + _packed_bytes(full, small, bf16, cpu))
        else:
            peak = max(peak, _spread_bytes(full, small, bf16, cpu, shards, grad_accum, forward))
    process = 0 if not cpu else CPU_PROCESS_BYTES if ranks is None else CPU_RANK_BYTES
    return int(12 * (total.matrices / shards + total.vectors) + peak + process)


def sent_bytes(small: ModelConfig, ranks: Ranks, bf16: bool, grad_accum: int = 1) -> int:
    """Bytes that a device sends in an optimizer step whose subnetwork is `small`.

    A ring sends (n - 1) / n of a message for an all-gather or a reduce-scatter, and twice that for an all-reduce. The
    columns of the blocks are gathered before each forward and each backward pass, those of the tables once for both.
    """
    count, element = count_parameters(small), 2 if bf16 else 4
    blocks = count.block_matrices
    gathered = grad_accum * element * (2 * blocks + count.embeddings)
    in_group = (gathered + 4 * count.matrices) * (ranks.shards - 1) / ranks.shards
    between = 2 * 4 * count.matrices / ranks.shards * (ranks.replicas - 1) / ranks.replicas
    return int(in_group + between + 2 * 8 * count.vectors * (ranks.total - 1) / ranks.total)


def _packed_bytes(full: ModelConfig, small: ModelConfig, bf16: bool, cpu: bool) -> float:
    """Slots and gradients of one process, with the head's, which is made first."""
    count, table = count_parameters(small), full.vocab_size * full.d_model
    if bf16:
        # The head's gradient: summed in fp32, then as bf16 beside the embedding's, and on its way to the sum.
        beside = CPU_BF16_BYTES_PER_PARAMETER * count.total if cpu else 0
        return (2 + 4) * count.total + (4 + 3 * 2) * table + beside
    return 4 * (count.total + (0 if small == full else count.blocks)) + 4 * table


def _spread_bytes(
    full: ModelConfig, small: ModelConfig, bf16: bool, cpu: bool, shards: int, grad_accum: int, forward: float
) -> float:
    """Slots, gathered matrices and gradients of a rank, `shards` of which share a copy of the masters.

    The most are there at one of three moments: when the head's gradient is made, when the first block's is, and when
    the tables' are on their way. `forward` are the activations and logits, which the backward pass frees.
    """
    count, table, element = count_parameters(small), full.vocab_size * full.d_model, 2 if bf16 else 4
    tables, blocks = count.embeddings, count.block_matrices
    block, gathers = blocks / max(1, small.n_layers), shards > 1
    slots = 0 if small == full else 4 * blocks / shards
    if grad_accum > 1:
        slots += 4 * count.matrices  # gradients are whole on each rank until the last micro-batch reduces them
    if bf16 and cpu:
        slots += CPU_BF16_BYTES_PER_PARAMETER * block
    gathered = element * (tables + (2 * block if gathers else blocks))
    # On its way a gradient is copied: cast to fp32, and before that with its columns in the order of the ranks.
    travelling = 4 + element * (2 if gathers else 1)
    head = gathered + forward + (4 + 3 * 2 if bf16 else 2 * 4) * table
    first_block = gathered + forward + element * table + (2 * element * gathers + travelling) * block
    last = 4 * count.matrices / shards + travelling * tables
    return slots + max(head, first_block, last)


def _logits(full: ModelConfig, tokens: int, bf16: bool, cpu: bool) -> float:
    """The largest chunk; its gradient in bf16 is made from a copy in fp32, on a GPU of all at once."""
    each = (2 if bf16 else 4) + (4 if bf16 and not cpu else 0)
    return each * min(tokens * full.vocab_size, CPU_LOGITS if cpu else CUDA_LOGITS)


def _activation_elements(model: ModelConfig, recompute: bool) -> float:
    """Numbers a token keeps for the backward pass."""
    width, query, key_value = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    block = 4 * width + 2 * (query + 2 * key_value) + 2 * query + (4 if model.gated else 2) * model.d_ff
    layers = model.n_layers
    return (layers * width + block if recompute else layers * block) + 4 * width
