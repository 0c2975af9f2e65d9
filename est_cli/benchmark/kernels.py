"""The three operations by themselves: how far a version is from float64, and its time against the machine's rates.

Memory limits pack and adamw: bytes over the time, as a part of what a plain copy moves. Matrix products limit the loss:
6·N·D·V FLOPs over the time, as a part of what a large product reaches. On a GPU `ms` is the device's time and `host ms`
what the call takes until it returns; on a CPU they are equal.

R rows, r sampled rows, C columns, N tokens, D d_model, V vocabulary
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from est_cli.benchmark.case import THREE_STAGES, Case
from est_cli.benchmark.measure import interleaved
from est_cli.config import ModelConfig, SamplingConfig
from est_cli.kernels.adamw import Hyperparameters, Move
from est_cli.kernels.dispatch import TORCH, Kernels, has_triton, triton_kernels
from est_cli.model.transformer import Transformer, layer_of, row_kind
from est_cli.subnet.plan import n_rows, subnetwork
from est_cli.subnet.schedule import Rates
from est_cli.training.subnetwork import DTYPES

OPERATIONS = ("pack", "adamw", "loss")
HYPER = Hyperparameters(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
_MOVED = ("parameter", "moment", "square")
_SLEEP_CYCLES = 20_000_000
"""About 10 ms of a GPU: meanwhile the host can queue a whole call."""

Calls = dict[str, Callable[[], object]]
"""Version → one call of it."""
Work = tuple[str, str, Calls, int]
"""The setting, the roof, the versions, and what each of them costs: bytes, or FLOPs under a matrix product's roof."""


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


ODD = [Matrix(7, 5, 3), Matrix(4, 1, 2), Matrix(9, 300, 4), Matrix(1, 37), Matrix(6, 7, 0), Matrix(3, 3)]
"""No multiples of a tile or of 16, one column, one row, a layer that is skipped."""
ALIGNED = [Matrix(6, 48, 2), Matrix(11, 16, 5), Matrix(3, 4096, 2), Matrix(5, 32), Matrix(5, 32, 0)]
SETS = {"odd": ODD, "aligned": ALIGNED, "mixed": ODD + ALIGNED}
HEADS = [(5, 7, 11), (37, 13, 101), (3, 8, 64), (2, 5, 8192), (3, 4, 2 * 8192 + 123)]
"""N, D, V: less than a block of Triton's kernel, exactly one, and more."""


def model_matrices(model: ModelConfig, rates: Rates) -> list[Matrix]:
    """All parameters of a model, as a step at these rates trains them."""
    small, matrices = subnetwork(model, SamplingConfig(), rates).model, []
    for name, parameter in Transformer(model, device="meta").named_parameters():
        kind, layer = row_kind(name), layer_of(name)
        rows = 1 if kind is None else n_rows(kind, model)
        sampled = None if kind is None or n_rows(kind, small) == rows else n_rows(kind, small)
        is_skipped = layer is not None and layer >= small.n_layers
        matrices.append(Matrix(rows, parameter.numel() // rows, 0 if is_skipped else sampled))
    return matrices


def _sampled_rows(matrices: Sequence[Matrix]) -> Iterator[np.ndarray | None]:
    random = np.random.default_rng(0)
    for matrix in matrices:
        yield np.sort(random.permutation(matrix.rows)[: matrix.sampled]) if matrix.sampled else None


def pack_case(matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device) -> tuple[list, list, list]:
    """Arguments of gather_rows: float32 masters, rows, and slots of `dtype`.

    Skipped layers are not packed; in fp32 only sampled rows are.
    """
    packed = [m for m in matrices if m.sampled != 0 and (m.sampled is not None or dtype != torch.float32)]
    return (
        [torch.randn(m.rows, m.columns, device=device) for m in packed],
        [None if rows is None else torch.from_numpy(rows).to(device) for rows in _sampled_rows(packed)],
        [torch.full((m.trained // m.columns, m.columns), torch.nan, dtype=dtype, device=device) for m in packed],
    )


def plain_pack(sources: Sequence[Tensor], rows: Sequence[Tensor | None], slots: Sequence[Tensor]) -> None:
    for source, chosen, slot in zip(sources, rows, slots, strict=True):
        slot.copy_(source if chosen is None else source[chosen])


def adamw_case(matrices: Sequence[Matrix], freeze: bool, device: torch.device) -> list[Move]:
    """Moves of one step, some way into training; the counts of frozen rows differ."""
    random, moves = np.random.default_rng(1), []
    for matrix, rows in zip(matrices, _sampled_rows(matrices), strict=True):
        if freeze and matrix.sampled == 0:
            continue
        shape, trained = (matrix.rows, matrix.columns), (matrix.trained // matrix.columns, matrix.columns)
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
    """The same moves on copies of their tensors."""
    copy = partial(Tensor.to, dtype=dtype, copy=True)
    return [
        replace(
            move,
            **{name: copy(tensor) for name, tensor in zip(_MOVED, move.tensors, strict=True)},
            gradients=[copy(gradient) for gradient in move.gradients],
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


def loss_and_gradients(function, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    loss = function(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss * scale, [hidden, weight])]


@dataclass(frozen=True)
class Check:
    """An error, and the largest that is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # also False for NaN


def check_pack(
    kernels: Kernels, matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Slots are exact copies of the rows, rounded as torch rounds."""
    sources, rows, slots = pack_case(matrices, dtype, device)
    expected = [torch.empty_like(slot) for slot in slots]
    plain_pack(sources, rows, expected)
    kernels.gather_rows(sources, rows, slots)
    wrong = sum((found != right).sum().item() for found, right in zip(slots, expected, strict=True))
    yield Check("elements that differ", wrong, 0)


def check_adamw(
    kernels: Kernels, matrices: Sequence[Matrix], freeze: bool, clip: float | None, device: torch.device
) -> Iterator[Check]:
    """Three steps: at most twice as far from float64's as torch's float32 version."""
    moves = adamw_case(matrices, freeze, device)

    def three_steps(step: Callable[..., None], dtype: torch.dtype) -> list[Move]:
        made, scale = copied(moves, dtype), None if clip is None else torch.tensor(clip, device=device).to(dtype)
        for later in range(3):
            step([replace(move, counts=move.counts + later) for move in made], scale)
        return made

    found, usual = three_steps(kernels.adamw_step, torch.float32), three_steps(TORCH.adamw_step, torch.float32)
    exact = three_steps(TORCH.adamw_step, torch.float64)
    for name in _MOVED:
        ours, theirs, truth = (torch.cat([getattr(m, name).flatten() for m in made]) for made in (found, usual, exact))
        yield Check(name, (ours - truth).abs().max().item(), 2 * (theirs - truth).abs().max().item())


def check_loss(kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype, device) -> Iterator[Check]:
    """The loss and both gradients: at most twice as far from float64's as the plain path's."""
    inputs = head_case(*shape, dtype, device)
    ours, theirs = loss_and_gradients(kernels.linear_cross_entropy, *inputs), loss_and_gradients(plain_loss, *inputs)
    truth = loss_and_gradients(plain_loss, *(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    for name, a, b, c in zip(("loss", "hidden", "weight"), ours, theirs, truth, strict=True):
        error, plain_error = ((t.double() - c).norm().item() for t in (a, b))
        yield Check(name, error, 2 * plain_error + 1e-6 * c.norm().item())


def all_checks(
    operation: str, kernels: Kernels, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[Check]:
    """Every check of pack, adamw or loss, at every shape."""
    if operation == "pack":
        found = {f"{name} {t}": check_pack(kernels, SETS[name], t, device) for name in SETS for t in dtypes}
    elif operation == "adamw":
        found = {
            f"{name} {'freeze' if freeze else 'zero_grad'} {clip=}": check_adamw(kernels, ms, freeze, clip, device)
            for name, ms in SETS.items()
            for freeze in (False, True)
            for clip in (None, 0.37)
        }
    else:
        found = {f"{shape} {t}": check_loss(kernels, shape, t, device) for shape in HEADS for t in dtypes}
    for what, checks in found.items():
        for check in checks:
            yield replace(check, name=f"{what}: {check.name}")


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Bytes a second of a `copy`, read and written, that no cache holds; FLOPs a second of a large matrix product."""
    is_gpu = device.type == "cuda"
    source, size = torch.ones(1 << (30 if is_gpu else 26), device=device), 8192 if is_gpu else 2048
    target = torch.empty_like(source)
    roofs = {"copy": 2 * source.nbytes / _best_of(lambda: target.copy_(source), device)}
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        roofs[name] = 2 * size**3 / _best_of(lambda left=left, right=right: left @ right, device)
    return roofs


def time_operation(
    operation: str, model: str, case: Case, roofs: dict[str, float], rounds: int
) -> Iterator[dict[str, Any]]:
    """Medians of one of OPERATIONS at the sizes of a case: every stage, precision, setting and version."""
    device = torch.device(case.device)
    kernels = {"torch": TORCH} | ({"triton": triton_kernels()} if has_triton(device) else {})
    works = {"pack": _pack_works, "adamw": _adamw_works, "loss": _loss_works}[operation]
    unit, scale = ("TFLOP/s", 1e12) if operation == "loss" else ("GB/s", 1e9)
    for setting, roof, versions, cost in works(case, kernels, device):
        times = interleaved({name: partial(timed, call, device) for name, call in versions.items()}, rounds, 2)
        for name, pairs in times.items():
            seconds, host = (statistics.median(column) for column in zip(*pairs, strict=True))
            yield {
                "work": f"{operation} {model} {setting}",
                "version": name,
                "ms": seconds * 1e3,
                "host_ms": host * 1e3,
                "rate": f"{cost / seconds / scale:.4g} {unit}",
                "of_roof": cost / seconds / roofs[roof],
                "over_torch": statistics.median(a[0] / b[0] for a, b in zip(pairs, times["torch"], strict=True)),
            }


def _pack_works(case: Case, kernels: dict[str, Kernels], device: torch.device) -> Iterator[Work]:
    for (number, stage), (precision, dtype) in product(enumerate(THREE_STAGES, 1), DTYPES.items()):
        packing = pack_case(model_matrices(case.model, stage.rates), dtype, device)
        functions = {"plain": plain_pack} | {name: version.gather_rows for name, version in kernels.items()}
        calls = {name: partial(function, *packing) for name, function in functions.items()}
        if cost := sum(slot.numel() * (4 + slot.element_size()) for slot in packing[-1]):
            yield f"stage {number} {precision}", "copy", calls, cost


def _adamw_works(case: Case, kernels: dict[str, Kernels], device: torch.device) -> Iterator[Work]:
    """Bytes: parameter and moments in and out, and the gradient in."""
    clip = torch.tensor(0.5, device=device)
    for (number, stage), unsampled in product(enumerate(THREE_STAGES, 1), ("zero_grad", "freeze")):
        matrices, freeze = model_matrices(case.model, stage.rates), unsampled == "freeze"
        moves = adamw_case(matrices, freeze, device)
        calls: Calls = {name: partial(version.adamw_step, moves, clip) for name, version in kernels.items()}
        if not freeze and all(m.sampled is None for m in matrices):
            # torch.optim.AdamW in its fastest form, on every element: no clipping, no sampled rows.
            parameters = [torch.zeros(m.rows, m.columns, device=device, requires_grad=True) for m in matrices]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            calls = {"fused": torch.optim.AdamW(parameters, fused=True).step} | calls
        moved = sum(m.trained if freeze else m.rows * m.columns for m in matrices)
        yield f"stage {number} {unsampled}", "copy", calls, 24 * moved + 4 * sum(m.trained for m in matrices)


def _loss_works(case: Case, kernels: dict[str, Kernels], device: torch.device) -> Iterator[Work]:
    n, d, vocabulary = case.tokens, case.model.d_model, case.model.vocab_size
    for precision, dtype in DTYPES.items():
        inputs = head_case(n, d, vocabulary, dtype, device)
        functions = {"plain": plain_loss} | {name: version.linear_cross_entropy for name, version in kernels.items()}
        calls = {name: partial(loss_and_gradients, function, *inputs) for name, function in functions.items()}
        yield f"{n} tokens {precision}", precision, calls, 6 * n * d * vocabulary


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that the device worked, and seconds until the call returned."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start,) * 2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def _best_of(call: Callable[[], object], device: torch.device) -> float:
    return min(timed(call, device)[0] for _ in range(7))
