"""Features, colours and attention as files that lie on the image they are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nnssl_ext.core.records import atomic_path
from nnssl_ext.downstream.features import FeatureMap, Place, storage
from nnssl_ext.downstream.grids import by_rows, image_grid, index_to_scanner, interpolate, nearest
from nnssl_ext.downstream.pca import PCA, colours, project
from nnssl_ext.imageio.layers import write_stack


def shown(place: Place, foreground: bool) -> torch.Tensor:
    """The voxels of the image (Z, Y, X) that have features: what was cropped away and what was altered has none.

    Args:
        place: Of the features.
        foreground: Whether the background has none either.
    """
    mask = place.known & place.foreground if foreground else place.known
    return nearest(mask, place.grid, image_grid(place.shape))


def save_npz(features: FeatureMap, path: Path) -> None:
    """Writes the cells of a feature map as they are.

    The file holds `features` (D, Z, Y, X) in float16, `known` (Z, Y, X), False on cells with padding or altered voxels,
    and `to_scanner`, the matrix (4, 4) from a cell (z, y, x, 1) to its middle in mm (x, y, z, 1), LPS.
    """
    to_scanner = index_to_scanner(features.grid.geometry(features.place.geometry))
    with atomic_path(path) as temporary:
        np.savez(temporary, features=features.values, known=features.known.numpy(), to_scanner=to_scanner)


def save_stack(features: FeatureMap, path: Path, on_image: bool) -> None:
    """Writes a feature map as a 4D image, one volume a channel.

    Args:
        features: The map.
        path: Ends in `.nii` or `.nii.gz`.
        on_image: Whether it gets the image's voxels, interpolated linearly and 0 where there are no features; else the
            cells are the voxels, which lie where they belong in the scanner.
    """
    place = features.place
    if not on_image:
        write_stack(features.values, features.grid.geometry(place.geometry), path)
        return
    write_stack(stretched(features, path.parent), place.geometry, path)


def stretched(features: FeatureMap, scratch: Path | None = None) -> npt.NDArray[np.float16]:
    """A feature map on the image's voxels (D, Z, Y, X), 0 where there are no features; made some slices at a time."""
    mask = shown(features.place, foreground=False)
    result = storage((len(features.values), *features.place.shape), scratch)
    for rows, grid in by_rows(image_grid(features.place.shape)):
        for channel, target in zip(features.values, result, strict=True):
            cells = torch.from_numpy(np.array(channel, dtype=np.float32))[None]
            target[rows] = (interpolate(cells, features.grid, grid)[0] * mask[rows]).numpy()
    return result


def painted(
    features: FeatureMap, pca: PCA, limits: tuple[torch.Tensor, torch.Tensor], foreground: bool
) -> npt.NDArray[np.uint8]:
    """Three components as colours on the image's voxels.

    Args:
        features: The map.
        pca: Of three components.
        limits: Of `colour_range`.
        foreground: Whether the background stays black.

    Returns:
        (Z, Y, X, 3), black where nothing is shown, else from 1 to 255.
    """
    projected, mask = project(pca, features), shown(features.place, foreground)
    result = np.zeros((*features.place.shape, 3), dtype=np.uint8)
    for rows, grid in by_rows(image_grid(features.place.shape)):
        result[rows] = colours(interpolate(projected, features.grid, grid), limits) * mask[rows, ..., None].numpy()
    return result
