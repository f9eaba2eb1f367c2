"""Where to crop a volume: as much foreground as asked for, or as there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_TRIES = 8
"""Positions drawn blindly before all of them are scored: in bodies and heads the first or second one is good."""
NEAR_BEST = 0.9
"""Where the foreground rule cannot be met, crops with this share of the best one's foreground are drawn from."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Crop:
    """Where to crop a volume."""

    lower: tuple[int, ...]
    """First voxel (z, y, x); negative where padding comes first."""
    foreground: float
    """Share of the crop's real voxels that is foreground, in [0, 1], by the coarse grid."""


def choose_crop(
    shape: Sequence[int],
    patch_size: Sequence[int],
    occupancy: npt.NDArray[np.bool_],
    cell: Sequence[int],
    min_foreground: float,
    rng: np.random.Generator,
) -> Crop:
    """Draws a crop of which at least a given share is foreground, or as much as this case has to offer.

    Uniform positions are tried first. When none is good enough, the positions at which the crop's faces meet the
    grid's are all scored: the share is linear in between, so they include the best there is. One is drawn from the good
    ones, or, where there is none, from those near the best, and shifted a little while it stays good. Along an axis
    shorter than the patch, the whole volume is taken and the padding is split at random.

    Args:
        shape: Volume (z, y, x) in voxels.
        patch_size: Crop (z, y, x) in voxels.
        occupancy: Coarse grid (z, y, x) of where the foreground is.
        cell: Edges of the grid's cells in voxels; those at the far border may be clipped by the volume.
        min_foreground: Wanted share in [0, 1] of the crop's real voxels.
        rng: Source of every draw.
    """
    low = np.minimum(0, np.subtract(shape, patch_size))
    high = np.maximum(0, np.subtract(shape, patch_size))
    score = _Score(shape, patch_size, occupancy, cell)
    tries = rng.integers(low, high + 1, size=(NUM_TRIES, len(shape)))
    if (crop := _first(tries, score, min_foreground)) is not None:
        return crop
    axes = [_breakpoints(*sides) for sides in zip(low, high, shape, patch_size, cell, strict=True)]
    shares = score.lattice(axes)
    best = float(shares.max())
    wanted = (min_foreground if best >= min_foreground else NEAR_BEST * best) - _ROUNDING
    position = np.unravel_index(rng.choice(np.flatnonzero(shares >= wanted)), shares.shape)
    corner = np.array([axis[index] for axis, index in zip(axes, position, strict=True)])
    shifts = rng.integers(-np.asarray(cell), np.asarray(cell) + 1, size=(NUM_TRIES, len(shape)))
    shifted = np.clip(corner + shifts, low, high)
    chosen = _first(np.concatenate([shifted, corner[None]]), score, wanted)
    assert chosen is not None, "the unshifted corner is good by construction"
    return chosen


def _first(lowers: npt.NDArray[np.int64], score: _Score, wanted: float) -> Crop | None:
    shares = score(lowers)
    good = np.flatnonzero(shares >= wanted)
    if not good.size:
        return None
    return Crop(tuple(int(corner) for corner in lowers[good[0]]), float(shares[good[0]]))


def _breakpoints(low: int, high: int, size: int, patch: int, cell: int) -> npt.NDArray[np.int64]:
    faces = np.append(np.arange(0, size, cell), size)
    return np.unique(np.clip(np.concatenate([faces, faces - patch]), low, high))


class _Score:
    """Foreground share of crops: the grid summed with, per axis, how much of each cell a crop covers."""

    def __init__(
        self, shape: Sequence[int], patch_size: Sequence[int], occupancy: npt.NDArray[np.bool_], cell: Sequence[int]
    ) -> None:
        self.shape, self.patch_size, self.cell = shape, patch_size, cell
        self.grid = occupancy.astype(np.float64)
        self.volume = float(np.prod(np.minimum(shape, patch_size)))

    def _cover(self, axis: int, lower: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        start = np.arange(self.grid.shape[axis]) * self.cell[axis]
        stop = np.minimum(start + self.cell[axis], self.shape[axis])
        upper = lower[:, None] + self.patch_size[axis]
        return np.clip(np.minimum(stop, upper) - np.maximum(start, lower[:, None]), 0, None).astype(np.float64)

    def __call__(self, lowers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Shares of crops with corners (N, 3)."""
        z, y, x = (self._cover(axis, lowers[:, axis]) for axis in range(3))
        rows = np.einsum("zyx,nx->zyn", self.grid, x)
        return np.einsum("zyn,nz,ny->n", rows, z, y) / self.volume

    def lattice(self, axes: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
        """Shares of crops at every combination of corners along each axis."""
        shares = self.grid
        for axis, lower in enumerate(axes):
            shares = np.moveaxis(np.tensordot(self._cover(axis, lower), shares, axes=(1, axis)), 0, axis)
        return shares / self.volume
