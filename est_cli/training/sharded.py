"""The packed subnetwork on several ranks, by PyTorch's FSDP2 (torch.distributed.fsdp.fully_shard).

stage         the small model is built without memory, and every block, and the rest, becomes a group of FSDP
step          rows are gathered into local slots: this rank's columns, in fp32
micro-batch   FSDP gathers a block's columns from the ranks in the precision of the run before it computes, and
              averages the gradients in fp32 when the last backward pass has made them
update        the local gradients of local rows

Matrices are FSDP's; vectors are ordinary parameters, whose gradients travel with the loss (`World.combine`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from est_cli.model.transformer import Transformer, layer_of, set_parameter
from est_cli.subnet.plan import Plan, Subnetwork
from est_cli.training.distributed import World
from est_cli.training.subnetwork import PackedSubnetwork, Update


class ShardedSubnetwork(PackedSubnetwork):
    """A PackedSubnetwork whose matrices are spread over the ranks of `world`; the masters are this rank's columns.

    A matrix shares the master's storage unless its rows or its layers are sampled: a full model costs no slots.
    """

    def __init__(self, master: Transformer, shape: Subnetwork, dtype: torch.dtype, world: World):
        self.world = world
        super().__init__(master, shape, dtype)
        # Matrices are shared only where the plan cannot choose another layer for them.
        self._shared = [name for name in self._shared if self.parameters[name].dim() == 1]

    def load(self, plan: Plan) -> None:
        self.reshard()
        super().load(plan)

    def reshard(self) -> None:
        """Free the gathered matrices, which an evaluation leaves behind: their values are those before the step."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

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
        vectors = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}
        for name, tensor in vectors.items():
            set_parameter(self.module, name, tensor)
        ignored = {parameter for parameter in self.module.parameters() if parameter.dim() == 1}
        policy = MixedPrecisionPolicy(self.dtype if self.casts else None, torch.float32, cast_forward_inputs=False)
        for part in (*self.module.blocks, self.module):
            fully_shard(
                part,
                mesh=self.world.mesh,
                # The rest, whose tables the backward pass needs first, stays gathered by itself.
                reshard_after_forward=None if self.world.shards > 1 else False,
                shard_placement_fn=lambda parameter: Shard(1),
                mp_policy=policy,
                ignored_params=ignored,
            )
        matrices = {name: tensor for name, tensor in tensors.items() if name not in vectors}
        self.module.load_state_dict(self.world.full(matrices), strict=False, assign=True)
