"""Parameters in stacks: those with equally wide rows lie in one matrix, layer after layer.

Pack then gathers the rows of all layers in one operation, and AdamW moves them in one. A growth in depth copies along
the first axis of [L, R, C], and the layers that have joined are the first ones. The model's parameters are views.

L layers, R rows of a layer, C columns: what one head, one neuron, or one vector owns
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from est_cli.config import ModelConfig
from est_cli.model.transformer import layer_of, row_kind
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

    def views(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its parameters, in the shapes of these."""
        return {name: self.matrix[place].view(like[name].shape) for name, place in self.places.items()}


def stack_master(model: nn.Module) -> list[Stack]:
    """Move a model's parameters into stacks, unless they lie there already.

    A rank that holds some columns of every matrix has the stacks of a narrower model.
    """
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    return [_as_stack(model, parameters, places) for places in _places(parameters, model.config)]


def new_stacks(like: Mapping[str, Tensor], model: ModelConfig, device: torch.device) -> list[Stack]:
    """Memory for the parameters of a `model`, in the shapes and types of `like`."""
    stacks = []
    for places in _places(like, model):
        name = next(iter(places))
        size = (_end(places), as_rows(name, like[name], model).shape[1])
        stacks.append(Stack(torch.empty(size, dtype=like[name].dtype, device=device), places))
    return stacks


def as_rows(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """A parameter, or its moment, as the matrix [R, C] of its rows; a single row if it is not sampled by rows."""
    kind = row_kind(name)
    return tensor.view(1 if kind is None else n_rows(kind, model), -1)


def adjacent(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [r, C] as one matrix if they follow one another in memory; otherwise as they are."""
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
    for name, view in stack.views(parameters).items():
        model.get_parameter(name).data = view
    return stack


def _places(parameters: Mapping[str, Tensor], model: ModelConfig) -> list[dict[str, slice]]:
    """The rows of every parameter, for each stack. Weight decay, and so the number of dimensions, is one for all."""
    stacks: dict[tuple, dict[str, slice]] = {}
    for name, parameter in parameters.items():
        n, columns = as_rows(name, parameter, model).shape
        key = (name,) if layer_of(name) is None else (parameter.dim(), row_kind(name) is None, columns)
        places = stacks.setdefault(key, {})
        places[name] = slice(_end(places), _end(places) + n)
    return list(stacks.values())


def _end(places: Mapping[str, slice]) -> int:
    return next(reversed(places.values())).stop if places else 0


def rows_in(place: slice, rows: np.ndarray | None) -> np.ndarray:
    """Rows of a parameter, or all of them, as rows of the stack in which it has this place."""
    return np.arange(place.start, place.stop) if rows is None else place.start + rows
