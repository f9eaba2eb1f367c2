"""The record that the loader delivers and every task receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B crops with D spatial dimensions (2 or 3): the images of every sample in consecutive rows."""

    data: Tensor
    """Voxels (B, C, *patch), float32, 0 on padding."""
    valid: Tensor
    """(B, 1, *patch), bool: True on real voxels, False on padding beyond the volume."""
    cases: tuple[str, ...]
    """Case of each crop."""
    samples: tuple[int, ...]
    """Global index of each crop, the key of all its random numbers: that of the sample where a sample is one crop."""
    lower: Tensor
    """(B, D), int64: voxel of the stored volume at the crop's first corner; negative where padding comes first."""
    spacing: Tensor
    """(B, D), float32: edges of a voxel in mm."""
    foreground: tuple[float, ...] = ()
    """Share of each crop's real voxels that is foreground, in [0, 1], by the store's coarse grid."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device. Copies to a GPU run in the background where the source is pinned."""
        background = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=background))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, which a GPU copies from in the background."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        data, valid, lower, spacing = map(function, (self.data, self.valid, self.lower, self.spacing))
        return replace(self, data=data, valid=valid, lower=lower, spacing=spacing)
