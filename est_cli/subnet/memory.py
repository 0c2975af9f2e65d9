"""Parameters, and the memory that a training step needs at its peak: an estimate, for planning.

The estimate adds what is known exactly (masters, moments, slots, gradients) to what is modelled (activations
kept for the backward pass, the chunk of logits) and, on a CPU, what a process holds before it trains.

master   a weight of the full model: float32, with two moments of AdamW
slot     the copy of a sampled weight that the subnetwork computes with
"""

from dataclasses import dataclass

from est_cli.config import ModelConfig, TrainConfig
from est_cli.subnet.plan import stage_subnetwork, stage_subnetworks
from est_cli.subnet.schedule import Stage

CPU_PROCESS_BYTES = 300e6
"""Resident memory of the interpreter with torch and the tracking libraries loaded, measured on Linux x86-64."""
CPU_RANK_BYTES = 470e6
"""The same of one among several ranks, with PyTorch's distributed libraries and gloo's buffers."""
CPU_BF16_BYTES_PER_PARAMETER = 4
"""What bf16 products on a CPU hold beyond the slots: measured on GPT-2 124M, not derived."""
CHUNK_LOGITS = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits that exist at a time: est_cli/kernels/linear_cross_entropy.py computes them in chunks."""


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


def training_bytes(config: TrainConfig) -> int:
    """Peak of the costliest stage: bytes on each device, or resident bytes of each process on a CPU.

    The config holds numbers, no `auto`.
    """
    trainer, total = config.trainer, count_parameters(config.model)
    single, cpu = trainer.strategy == "single", trainer.device == "cpu"
    process = 0 if not cpu else CPU_PROCESS_BYTES if single else CPU_RANK_BYTES
    peak = max((_process_bytes if single else _rank_bytes)(config, s.model) for s in stage_subnetworks(config))
    return int(12 * (total.matrices / (1 if single else trainer.shard_size) + total.vectors) + peak + process)


def sent_bytes(config: TrainConfig, stage: Stage) -> int:
    """Bytes that a device sends in an optimizer step of the stage.

    A ring sends (n - 1) / n of a message for an all-gather or a reduce-scatter, and twice that for an all-reduce. The
    columns of the blocks are gathered before each forward and each backward pass, those of the tables once for both.
    """
    trainer = config.trainer
    count = count_parameters(stage_subnetwork(config.model, config.sampling, stage).model)
    ranks, shards, replicas = trainer.devices, trainer.shard_size, trainer.devices // trainer.shard_size
    gathered = trainer.grad_accum * _element(config) * (2 * count.block_matrices + count.embeddings)
    in_group = (gathered + 4 * count.matrices) * (shards - 1) / shards
    between = 2 * 4 * count.matrices / shards * (replicas - 1) / replicas
    return int(in_group + between + 2 * 8 * count.vectors * (ranks - 1) / ranks)


def _process_bytes(config: TrainConfig, small: ModelConfig) -> float:
    """All but the masters in a single process: what the forward pass keeps, slots, and gradients, the head's first."""
    count, table, forward = count_parameters(small), small.vocab_size * small.d_model, _forward_bytes(config, small)
    if config.trainer.precision == "bf16":
        # The head's gradient: summed in fp32, then as bf16 beside the embedding's, and on its way to the sum.
        beside = CPU_BF16_BYTES_PER_PARAMETER * count.total if config.trainer.device == "cpu" else 0
        return forward + (2 + 4) * count.total + (4 + 3 * 2) * table + beside
    return forward + 4 * (count.total + (0 if small == config.model else count.blocks)) + 4 * table


def _rank_bytes(config: TrainConfig, small: ModelConfig) -> float:
    """All but the masters in one of several ranks, with the matrices that it gathers from those that share the masters.

    The peak is one of three moments: the head's gradient is made, the first block's is, or the tables' gradients are
    sent; by then the backward pass has freed activations and logits.
    """
    trainer, element, table = config.trainer, _element(config), small.vocab_size * small.d_model
    bf16, shards, gathers = trainer.precision == "bf16", trainer.shard_size, trainer.shard_size > 1
    count, forward = count_parameters(small), _forward_bytes(config, small)
    tables, blocks = count.embeddings, count.block_matrices
    block = blocks / max(1, small.n_layers)
    slots = 0 if small == config.model else 4 * blocks / shards
    if trainer.grad_accum > 1:
        slots += 4 * count.matrices  # gradients are whole on each rank until the last micro-batch reduces them
    if bf16 and trainer.device == "cpu":
        slots += CPU_BF16_BYTES_PER_PARAMETER * block
    gathered = element * (tables + (2 * block if gathers else blocks))
    # A gradient is copied before it is sent: cast to fp32, and before that with its columns in the order of the ranks.
    travelling = 4 + element * (2 if gathers else 1)
    head = gathered + forward + (4 + 3 * 2 if bf16 else 2 * 4) * table
    first_block = gathered + forward + element * table + (2 * element * gathers + travelling) * block
    last = 4 * count.matrices / shards + travelling * tables
    return slots + max(head, first_block, last)


def _forward_bytes(config: TrainConfig, small: ModelConfig) -> float:
    """What the forward pass keeps for the backward pass, and the largest chunk of logits."""
    tokens, cpu = config.trainer.batch_size * config.data.seq_len, config.trainer.device == "cpu"
    width, query, key_value = small.d_model, small.n_heads * small.head_dim, small.n_kv_heads * small.head_dim
    block = 4 * width + 2 * (query + 2 * key_value) + 2 * query + (4 if small.gated else 2) * small.d_ff
    layers = small.n_layers
    kept = (layers * width + block if config.trainer.recompute == "block" else layers * block) + 4 * width
    # The gradient of bf16 logits is made from a copy in fp32, on a GPU of all at once.
    logit = _element(config) + (4 if config.trainer.precision == "bf16" and not cpu else 0)
    logits = logit * min(tokens * small.vocab_size, CHUNK_LOGITS[config.trainer.device])
    return logits + tokens * _element(config) * kept


def _element(config: TrainConfig) -> int:
    """Bytes of a number in the precision of the run."""
    return 2 if config.trainer.precision == "bf16" else 4
