"""A stage's subnetwork: the sampled rows packed into a small dense model, and its gradients on the way back.

Sizes depend on the stage and indices on the step, so a stage allocates its slots once and every step only
fills them. In fp32, tensors that are not sampled share storage with the master, and with every count full the
subnetwork is the master itself. In bf16 every slot is a bf16 copy, and a hook adds each slot's gradient to an
fp32 accumulator. Several ranks share the small model by PyTorch's FSDP2 (ShardedSubnetwork).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from est_cli.kernels.pack import upload
from est_cli.model.transformer import BlockMask, Transformer, layer_of, row_kind, set_parameter, with_layer
from est_cli.subnet.plan import Plan, Subnetwork, n_rows, sampled_rows, whole_plan
from est_cli.training.distributed import World
from est_cli.training.profile import phase
from est_cli.training.stacks import Stack, as_rows, new_stacks, rows_in, stack_master

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Update:
    """The gradient of one master parameter in one optimizer step: of its sampled `rows`, or of all if None."""

    name: str
    rows: np.ndarray | None
    gradient: Tensor
    is_sharded: bool = False
    """The gradient is this rank's columns, averaged over all ranks by the backward pass."""


class Accumulators:
    """Sums of the slots' gradients in fp32, by name, stacked as the slots are.

    The slots' hooks hold this object, so it holds no slot: a cycle through a hook is never collected, and would keep
    every subnetwork of the run alive.
    """

    def __init__(self, stacks: Sequence[Stack], slots: Mapping[str, nn.Parameter]):
        self.sums: dict[str, Tensor] = {}
        """Made by the first backward pass: a subnetwork that only evaluates needs none."""
        self._started: set[str] = set()
        self._stacks = [Stack(stack.matrix.to("meta"), stack.places) for stack in stacks]
        self._like = {name: slots[name].data.to("meta") for stack in stacks for name in stack.places}
        for name in self._like:
            slots[name].register_post_accumulate_grad_hook(partial(self._add, name))

    def restart(self) -> None:
        """The next gradient of every slot begins a new sum."""
        self._started.clear()

    def _add(self, name: str, slot: nn.Parameter) -> None:
        """Add a gradient as soon as the backward pass has made it, and free it."""
        if not self.sums:
            for stack in self._stacks:
                matrix = torch.empty_like(stack.matrix, dtype=torch.float32, device=slot.device)
                self.sums |= Stack(matrix, stack.places).views(self._like)
        if name in self._started:
            self.sums[name].add_(slot.grad)
        else:
            self.sums[name].copy_(slot.grad)
            self._started.add(name)
        slot.grad = None


class PackedSubnetwork:
    """A small dense model for one stage: `load` packs a plan's rows, `updates` returns the gradients of those rows."""

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
        """The master's name of each packed parameter: the plan chooses the layers."""
        casting = [stack for stack in self._slots if stack.matrix.dtype != self.master_dtype]
        self.accumulators = Accumulators(casting, self.parameters)

    @phase("pack")
    def load(self, plan: Plan) -> None:
        """Fill the slots with the rows of `plan`, and drop the gradients of the step before."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.accumulators.restart()
        if self.is_master:
            return
        if self.small.n_layers != self.full.n_layers:
            self.names = {name: name_in_master(name, plan) for name in self.parameters}
        rows = {unit: sampled_rows(unit[0], self.full, plan, unit[1]) for unit in set(self._sampled.values())}
        self.rows = {name: rows[unit] for name, unit in self._sampled.items()}
        for name in self._shared:
            source = self.master[self.names[name]]
            if self.parameters[name].data_ptr() != source.data_ptr():
                self.parameters[name].data = source.data
        if self.shape.is_scaled:
            self.scales.copy_(upload(plan.scales, self.device))
        sources = [self._masters[self.names[next(iter(slots.places))]].matrix for slots in self._slots]
        self.kernels.gather_rows(sources, self._indices(sources), [slots.matrix for slots in self._slots])

    def load_whole(self) -> None:
        """`load` for a subnetwork that keeps all that has joined."""
        self.load(whole_plan(self.small))

    def reduce_next(self, reduces: bool) -> None:
        """Whether the next backward pass, that of the last micro-batch, averages gradients over the ranks."""

    @phase("forward")
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of one micro-batch [B, T]; differentiable."""
        return self.module(inputs, targets)

    def updates(self) -> list[Update]:
        """The accumulated gradients."""
        return [self._update(name, parameter) for name, parameter in self.parameters.items()]

    def _update(self, name: str, parameter: nn.Parameter) -> Update:
        gradient = self.accumulators.sums.get(name, parameter.grad)
        return Update(self.names[name], self.rows.get(name), gradient)

    def _is_master(self) -> bool:
        """Whether the subnetwork needs no memory of its own: it is the full model, in its own type."""
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
        """Give every parameter a slot of its own, or the master's storage if it can share."""
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

    def _indices(self, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """The master's row of every row of the slots; None for all. They travel to the device in one copy."""
        hosts = []
        for slots, source in zip(self._slots, sources, strict=True):
            masters = [(name, self._masters[self.names[name]].places[self.names[name]]) for name in slots.places]
            host = np.concatenate([rows_in(place, self.rows.get(name)) for name, place in masters])
            assert (np.diff(host) > 0).all(), "a row is sampled once, and in order"
            hosts.append(host if len(host) < len(source) else host[:0])
        if not any(map(len, hosts)):
            return [None] * len(sources)
        parts = upload(np.concatenate(hosts), self.device).split(list(map(len, hosts)))
        return [part if len(part) else None for part in parts]


class ShardedSubnetwork(PackedSubnetwork):
    """A PackedSubnetwork whose matrices FSDP2 spreads over the ranks of `world`; the masters are this rank's columns.

    stage         every block of the small model, and the rest, becomes a group of FSDP
    step          rows are gathered into local slots: this rank's columns, in fp32
    micro-batch   FSDP gathers a block's columns from the ranks in the precision of the run before it computes, and
                  averages the gradients in fp32 when the last backward pass has made them
    update        the local gradients of local rows

    Vectors are ordinary parameters, whose gradients travel with the loss (`World.combine`). A matrix shares the
    master's storage unless its rows or its layers are sampled: a full model costs no slots.
    """

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, world: World):
        self.world = world
        super().__init__(master, shape, dtype)
        # A shared matrix keeps its layer, so only vectors are pointed at other layers.
        self._shared = [name for name in self._shared if self.parameters[name].dim() == 1]

    def load(self, plan: Plan) -> None:
        # Free the gathered matrices, which an evaluation leaves behind: their values are those before the step.
        for part in (*self.module.blocks, self.module):
            part.reshard()
        super().load(plan)

    def reduce_next(self, reduces: bool) -> None:
        self.module.set_requires_gradient_sync(reduces)

    def _update(self, name: str, parameter: nn.Parameter) -> Update:
        if parameter.dim() == 1:
            return super()._update(name, parameter)
        return Update(self.names[name], self.rows.get(name), parameter.grad.to_local(), is_sharded=True)

    def _is_master(self) -> bool:
        return False

    def _is_copied(self, name: str, parameter: Tensor) -> bool:
        if parameter.dim() == 1:
            return super()._is_copied(name, parameter)
        return self._is_sampled(name) or (layer_of(name) is not None and self.small.n_layers != self.full.n_layers)

    def _held(self, parameter: Tensor) -> Tensor:
        return parameter if parameter.dim() == 1 else self.world.own(parameter.to(self.master_dtype))

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        # Half a second to import, which one process never needs.
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
        super()._place({name: tensor for name, tensor in tensors.items() if name not in matrices})
        vectors = {parameter for parameter in self.module.parameters() if parameter.dim() == 1}
        policy = MixedPrecisionPolicy(self.dtype if self.casts else None, torch.float32, cast_forward_inputs=False)
        for part in (*self.module.blocks, self.module):
            fully_shard(
                part,
                mesh=self.world.mesh,
                # The rest, whose tables the backward pass needs first, stays gathered by itself.
                reshard_after_forward=None if self.world.shards > 1 else False,
                shard_placement_fn=lambda parameter: Shard(1),
                mp_policy=policy,
                ignored_params=vectors,
            )
        self.module.load_state_dict(self.world.full(matrices), strict=False, assign=True)


Pack = Callable[[Transformer, Subnetwork, torch.dtype], PackedSubnetwork]


def pack_on(world: World) -> Pack:
    """How a subnetwork is packed: into one small model, or into one that the ranks share."""
    return PackedSubnetwork if world.mesh is None else partial(ShardedSubnetwork, world=world)


class MaskedSubnetwork:
    """The full model with literal 0/1 masks: shows what masking costs by itself. Same plans, same updates."""

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, pack: Pack = PackedSubnetwork):
        self.whole = pack(master, Subnetwork(master.config), dtype)
        self.shape, self.config = shape, master.config
        self.masks: list[BlockMask] = []

    @property
    def module(self) -> Transformer:
        return self.whole.module

    @phase("pack")
    def load(self, plan: Plan) -> None:
        self.whole.load_whole()
        self.plan, self.positions = plan, {layer: position for position, layer in enumerate(plan.layers.tolist())}
        self.masks = [self._mask(layer) for layer in range(self.config.n_layers)]

    def reduce_next(self, reduces: bool) -> None:
        self.whole.reduce_next(reduces)

    @phase("forward")
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module(inputs, targets, self.masks)

    def updates(self) -> list[Update]:
        updates = []
        for update in self.whole.updates():
            layer, kind = layer_of(update.name), row_kind(update.name)
            if layer is not None and layer not in self.positions:
                continue
            if kind is not None and n_rows(kind, self.config) != n_rows(kind, self.shape.model):
                host = sampled_rows(kind, self.config, self.plan, self.positions[layer])
                index = torch.from_numpy(host).to(update.gradient.device)
                gradient = as_rows(update.name, update.gradient, self.config)[index]
                update = replace(update, rows=host, gradient=gradient)
            updates.append(update)
        return updates

    def _mask(self, layer: int) -> BlockMask:
        config, device, dtype = self.config, self.whole.device, self.whole.dtype
        heads = torch.zeros(config.n_heads, device=device, dtype=dtype)
        neurons = torch.zeros(config.d_ff, device=device, dtype=dtype)
        scales = torch.zeros(2, device=device, dtype=self.whole.scale_dtype)
        if (position := self.positions.get(layer)) is not None:
            units = np.array([self.shape.head_scale, self.shape.mlp_scale])
            heads[torch.from_numpy(self.plan.heads[position])] = units[0]
            neurons[torch.from_numpy(self.plan.neurons[position])] = units[1]
            scales.copy_(torch.from_numpy(self.plan.scales[position] / units))
        return BlockMask(heads, neurons, scales)


def name_in_master(name: str, plan: Plan) -> str:
    """The master's name of a parameter or a module of a packed model, whose layers the plan chooses."""
    position = layer_of(name)
    return name if position is None else with_layer(name, plan.layers[position])
