"""What layers begin from when the model grows by them."""

import torch

from est_cli.model.transformer import layer_of
from est_cli.training.optimizer import SampledAdamW


@torch.no_grad()
def stack_layers(optimizer: SampledAdamW, trained: int, grown: int) -> None:
    """Layers `trained` … `grown` − 1 become copies of layers 0, 1, … `trained` − 1, over and over: weights, moments and
    step counts (progressive stacking: Gong et al., 2019, Efficient Training of BERT by Progressively Stacking).

    Twice is as once: the copied layers do not change.
    """
    for name in optimizer.parameters:
        layer = layer_of(name)
        if layer is not None and trained <= layer < grown:
            source = name.replace(f".{layer}.", f".{layer % trained}.", 1)
            for tensors in (optimizer.parameters, optimizer.moments, optimizer.squares):
                tensors[name].copy_(tensors[source])
            optimizer.counts[name][:] = optimizer.counts[source]
