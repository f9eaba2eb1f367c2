"""What a task asks of the data beyond one crop of one case at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nnssl_ext.core.checks import at_least

Shared = Literal["modality", "session"]


@dataclass(frozen=True, kw_only=True)
class DataNeeds:
    """What one sample of a task is made of."""

    channels: int = 1
    """Least number of channels of a case, 1 or more."""
    images: int = 1
    """Crops of different images that make up one sample, 1 or more. A batch then holds `batch_size * images` rows, the
    images of one sample in consecutive rows; every row has a sample index, and so random numbers, of its own."""
    same: Shared | None = None
    """What the images of one sample share. `modality`: different cases of one dataset with the same modalities;
    `session`: co-registered images of one session, cropped at the same place; None: nothing, any different cases."""

    def __post_init__(self) -> None:
        at_least(self, channels=1, images=1)
        if self.same not in (None, *get_args(Shared)):
            raise ValueError(f"same={self.same!r} must be one of {', '.join(get_args(Shared))} or None.")
        if self.same is not None and self.images == 1:
            raise ValueError(f"same={self.same!r} says what the images of a sample share: set images to 2 or more.")
