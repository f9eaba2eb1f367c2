"""Where the positions of a feature map lie on an image, and how values get from one set of positions to another.

Everything is counted in the image's own voxels, along its own axes (z, y, x): what the preparation of an image did
(transposing, cropping, resampling) and the stride of a feature map are together an offset and a step along each axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.imageio import Geometry
from nnssl_ext.imageio.layers import to_scanner

ROWS_AT_ONCE = 16
"""Slices of an image that are interpolated together; bounds the memory."""


@dataclass(frozen=True)
class Grid:
    """Positions spread evenly along the axes of an image."""

    size: tuple[int, ...]
    """Positions along each axis (z, y, x)."""
    first: tuple[float, ...]
    """Voxel of the image, with a fraction, on which the first position lies."""
    step: tuple[float, ...]
    """Voxels of the image from one position to the next."""

    def places(self, target: Grid, axis: int) -> torch.Tensor:
        """Where the target's positions along an axis lie, counted in positions of this grid; float64, (n,)."""
        voxels = target.first[axis] + target.step[axis] * torch.arange(target.size[axis], dtype=torch.float64)
        return (voxels - self.first[axis]) / self.step[axis]

    def geometry(self, image: Geometry) -> Geometry:
        """Spacing and placement of a volume with a voxel at each position.

        Args:
            image: Geometry of the image that the grid lies on; without a placement it lies unrotated at zero.
        """
        z, y, x = (edge * step for edge, step in zip(image.spacing, self.step, strict=True))
        origin = index_to_scanner(image) @ np.array([*self.first, 1.0])
        return Geometry(
            spacing=(z, y, x),
            origin=tuple(float(value) for value in origin[: len(image.origin) or 3]),
            direction=image.direction or tuple(np.eye(3).ravel().tolist()),
        )


def image_grid(shape: Sequence[int]) -> Grid:
    """The voxels of an image of that shape (Z, Y, X)."""
    return Grid(tuple(shape), (0.0,) * len(shape), (1.0,) * len(shape))


def prepared_grid(properties: Mapping[str, Any], shape: Sequence[int], transpose_backward: Sequence[int]) -> Grid:
    """The voxels of a prepared image, on the image as it was read.

    Args:
        properties: Of `PreprocessedArray`.
        shape: Of its data, axes in the plan's order.
        transpose_backward: The plan's.
    """
    lower = [low for low, _ in properties["bbox_used_for_cropping"]]
    cropped = properties["shape_after_cropping_and_before_resampling"]
    steps = [old / new for old, new in zip(cropped, shape, strict=True)]
    first = [low + step / 2 - 0.5 for low, step in zip(lower, steps, strict=True)]
    return transposed(Grid(tuple(shape), tuple(first), tuple(steps)), transpose_backward)


def coarser(grid: Grid, stride: Sequence[int]) -> Grid:
    """The cells of `stride` positions each, of which the last one along an axis may reach beyond the grid."""
    size = tuple(-(-full // edge) for full, edge in zip(grid.size, stride, strict=True))
    first = tuple(f + s * (e - 1) / 2 for f, s, e in zip(grid.first, grid.step, stride, strict=True))
    return Grid(size, first, tuple(s * e for s, e in zip(grid.step, stride, strict=True)))


def transposed(grid: Grid, order: Sequence[int]) -> Grid:
    """With its axes in another order, as `np.transpose` takes it."""
    size, first, step = grid.size, grid.first, grid.step
    return Grid(tuple(size[a] for a in order), tuple(first[a] for a in order), tuple(step[a] for a in order))


def index_to_scanner(geometry: Geometry) -> npt.NDArray[np.float64]:
    """The matrix (4, 4) from a voxel (z, y, x, 1) to its place in the scanner (x, y, z, 1), in mm, LPS."""
    return to_scanner(geometry)[:, [2, 1, 0, 3]]


def interpolate(values: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """Values at the positions of another grid, linearly; beyond the outer positions the outer values go on.

    Args:
        values: (C, *source.size).
        source: Where they are known.
        target: Where they are wanted, on the same image.

    Returns:
        (C, *target.size), of the type of `values`.
    """
    for axis in range(len(source.size)):
        at = source.places(target, axis).clamp(0, source.size[axis] - 1)
        low = at.floor().long().clamp(max=max(source.size[axis] - 2, 0))
        share = (at - low).to(values).view(-1, *[1] * (len(source.size) - 1 - axis))
        high = (low + 1).clamp(max=source.size[axis] - 1)
        low, high = low.to(values.device), high.to(values.device)
        values = torch.lerp(values.index_select(axis + 1, low), values.index_select(axis + 1, high), share)
    return values


def nearest(values: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """The value of the nearest position, and zero (False) more than half a step beyond the outer ones.

    Args:
        values: (*source.size), of any type.
        source: Where they are known.
        target: Where they are wanted, on the same image.
    """
    for axis, size in enumerate(source.size):
        at = (source.places(target, axis) + 0.5).floor().long()
        outside = ((at < 0) | (at >= size)).to(values.device).view(-1, *[1] * (len(source.size) - 1 - axis))
        values = values.index_select(axis, at.clamp(0, size - 1).to(values.device)).masked_fill(outside, 0)
    return values


def by_rows(target: Grid) -> Iterator[tuple[slice, Grid]]:
    """Parts of a grid along its first axis, a few slices each, and where they lie in the whole."""
    for start in range(0, target.size[0], ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, target.size[0]))
        first = (target.first[0] + target.step[0] * start, *target.first[1:])
        yield rows, Grid((rows.stop - start, *target.size[1:]), first, target.step)
