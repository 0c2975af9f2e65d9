"""Inputs of the three operations, and the plain way to compute the same: what tests and benchmark share.

R rows, r sampled rows, C columns, N tokens, D d_model, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from est_cli.config import ModelConfig, SamplingConfig
from est_cli.kernels.adamw import Hyperparameters, Move, Rows
from est_cli.model.transformer import Transformer, layer_of, row_kind
from est_cli.subnet.plan import n_rows, subnetwork
from est_cli.subnet.schedule import Rates

HYPER = Hyperparameters(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@dataclass(frozen=True)
class Matrix:
    """A parameter as rows: [rows, columns], of which `sampled` train; None for all, 0 for a skipped layer."""

    rows: int
    columns: int
    sampled: int | None = None

    @property
    def trained(self) -> int:
        """Elements that get a gradient."""
        return self.columns * (self.rows if self.sampled is None else self.sampled)


@dataclass(frozen=True)
class PackCase:
    sources: list[Tensor]
    rows: list[Tensor | None]
    slots: list[Tensor]


def model_matrices(model: ModelConfig, rates: Rates) -> list[Matrix]:
    """All parameters of a model, as a step at these rates trains them."""
    small = subnetwork(model, SamplingConfig(), rates).model
    matrices = []
    for name, parameter in Transformer(model, device="meta").named_parameters():
        kind, layer = row_kind(name), layer_of(name)
        rows = 1 if kind is None else n_rows(kind, model)
        sampled = None if kind is None or n_rows(kind, small) == rows else n_rows(kind, small)
        if layer is not None and layer >= small.n_layers:
            sampled = 0
        matrices.append(Matrix(rows, parameter.numel() // rows, sampled))
    return matrices


def pack_case(matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device) -> PackCase:
    """float32 masters and slots of `dtype`. Skipped layers are not packed; in fp32 only sampled rows are."""
    packed = [m for m in matrices if m.sampled != 0 and (m.sampled is not None or dtype != torch.float32)]
    rows = _sampled_rows(packed, device)
    return PackCase(
        [torch.randn(m.rows, m.columns, device=device) for m in packed],
        [None if r is None else r.device for r in rows],
        [torch.full((m.trained // m.columns, m.columns), torch.nan, dtype=dtype, device=device) for m in packed],
    )


def plain_pack(case: PackCase) -> None:
    for source, rows, slot in zip(case.sources, case.rows, case.slots, strict=True):
        slot.copy_(source if rows is None else source[rows])


def adamw_case(matrices: Sequence[Matrix], freeze: bool, device: torch.device) -> list[Move]:
    """Moves of one step, some way into training; the counts of frozen rows differ."""
    random, moves = np.random.default_rng(1), []
    for matrix, rows in zip(matrices, _sampled_rows(matrices, device), strict=True):
        if freeze and matrix.sampled == 0:
            continue
        shape = (matrix.rows, matrix.columns)
        trained = (matrix.trained // matrix.columns, matrix.columns)
        moves.append(
            Move(
                parameter=torch.randn(shape, device=device),
                moment=0.01 * torch.randn(shape, device=device),
                square=1e-4 * torch.rand(shape, device=device),
                gradients=[] if matrix.sampled == 0 else [0.01 * torch.randn(trained, device=device)],
                rows=rows,
                counts=random.integers(1, 50, trained[0]) if freeze else 7,
                hyper=HYPER if matrix.rows > 1 else replace(HYPER, weight_decay=0.0),
            )
        )
    return moves


def copied(moves: Sequence[Move], dtype: torch.dtype) -> list[Move]:
    """The same moves on tensors of their own: a float64 copy of the inputs shows a version's error."""
    return [
        replace(
            move,
            **{name: getattr(move, name).to(dtype, copy=True) for name in ("parameter", "moment", "square")},
            gradients=[gradient.to(dtype, copy=True) for gradient in move.gradients],
        )
        for move in moves
    ]


def head_case(n: int, d: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Hidden states [N, D] and weight [V, D], which require gradients, and targets [N]; logits of a few units."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device)
    weight = 2 * d**-0.5 * torch.randn(vocabulary, d, generator=generator, device=device)
    targets = torch.randint(vocabulary, (n,), generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The head as people write it: logits in the inputs' type, softmax in at least float32."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def loss_and_gradients(function, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    loss = function(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def _sampled_rows(matrices: Sequence[Matrix], device: torch.device) -> list[Rows | None]:
    random, found = np.random.default_rng(0), []
    for matrix in matrices:
        if not matrix.sampled:
            found.append(None)
            continue
        host = np.sort(random.permutation(matrix.rows)[: matrix.sampled])
        found.append(Rows(host, torch.from_numpy(host).to(device)))
    return found
