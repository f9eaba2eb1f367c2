"""One encoder for several tasks: the weights they share, and a level of it that a further loss looks at."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from nnssl_ext.models.encoder import Encoder
from nnssl_ext.models.skipless import CONVS


def share_weights(module: nn.Module, source: nn.Module) -> None:
    """Makes the weights of a module those of another one of the same build: the same tensors, under all their names.

    Whatever else holds the module, as a U-Net's decoder does, then has them too.

    Args:
        module: Gives up its own parameters and buffers.
        source: Whose it takes.
    """
    named = source.named_parameters(remove_duplicate=False), source.named_buffers(remove_duplicate=False)
    theirs = dict(chain(*named))
    for prefix, part in module.named_modules():
        own = chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
        for name in [name for name, _ in own]:
            setattr(part, name, theirs[f"{prefix}.{name}" if prefix else name])


class InnerLevel(Encoder):
    """An encoder whose only map is an inner level of another one, brought to the width of that one's deepest map.

    So a head for the deepest map fits, and a loss reaches the layers up to the level (deep supervision, Lee et al.
    2015, arXiv:1409.5185).

    Args:
        encoder: A U-Net's; its weights are shared.
        level: Which of its maps, finest first.
    """

    def __init__(self, encoder: Encoder, level: int) -> None:
        super().__init__()
        self.encoder, self.level, self.kind = encoder, level, encoder.kind
        self.channels, self.strides = (encoder.channels[-1],), (encoder.strides[level],)
        self.stem_key, self.stages_key, self.in_proj_keys = encoder.stem_key, encoder.stages_key, encoder.in_proj_keys
        self.project = CONVS[len(encoder.strides[level])](encoder.channels[level], encoder.channels[-1], 1)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `Encoder.feature_maps`."""
        return [self.project(self.encoder(x)[self.level])]

    def hand_over(self, network: Any) -> None:
        """See `Encoder.hand_over`; the projection stays behind."""
        self.encoder.hand_over(network)
