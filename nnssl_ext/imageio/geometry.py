"""Where an array's voxels lie in space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-3
"""Difference in spacing and origin (mm) and in direction cosines below which two images lie in the same place."""
SLICE_SPACING_FACTOR = 999.0
"""nnU-Net gives a 2D image a slice distance of 999 times its pixel size, so that planning never resamples across it."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Voxel size and placement of an image. Spacing follows the array's axes; the rest is as SimpleITK has it."""

    spacing: tuple[float, float, float]
    """Voxel size in mm, (z, y, x), never negative."""
    origin: tuple[float, ...] = ()
    """Position of the first voxel in mm, (x, y, z), or (x, y) of a 2D image; empty where the format has none."""
    direction: tuple[float, ...] = ()
    """Direction cosines, row by row, 9 or 4 of them; empty where the format has none."""

    def same_place(self, other: Geometry) -> bool:
        """Whether voxels of the same index show the same point, within `TOLERANCE`."""
        pairs = (
            (self.spacing, other.spacing),
            (self.origin, other.origin),
            (self.direction, other.direction),
        )
        return all(len(a) == len(b) and np.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in pairs)

    def to_nnunet_properties(self) -> dict[str, Any]:
        """The properties that nnU-Net's reader returns with such an image and that its writer wants back."""
        properties: dict[str, Any] = {"spacing": list(self.spacing)}
        if self.origin:
            spacing = self.spacing[::-1][: len(self.origin)]
            properties["sitk_stuff"] = {"spacing": spacing, "origin": self.origin, "direction": self.direction}
        return properties

    @classmethod
    def from_nnunet_properties(cls, properties: Mapping[str, Any]) -> Geometry:
        """The geometry in the properties of one of nnU-Net's readers; a 4D file's is that of its volumes."""
        z, y, x = (float(value) for value in properties["spacing"])
        stored = properties.get("sitk_stuff", {"origin": (), "direction": ()})
        return from_sitk((z, y, x), stored["origin"], stored["direction"])


def from_sitk(spacing: tuple[float, float, float], origin: tuple[float, ...], direction: tuple[float, ...]) -> Geometry:
    """A geometry from SimpleITK's origin and direction, cut down to the three spatial axes of a 4D image.

    Args:
        spacing: Voxel size in mm, (z, y, x).
        origin: 0, 2, 3 or 4 positions.
        direction: As many squared cosines.
    """
    dimension = len(origin)
    kept = min(dimension, 3)
    rows = [direction[row * dimension : row * dimension + kept] for row in range(kept)]
    return Geometry(
        spacing=(abs(spacing[0]), abs(spacing[1]), abs(spacing[2])),
        origin=tuple(float(value) for value in origin[:kept]),
        direction=tuple(float(value) for row in rows for value in row),
    )
