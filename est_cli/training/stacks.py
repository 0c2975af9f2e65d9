"""Parameters in stacks: those with equally wide rows lie in one matrix, layer after layer.

One operation then serves the rows of every layer: pack gathers them at once, and AdamW moves them at once. A growth in
depth copies along the first axis of [L, R, C], and the layers that have joined are its first ones. The parameters of
the model stay where users look for them, as views.

L layers, R rows of a layer, C columns: what one head, one neuron, or one vector owns
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from est_cli.config import ModelConfig
from est_cli.model.transformer import layer_of, row_kind, set_parameter
from est_cli.subnet.plan import n_rows


@dataclass(frozen=True)
class Stack:
    """matrix [L·R, C], and the rows of it that every parameter has, by full name, in the model's order."""

    matrix: Tensor
    places: Mapping[str, slice]

    def zeros(self, rows: int) -> "Stack":
        """A new stack of zeros, of the parameters in the first `rows` rows."""
        places = {name: place for name, place in self.places.items() if place.stop <= rows}
        return Stack(torch.zeros_like(self.matrix[:rows]), places)

    def views(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Its parameters in these shapes."""
        return {name: self.matrix[place].view(shapes[name]) for name, place in self.places.items()}


def stack_master(model: nn.Module) -> list[Stack]:
    """The stacks of a model's parameters, which are moved into them where they do not lie so yet.

    A parameter that another rank holds has no place beside others: in a sharded model each is a stack of its own.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    is_sharded = any(parameter.is_meta for parameter in parameters.values())
    return [_as_stack(model, parameters, places) for places in _places(parameters, model.config, is_sharded)]


def new_stacks(
    module: nn.Module, names: Iterable[str], model: ModelConfig, apart: bool, dtype: torch.dtype, device: torch.device
) -> list[Stack]:
    """Memory for the named parameters of `module`, which is of the shape `model`; `apart` as in a sharded master."""
    parameters = dict(module.named_parameters())
    stacks = []
    for places in _places({name: parameters[name] for name in names}, model, apart):
        columns = _columns(next(iter(places)), parameters, model)
        stack = Stack(torch.empty(_end(places), columns, dtype=dtype, device=device), places)
        for name, view in stack.views(_shapes(parameters)).items():
            set_parameter(module, name, view)
        stacks.append(stack)
    return stacks


def as_rows(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """A parameter, or its moment, as the matrix [R, C] of its rows; one row where it is not sampled by rows."""
    return tensor.view(_rows(name, model), -1)


def adjacent(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [r, C] that follow one another in memory as the one that they make; others as they are."""
    end = pieces[0].data_ptr() if pieces else 0
    for piece in pieces:
        same = piece.untyped_storage().data_ptr() == pieces[0].untyped_storage().data_ptr()
        if not (same and piece.data_ptr() == end and piece.is_contiguous()):
            return list(pieces)
        end += piece.nbytes
    return [pieces[0].as_strided((sum(map(len, pieces)), pieces[0].shape[1]), pieces[0].stride())] if pieces else []


def _as_stack(model: nn.Module, parameters: Mapping[str, Tensor], places: Mapping[str, slice]) -> Stack:
    pieces = [as_rows(name, parameters[name], model.config) for name in places]
    merged = adjacent(pieces) if len(pieces) > 1 else pieces
    if len(merged) == 1:
        return Stack(merged[0], places)
    stack = Stack(torch.cat(pieces), places)
    for name, view in stack.views(_shapes(parameters)).items():
        model.get_parameter(name).data = view
    return stack


def _places(parameters: Mapping[str, Tensor], model: ModelConfig, apart: bool) -> list[dict[str, slice]]:
    """Of every stack: its parameters, and their rows. Weight decay, and so the number of dimensions, is one for all."""
    stacks: dict[tuple, dict[str, slice]] = {}
    for name, parameter in parameters.items():
        alone = apart or layer_of(name) is None
        key = (name,) if alone else (parameter.dim(), row_kind(name) is None, _columns(name, parameters, model))
        places = stacks.setdefault(key, {})
        start = _end(places)
        places[name] = slice(start, start + _rows(name, model))
    return list(stacks.values())


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in parameters.items()}


def _rows(name: str, model: ModelConfig) -> int:
    kind = row_kind(name)
    return 1 if kind is None else n_rows(kind, model)


def _columns(name: str, parameters: Mapping[str, Tensor], model: ModelConfig) -> int:
    return parameters[name].numel() // _rows(name, model)


def _end(places: Mapping[str, slice]) -> int:
    return next(reversed(places.values())).stop if places else 0


def rows_in(place: slice, rows: np.ndarray | None) -> np.ndarray:
    """Rows of a parameter, or all of them, as rows of the stack in which it has this place."""
    return np.arange(place.start, place.stop) if rows is None else place.start + rows
