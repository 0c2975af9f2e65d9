"""Who holds the masters and moments of a parameter: every rank all of them, or one rank each (trainer.shard=true).

A shard is a number of whole parameters, after ZeRO (Rajbhandari et al., 2020):

pack        the holder gathers and casts the sampled rows into the slot, and the others receive the slot
gradients   averaged on the holder alone
optimizer   every rank moves what it holds
checkpoint  rank 0 receives one tensor after the other, and writes the files of a run that is not sharded

What travels is what an all-reduce of the gradients is made of, with the first half in the slots' type. A parameter
that another rank holds is a meta tensor: a shape without memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from est_cli.training.distributed import World

ReadTensor = Callable[[str], Tensor]
"""Any tensor of a training's state, by name."""


@dataclass(frozen=True)
class Shards:
    """The holder of every parameter by name; without holders every rank holds everything."""

    world: World
    holders: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, world: World, shard: bool) -> "Shards":
        """Shards of about equal size: the next largest parameter goes to the rank that holds least."""
        if not shard or world.size == 1:
            return cls(world)
        held, holders = [0] * world.size, {}
        for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
            holders[name] = held.index(min(held))
            held[holders[name]] += parameter.numel()
        return cls(world, holders)

    @property
    def is_sharded(self) -> bool:
        return bool(self.holders)

    def holds(self, name: str) -> bool:
        """Whether the masters and moments of this parameter are on this rank."""
        return self.holders.get(name, self.world.rank) == self.world.rank

    def spread(self, slots: Mapping[str, Tensor]) -> None:
        """Give all ranks the slots that the holders of these parameters have filled."""
        if self.is_sharded:
            self.world.broadcast_(self._by_holder(slots))

    def copy_(self, tensors: Mapping[str, Tensor], source: str, target: str) -> None:
        """Copy one parameter's tensor into another's, wherever the two are held."""
        if not self.is_sharded:
            tensors[target].copy_(tensors[source])
            return
        travelling = torch.empty_like(tensors[source], device=self.world.device)
        if self.holds(source):
            travelling.copy_(tensors[source])
        self.world.broadcast_({self.holders[source]: [travelling]})
        if self.holds(target):
            tensors[target].copy_(travelling)

    def average_(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Average over all ranks the loss, and each gradient where its parameter is held; elsewhere it is lost."""
        if not self.is_sharded:
            self.world.average_([loss, *gradients.values()])
            return
        self.world.average_([loss])
        self.world.sum_on_(self._by_holder(gradients))
        held = [gradient for name, gradient in gradients.items() if self.holds(name)]
        if held:
            torch._foreach_div_(held, self.world.size)

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of all gradients together, a scalar tensor, with the bits of torch.nn.utils.get_total_norm."""
        if not self.is_sharded:
            return torch.nn.utils.get_total_norm(gradients.values())
        norms = [
            torch.linalg.vector_norm(gradient) if self.holds(name) else gradient.new_zeros(())
            for name, gradient in gradients.items()
        ]
        norms = torch.stack(norms)
        self.world.sum_([norms])
        return torch.linalg.vector_norm(norms)

    def collect(self, tensors: Mapping[str, Tensor], write: Callable[[ReadTensor], None]) -> None:
        """On rank 0 call `write(read)`, where `read(name)` returns any of the tensors; the other ranks serve it.

        A tensor is named like its parameter, or PREFIX.PARAMETER. All leave together, also when `write` raises.
        """
        names = list(tensors)
        if not self.is_sharded:
            if self.world.is_main:
                write(tensors.__getitem__)
            return
        if not self.world.is_main:
            while (index := self.world.number_from_main(-1)) >= 0:
                if self._holder(names[index]) == self.world.rank:
                    self.world.send_to_main(tensors[names[index]])
            return

        def read(name: str) -> Tensor:
            if not tensors[name].is_meta:
                return tensors[name]
            self.world.number_from_main(names.index(name))
            return self.world.receive(tensors[name], self._holder(name))

        try:
            write(read)
        finally:
            self.world.number_from_main(-1)

    def _holder(self, name: str) -> int:
        return self.holders[name if name in self.holders else name.partition(".")[2]]

    def _by_holder(self, tensors: Mapping[str, Tensor]) -> dict[int, Sequence[Tensor]]:
        ranks = range(self.world.size)
        return {rank: [t for name, t in tensors.items() if self.holders[name] == rank] for rank in ranks}


def whole(model: nn.Module) -> Shards:
    """Of a model that one process has for itself."""
    return Shards(World(next(model.parameters()).device))
