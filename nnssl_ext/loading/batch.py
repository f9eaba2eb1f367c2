"""The record that the loader delivers and every task receives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B crops with D spatial dimensions (2 or 3): the images of every sample in consecutive rows."""

    data: Tensor
    """Voxels (B, C, *patch), float32, 0 where not valid. The loader delivers them in the stored type, mostly float16:
    `to` takes them to the device like that, which halves what is copied, and makes them float32 there."""
    valid: Tensor
    """(B, 1, *patch), bool: True on real voxels, False on padding beyond the volume and on voxels that anonymisation
    altered."""
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
    origin: tuple[tuple[float, ...], ...] = ()
    """Where each stored volume begins within its raw image, in mm from that one's border, along its axes."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, its voxels in float32; from page-locked memory a GPU copies by itself."""
        # elsewhere such a copy may be read before it is made, or its source written to before it is read
        alone = self.data.device.type == "cpu" and torch.device(device).type == "cuda"
        parts = (self.data, self.valid, self.lower, self.spacing)
        data, valid, lower, spacing = (part.to(device, non_blocking=alone) for part in parts)
        return replace(self, data=data.float(), valid=valid, lower=lower, spacing=spacing)
