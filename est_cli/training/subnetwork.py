"""A stage's subnetwork: the sampled rows packed into a small dense model, and its gradients on the way back.

Sizes depend on the stage and indices on the step, so a stage allocates its slots once and every step only
fills them. In fp32, tensors that are not sampled share storage with the master, and with every count full the
subnetwork is the master itself. In bf16 every slot is a bf16 copy, and a hook adds each slot's gradient to an
fp32 accumulator. Of a sharded master every slot is a copy, which comes from the rank that holds the parameter.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from est_cli.config import ModelConfig
from est_cli.kernels.adamw import Rows
from est_cli.kernels.upload import upload
from est_cli.model.transformer import BlockMask, Transformer, layer_of, row_kind, set_parameter
from est_cli.subnet.plan import Plan, Subnetwork, whole_plan
from est_cli.subnet.rows import n_rows, sampled_rows
from est_cli.training.shards import Shards, whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Update:
    """What one optimizer step does to one master parameter: the gradient of its sampled rows."""

    name: str
    rows: Rows | None
    gradient: Tensor


class Accumulators:
    """Sums of the slots' gradients in fp32, by name.

    The slots' hooks hold these and nothing else: a cycle that leads through a hook is never collected, and would keep
    every subnetwork of the run alive.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._started: set[str] = set()

    def restart(self) -> None:
        """The next gradient of every slot begins its sum anew."""
        self._started.clear()

    def watch(self, name: str, slot: nn.Parameter) -> None:
        """Add every gradient of `slot` as soon as the backward pass has made it, and drop it."""
        slot.register_post_accumulate_grad_hook(lambda slot: self._add(name, slot))

    def _add(self, name: str, slot: nn.Parameter) -> None:
        if name not in self.sums:
            # Made by the first backward pass, so that a subnetwork that only evaluates never pays for them.
            self.sums[name] = torch.empty_like(slot, dtype=torch.float32)
        if name in self._started:
            self.sums[name].add_(slot.grad)
        else:
            self.sums[name].copy_(slot.grad)
            self._started.add(name)
        slot.grad = None


class PackedSubnetwork:
    """Pack, dense small model, unpack."""

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, shards: Shards | None = None):
        self.master = dict(master.named_parameters())
        self.shards = shards or whole(master)
        self.device = self.shards.world.device
        self.shape, self.full, self.small, self.kernels = shape, master.config, shape.model, master.kernels
        self.casts = dtype != next(iter(self.master.values())).dtype
        self.copies = self.casts or self.shards.is_sharded
        self.scale_dtype = torch.promote_types(dtype, torch.float32)
        self.is_master = self.small == self.full and not self.copies
        if self.is_master:
            self.module = master
        else:
            self.module = Transformer(shape, "meta", dtype, master.recompute, master.kernels)
            self._allocate(dtype)
        self.parameters = dict(self.module.named_parameters())
        self._matrices = {name: as_rows(name, p.data, self.full) for name, p in self.master.items()}
        self._slots = {name: as_rows(name, p.data, self.small) for name, p in self.parameters.items()}
        self._sampled = {name: (row_kind(name), layer_of(name)) for name in self.parameters if self._is_sampled(name)}
        self.rows: dict[str, Rows] = {}
        self.names: dict[str, str] = {name: name for name in self.parameters}
        self.accumulators = Accumulators()
        if self.casts:
            for name, parameter in self.parameters.items():
                self.accumulators.watch(name, parameter)

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
        if not self.copies:
            self._share()
        if self.shape.is_scaled:
            self.scales.copy_(upload(plan.scales, self.device))
        copied = list(self.parameters if self.copies else self.rows)
        held = [name for name in copied if self.shards.holds(self.names[name])]
        self.kernels.gather_rows(
            [self._matrices[self.names[name]] for name in held],
            [self.rows[name].device if name in self.rows else None for name in held],
            [self._slots[name] for name in held],
        )
        self.shards.spread({self.names[name]: self.parameters[name].data for name in copied})

    def load_whole(self) -> None:
        """As `load`, where the subnetwork is all that has joined: there is nothing to choose."""
        self.load(whole_plan(self.small))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of one micro-batch [B, T]; differentiable."""
        return self.module(inputs, targets)

    def updates(self) -> list[Update]:
        """The accumulated gradients, in the master's parameter order."""
        return [Update(self.names[name], self.rows.get(name), self._gradient(name)) for name in self.parameters]

    def _gradient(self, name: str) -> Tensor:
        return self.accumulators.sums[name] if self.casts else self.parameters[name].grad

    def _is_sampled(self, name: str) -> bool:
        kind = row_kind(name)
        return kind is not None and n_rows(kind, self.small) != n_rows(kind, self.full)

    def _allocate(self, dtype: torch.dtype) -> None:
        """Give every parameter a slot of its own, or the master's storage where it can share."""
        for name, parameter in list(self.module.named_parameters()):
            source = self.master[name]
            shares = not self.copies and not self._is_sampled(name)
            data = source.data if shares else torch.empty(parameter.shape, dtype=dtype, device=self.device)
            set_parameter(self.module, name, data)
        if self.shape.is_scaled:
            self.scales = torch.ones(self.small.n_layers, 2, dtype=self.scale_dtype, device=self.device)
            for block, own in zip(self.module.blocks, self.scales, strict=True):
                block.scales = own

    def _share(self) -> None:
        """Point the tensors that are not sampled by rows at the master's storage."""
        for name, parameter in self.parameters.items():
            source = self.master[self.names[name]]
            if name not in self.rows and parameter.data_ptr() != source.data_ptr():
                parameter.data = source.data

    def _rows_of(self, plan: Plan) -> dict[str, Rows]:
        """Sampled rows of every packed parameter; the indices travel to the device in one copy."""
        if not self._sampled:
            return {}
        hosts = {
            (kind, position): sampled_rows(kind, self.full, plan, position)
            for kind, position in dict.fromkeys(self._sampled.values())
        }
        indices = np.concatenate(list(hosts.values()))
        sizes = [len(host) for host in hosts.values()]
        assert _ascends(indices, np.cumsum(sizes)[:-1]), "a row is sampled once, and in order"
        parts = upload(indices, self.device).split(sizes)
        rows = {unit: Rows(host, part) for (unit, host), part in zip(hosts.items(), parts, strict=True)}
        return {name: rows[unit] for name, unit in self._sampled.items()}


class MaskedSubnetwork:
    """The full model with literal 0/1 masks: what masking alone costs. Same plans, same updates."""

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, shards: Shards | None = None):
        self.full = PackedSubnetwork(master, Subnetwork(master.config), dtype, shards)
        self.shape, self.config = shape, master.config
        self.masks: list[BlockMask] = []

    @property
    def module(self) -> Transformer:
        return self.full.module

    def load(self, plan: Plan) -> None:
        self.full.load_whole()
        self.plan = plan
        self.masks = [self._mask(layer) for layer in range(self.config.n_layers)]

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
                rows = Rows(host, torch.from_numpy(host).to(update.gradient.device))
                gradient = as_rows(update.name, update.gradient, self.config)[rows.device]
                update = Update(update.name, rows, gradient)
            updates.append(update)
        return updates

    def _mask(self, layer: int) -> BlockMask:
        config, parameter = self.config, next(iter(self.full.parameters.values()))
        heads = torch.zeros(config.n_heads, device=parameter.device, dtype=parameter.dtype)
        neurons = torch.zeros(config.d_ff, device=parameter.device, dtype=parameter.dtype)
        scales = torch.zeros(2, device=parameter.device, dtype=self.full.scale_dtype)
        kept = np.flatnonzero(self.plan.layers == layer)
        if len(kept):
            units = np.array([self.shape.head_scale, self.shape.mlp_scale])
            heads[torch.from_numpy(self.plan.heads[kept[0]])] = units[0]
            neurons[torch.from_numpy(self.plan.neurons[kept[0]])] = units[1]
            scales.copy_(torch.from_numpy(self.plan.scales[kept[0]] / units))
        return BlockMask(heads, neurons, scales)


def as_rows(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """A parameter, or its moment, as the matrix [R, C] of its rows; one row where it is not sampled by rows."""
    kind = row_kind(name)
    return tensor.view(1 if kind is None else n_rows(kind, model), -1)


def _ascends(indices: np.ndarray, starts: np.ndarray) -> bool:
    """Whether the indices ascend strictly, but for where a new run of them starts."""
    rises = np.diff(indices) > 0
    rises[starts - 1] = True
    return bool(rises.all())


def _in_master(name: str, plan: Plan) -> str:
    """The master's name of a packed parameter: layers are renumbered by the plan."""
    position = layer_of(name)
    if position is None:
        return name
    return f"blocks.{plan.layers[position]}.{name.split('.', 2)[2]}"
