"""What every backbone offers to the pretext tasks, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class Encoder(nn.Module, ABC):
    """A backbone that turns images into feature maps.

    Attributes:
        kind: `"cnn"` or `"vit"`.
        channels: Features of each map, in the order of `feature_maps`.
        strides: Voxels of the input per position of each map, one tuple (z, y, x) (2D: (y, x)) per map.
        stem_key: Where the part that depends on the number of input channels lies in the exported network.
        stages_key: Where the rest of the encoder lies in the exported network.
        in_proj_keys: The exported network's layers whose weights depend on the number of input channels, by every name.
        position_key: The learned position embedding in the exported network, None where there is none.
    """

    kind: str
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    stem_key: str
    stages_key: str
    in_proj_keys: tuple[str, ...]
    position_key: str | None = None

    @abstractmethod
    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features at every scale, finest first.

        Args:
            x: Images (B, C, *patch).

        Returns:
            Maps (B, channels[i], *patch / strides[i]).
        """

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """One vector an image: the mean of the deepest map over its positions, (B, channels[-1])."""
        return self.feature_maps(x)[-1].flatten(2).mean(2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The same as `feature_maps`."""
        return self.feature_maps(x)

    @abstractmethod
    def hand_over(self, network: nn.Module) -> None:
        """Makes this encoder's weights those of an exported network, sharing their memory.

        Args:
            network: A segmentation network of the same architecture, as nnU-Net builds it.
        """
