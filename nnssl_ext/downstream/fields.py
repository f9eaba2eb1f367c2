"""Displacements in the scanner: applied to images, and what they do to volumes.

A field is (Z, Y, X, 3) on the voxels of the fixed image, in mm along ITK's axes (x, y, z; LPS): the point p of the
fixed image shows what is at p + field(p) of the moving one. That is what ITK's `DisplacementFieldTransform` resamples
with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnssl_ext.downstream.grids import by_rows, image_grid, index_to_scanner
from nnssl_ext.imageio import Geometry

Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Deformation:
    """What a field does to volumes."""

    folding: float
    """Share of the voxels whose Jacobian determinant is not above 0: tissue turned inside out."""
    sd_log_jacobian: float
    """Standard deviation of the logarithm of the determinant where it is above 0; 0 for a translation."""


def sample_moving(
    moving: npt.NDArray[np.generic], moving_geometry: Geometry, field: Field, geometry: Geometry, order: int = 1
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.bool_]]:
    """The moving image under a field.

    Args:
        moving: (C, Z, Y, X).
        moving_geometry: Its geometry.
        field: On the fixed image.
        geometry: Of the fixed image.
        order: 1 interpolates linearly, 0 takes the nearest voxel, for labels.

    Returns:
        (C, *fixed shape), the type of `moving`, the outermost voxels going on beyond the image; and where the moving
        image has voxels, (*fixed shape).
    """
    shape, size = field.shape[:3], np.array(moving.shape[1:]).reshape(3, 1, 1, 1)
    result = np.empty((len(moving), *shape), dtype=moving.dtype)
    seen = np.empty(shape, dtype=bool)
    to_moving = np.linalg.inv(index_to_scanner(moving_geometry))
    onto = to_moving @ index_to_scanner(geometry)
    for rows, grid in by_rows(image_grid(shape)):
        places = np.indices(grid.size, dtype=np.float64)
        places[0] += rows.start
        found = np.tensordot(onto[:3, :3], places, 1) + onto[:3, 3].reshape(3, 1, 1, 1)
        found += np.tensordot(to_moving[:3, :3], np.moveaxis(field[rows], -1, 0), 1)
        seen[rows] = np.all((found >= -0.5) & (found <= size - 0.5), axis=0)
        for channel, target in zip(moving, result, strict=True):
            target[rows] = ndimage.map_coordinates(channel, found, order=order, mode="nearest")
    return result, seen


def to_scanner_vectors(field: npt.NDArray[np.floating], geometry: Geometry) -> Field:
    """A field in voxels (3, Z, Y, X), components z, y, x, as one in the scanner."""
    matrix = index_to_scanner(geometry)[:3, :3]
    return np.moveaxis(np.tensordot(matrix, field, 1), 0, -1).astype(np.float32)


def deformation(field: Field, geometry: Geometry) -> Deformation:
    """Folding and spread of volumes, by central differences (at the border one-sided)."""
    determinants = jacobian_determinants(field, geometry)
    positive = determinants[determinants > 0]
    spread = float(np.log(positive).std()) if positive.size else float("nan")
    return Deformation(float((determinants <= 0).mean()), spread)


def jacobian_determinants(field: Field, geometry: Geometry) -> npt.NDArray[np.float64]:
    """How many times its volume each voxel takes in the moving image; below 0 where it is turned inside out."""
    result = np.empty(field.shape[:3])
    for rows, _ in by_rows(image_grid(field.shape[:3])):
        low = max(rows.start - 1, 0)  # central differences look at the slices before and after
        voxels = places_moved(field[low : rows.stop + 1], geometry)
        jacobian = np.zeros((*voxels.shape[1:], 3, 3)) + np.eye(3)
        for axis in (axis for axis in range(3) if field.shape[axis] > 1):
            jacobian[..., axis] = np.moveaxis(np.gradient(voxels, axis=axis + 1), 0, -1)
        result[rows] = np.linalg.det(jacobian)[rows.start - low :][: rows.stop - rows.start]
    return result


def places_moved(field: Field, geometry: Geometry) -> npt.NDArray[np.float64]:
    """Where a field takes each voxel of the fixed image, in its voxels: (3, Z, Y, X), components z, y, x."""
    inverse = np.linalg.inv(index_to_scanner(geometry)[:3, :3])
    moved = np.tensordot(inverse, np.moveaxis(field, -1, 0).astype(np.float64), 1)
    return moved + np.indices(field.shape[:3])
