"""A stage's subnetwork: the sampled rows packed into a small dense model, and its gradients on the way back.

Sizes depend on the stage and indices on the step, so a stage allocates its slots once and every step only
fills them. In fp32, tensors that are not sampled share storage with the master, and with every count full the
subnetwork is the master itself. In bf16 every slot is a bf16 copy, and a hook adds each slot's gradient to an
fp32 accumulator. est_cli/training/sharded.py does the same on several ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from est_cli.kernels.pack import upload
from est_cli.model.transformer import BlockMask, Transformer, layer_of, row_kind, set_parameter
from est_cli.subnet.plan import Plan, Subnetwork, n_rows, sampled_rows, whole_plan
from est_cli.training.profile import phase
from est_cli.training.stacks import Stack, as_rows, new_stacks, rows_in, stack_master

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Update:
    """What one optimizer step does to one master parameter: the gradient of its sampled `rows`, None for all."""

    name: str
    rows: np.ndarray | None
    gradient: Tensor
    is_sharded: bool = False
    """The gradient is this rank's columns, averaged over all ranks by the backward pass."""


class Accumulators:
    """Sums of the slots' gradients in fp32, by name, stacked as the slots are.

    The slots' hooks hold these and nothing else: a cycle that leads through a hook is never collected, and would keep
    every subnetwork of the run alive.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._started: set[str] = set()

    def restart(self) -> None:
        """The next gradient of every slot begins a new sum."""
        self._started.clear()

    def watch(self, stack: Stack, slots: Mapping[str, nn.Parameter]) -> None:
        """Add every gradient of the stack's slots as soon as the backward pass has made it, and drop it."""
        like = {name: torch.empty_like(slots[name], device="meta") for name in stack.places}
        make = partial(_new_sums, stack.matrix.shape, stack.matrix.device, stack.places, like)
        for name in stack.places:
            slots[name].register_post_accumulate_grad_hook(partial(self._add, name, make))

    def _add(self, name: str, make: Callable[[], dict[str, Tensor]], slot: nn.Parameter) -> None:
        if name not in self.sums:
            # Made by the first backward pass, so that a subnetwork that only evaluates never pays for them.
            self.sums |= make()
        if name in self._started:
            self.sums[name].add_(slot.grad)
        else:
            self.sums[name].copy_(slot.grad)
            self._started.add(name)
        slot.grad = None


def _new_sums(
    size: torch.Size, device: torch.device, places: Mapping[str, slice], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return Stack(torch.empty(size, dtype=torch.float32, device=device), places).views(like)


class PackedSubnetwork:
    """Pack, dense small model, unpack."""

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype):
        self._masters = {name: stack for stack in stack_master(master) for name in stack.places}
        self.master = dict(master.named_parameters())
        first = next(iter(self.master.values()))
        self.device, self.dtype, self.master_dtype = first.device, dtype, first.dtype
        self.shape, self.full, self.small, self.kernels = shape, master.config, shape.model, master.kernels
        self.casts = dtype != self.master_dtype
        self.scale_dtype = torch.promote_types(dtype, torch.float32)
        self.is_master = self._is_master()
        self._slots: list[Stack] = []
        self._shared: list[str] = []
        if self.is_master:
            self.module = master
        else:
            self.module = Transformer(shape, "meta", dtype, master.recompute, master.kernels)
            self._allocate()
        self.parameters = dict(self.module.named_parameters())
        self._sampled = {name: (row_kind(name), layer_of(name)) for name in self.parameters if self._is_sampled(name)}
        self.rows: dict[str, np.ndarray] = {}
        """Rows of the master's parameter that each packed parameter holds, if it is sampled by rows."""
        self.names: dict[str, str] = {name: name for name in self.parameters}
        self.accumulators = Accumulators()
        for stack in self._slots:
            if stack.matrix.dtype != self.master_dtype:
                self.accumulators.watch(stack, {name: self.parameters[name] for name in stack.places})

    @phase("pack")
    def load(self, plan: Plan) -> None:
        """Fill the slots with the rows of `plan`, and drop the gradients of the step before."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.accumulators.restart()
        if self.is_master:
            return
        if self.small.n_layers != self.full.n_layers:
            self.names = {name: _in_master(name, plan) for name in self.parameters}
        self.rows = self._rows_of(plan)
        self._share()
        if self.shape.is_scaled:
            self.scales.copy_(upload(plan.scales, self.device))
        self.kernels.gather_rows(
            [self._masters[self.names[next(iter(slots.places))]].matrix for slots in self._slots],
            self._indices(self._slots),
            [slots.matrix for slots in self._slots],
        )

    def load_whole(self) -> None:
        """As `load`, where the subnetwork is all that has joined: there is nothing to choose."""
        self.load(whole_plan(self.small))

    def reduce_next(self, reduces: bool) -> None:
        """Whether the next backward pass averages gradients over the ranks: that of the last micro-batch does."""

    @phase("forward")
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of one micro-batch [B, T]; differentiable."""
        return self.module(inputs, targets)

    def updates(self) -> list[Update]:
        """The accumulated gradients, in the master's parameter order."""
        return [self._update(name, parameter) for name, parameter in self.parameters.items()]

    def _update(self, name: str, parameter: nn.Parameter) -> Update:
        gradient = self.accumulators.sums.get(name, parameter.grad)
        return Update(self.names[name], self.rows.get(name), gradient)

    def _is_master(self) -> bool:
        """Whether the subnetwork needs no memory: it is the full model, in its own type."""
        return self.small == self.full and not self.casts

    def _is_sampled(self, name: str) -> bool:
        kind = row_kind(name)
        return kind is not None and n_rows(kind, self.small) != n_rows(kind, self.full)

    def _is_copied(self, name: str, parameter: Tensor) -> bool:
        """Whether a packed parameter has a slot of its own; else it shares the master's storage."""
        return self.casts or self._is_sampled(name)

    def _held(self, parameter: Tensor) -> Tensor:
        """A meta tensor of the shape and type in which a packed parameter is held here."""
        return parameter

    def _allocate(self) -> None:
        """Give every parameter a slot of its own, or the master's storage where it can share."""
        held = {name: self._held(parameter.data) for name, parameter in self.module.named_parameters()}
        copied = {name: like for name, like in held.items() if self._is_copied(name, like)}
        self._slots = new_stacks(copied, self.small, self.device)
        self._shared = [name for name in held if name not in copied]
        tensors = {name: self.master[name].data for name in self._shared}
        for stack in self._slots:
            tensors |= stack.views(held)
        self._place(tensors)
        if self.shape.is_scaled:
            self.scales = torch.ones(self.small.n_layers, 2, dtype=self.scale_dtype, device=self.device)
            for block, own in zip(self.module.blocks, self.scales, strict=True):
                block.scales = own

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the parameters of the module."""
        for name, tensor in tensors.items():
            set_parameter(self.module, name, tensor)

    def _share(self) -> None:
        """Point the tensors that are not copied at the master's storage: the plan chooses the layers."""
        for name in self._shared:
            source = self.master[self.names[name]]
            if self.parameters[name].data_ptr() != source.data_ptr():
                self.parameters[name].data = source.data

    def _rows_of(self, plan: Plan) -> dict[str, np.ndarray]:
        """Sampled rows of every packed parameter."""
        units = dict.fromkeys(self._sampled.values())
        rows = {(kind, position): sampled_rows(kind, self.full, plan, position) for kind, position in units}
        return {name: rows[unit] for name, unit in self._sampled.items()}

    def _indices(self, slots: Sequence[Stack]) -> list[Tensor | None]:
        """The master's row of every row of the slots; None for all. They travel to the device in one copy."""
        hosts = [np.concatenate([self._in_stack(name) for name in stack.places]) for stack in slots]
        assert all((np.diff(host) > 0).all() for host in hosts), "a row is sampled once, and in order"
        masters = [self._masters[self.names[next(iter(stack.places))]] for stack in slots]
        chosen = [len(host) < len(master.matrix) for host, master in zip(hosts, masters, strict=True)]
        sizes = [len(host) if some else 0 for host, some in zip(hosts, chosen, strict=True)]
        if not any(chosen):
            return [None] * len(slots)
        parts = upload(np.concatenate([h for h, some in zip(hosts, chosen, strict=True) if some]), self.device)
        return [part if some else None for part, some in zip(parts.split(sizes), chosen, strict=True)]

    def _in_stack(self, name: str) -> np.ndarray:
        """The rows of a packed parameter in the master's stack."""
        place = self._masters[self.names[name]].places[self.names[name]]
        return rows_in(place, self.rows.get(name))


Pack = Callable[[Transformer, Subnetwork, torch.dtype], PackedSubnetwork]


class MaskedSubnetwork:
    """The full model with literal 0/1 masks: what masking alone costs. Same plans, same updates."""

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, pack: Pack = PackedSubnetwork):
        self.full = pack(master, Subnetwork(master.config), dtype)
        self.shape, self.config = shape, master.config
        self.masks: list[BlockMask] = []

    @property
    def module(self) -> Transformer:
        return self.full.module

    @phase("pack")
    def load(self, plan: Plan) -> None:
        self.full.load_whole()
        self.plan = plan
        self.masks = [self._mask(layer) for layer in range(self.config.n_layers)]

    def reduce_next(self, reduces: bool) -> None:
        self.full.reduce_next(reduces)

    @phase("forward")
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module(inputs, targets, self.masks)

    def updates(self) -> list[Update]:
        positions = {layer: position for position, layer in enumerate(self.plan.layers.tolist())}
        updates = []
        for update in self.full.updates():
            layer, kind = layer_of(update.name), row_kind(update.name)
            if layer is not None and layer not in positions:
                continue
            if kind is not None and n_rows(kind, self.config) != n_rows(kind, self.shape.model):
                host = sampled_rows(kind, self.config, self.plan, positions[layer])
                index = torch.from_numpy(host).to(update.gradient.device)
                gradient = as_rows(update.name, update.gradient, self.config)[index]
                update = replace(update, rows=host, gradient=gradient)
            updates.append(update)
        return updates

    def _mask(self, layer: int) -> BlockMask:
        config, device = self.config, self.full.device
        heads = torch.zeros(config.n_heads, device=device, dtype=self.full.dtype)
        neurons = torch.zeros(config.d_ff, device=device, dtype=self.full.dtype)
        scales = torch.zeros(2, device=device, dtype=self.full.scale_dtype)
        kept = np.flatnonzero(self.plan.layers == layer)
        if len(kept):
            units = np.array([self.shape.head_scale, self.shape.mlp_scale])
            heads[torch.from_numpy(self.plan.heads[kept[0]])] = units[0]
            neurons[torch.from_numpy(self.plan.neurons[kept[0]])] = units[1]
            scales.copy_(torch.from_numpy(self.plan.scales[kept[0]] / units))
        return BlockMask(heads, neurons, scales)


def _in_master(name: str, plan: Plan) -> str:
    """The master's name of a packed parameter: layers are renumbered by the plan."""
    position = layer_of(name)
    if position is None:
        return name
    return f"blocks.{plan.layers[position]}.{name.split('.', 2)[2]}"
