"""Writing segmentations and images, atomically."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnssl_ext.core.records import atomic_path
from nnssl_ext.imageio.formats import make_reader
from nnssl_ext.imageio.geometry import Geometry

WRITABLE_IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""Formats of one file each; `.mhd` is two, which cannot be put in place at once."""
WRITABLE_LABELS = (*WRITABLE_IMAGES, ".png", ".bmp", ".tif", ".tiff")


def write_segmentation(labels: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Writes a label map as nnU-Net's writer does: uint8, or uint16 where labels exceed 254.

    Args:
        labels: Whole numbers from 0, (Z, Y, X).
        geometry: Of the image that was segmented.
        path: Its ending, one of `WRITABLE_LABELS`, chooses the format.

    Raises:
        ValueError: If the array is not three-dimensional, has negative labels, or the ending is not writable.
    """
    _require_writable(path, WRITABLE_LABELS)
    if labels.ndim != 3:
        raise ValueError(f"a segmentation has the axes (Z, Y, X), not shape {labels.shape}")
    if labels.size and labels.min() < 0:
        raise ValueError(f"labels start at 0; found {labels.min()}")
    writer = make_reader(path)
    with atomic_path(path) as temporary:
        writer.write_seg(labels, str(temporary), geometry.to_nnunet_properties())


def write_image(voxels: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Writes one channel in its own number type.

    Args:
        voxels: (Z, Y, X).
        geometry: A 2D origin writes a 2D image; none at all places the image at zero, unrotated.
        path: Its ending, one of `WRITABLE_IMAGES`, chooses the format.

    Raises:
        ValueError: If the array is not three-dimensional, or the ending is not writable.
    """
    import SimpleITK as sitk

    _require_writable(path, WRITABLE_IMAGES)
    if voxels.ndim != 3:
        raise ValueError(f"an image channel has the axes (Z, Y, X), not shape {voxels.shape}")
    flat = len(geometry.origin) == 2
    image = sitk.GetImageFromArray(voxels[0] if flat else voxels)
    image.SetSpacing(geometry.spacing[::-1][: image.GetDimension()])
    if geometry.origin:
        image.SetOrigin(geometry.origin)
        image.SetDirection(geometry.direction)
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), True)


def _require_writable(path: Path, endings: tuple[str, ...]) -> None:
    if not path.name.endswith(endings):  # in lower case: for ".MHA" ITK writes two files
        raise ValueError(f"{path} cannot be written; possible endings: {', '.join(endings)}")
