"""Writing what is laid over an image: colours, several values a voxel, displacements. All atomic, all NIfTI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnssl_ext.core.records import atomic_path
from nnssl_ext.imageio.geometry import Geometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""NIfTI counts x and y in the other direction than DICOM and ITK do."""
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
_IN_SCANNER = 1
"""NIfTI's code of a placement in the scanner."""


def write_rgb(colours: npt.NDArray[np.uint8], geometry: Geometry, path: Path) -> None:
    """Writes a colour image in NIfTI's RGB24.

    Args:
        colours: (Z, Y, X, 3).
        geometry: Of the image; a 2D one becomes a volume of one slice.
        path: Ends in `.nii` or `.nii.gz`.
    """
    from nibabel import Nifti1Image

    packed = np.ascontiguousarray(colours).view(_RGB)[..., 0]
    _save(Nifti1Image(packed.transpose(2, 1, 0), None), geometry, path)


def write_stack(values: npt.NDArray[np.floating], geometry: Geometry, path: Path) -> None:
    """Writes several values a voxel as the volumes of a 4D image in float32, the smallest float that NIfTI has.

    Args:
        values: (C, Z, Y, X); may be a memory map, which is read slice by slice.
        geometry: Of one of its volumes.
        path: Ends in `.nii` or `.nii.gz`.
    """
    from nibabel import Nifti1Header, Nifti1Image

    header = Nifti1Header()
    header.set_data_dtype(np.float32)
    _save(Nifti1Image(values.transpose(3, 2, 1, 0), None, header), geometry, path)


def write_field(vectors: npt.NDArray[np.float32], geometry: Geometry, path: Path) -> None:
    """Writes displacements as ITK and ANTs read them: a vector image whose vectors are mm along ITK's axes (LPS).

    Args:
        vectors: (Z, Y, X, 3), components x, y, z.
        geometry: Of the image that the field is given on; a 2D one gets vectors of x and y.
        path: Ends in `.nii` or `.nii.gz`.
    """
    import SimpleITK as sitk

    flat = len(geometry.origin) == 2
    field = sitk.GetImageFromArray(vectors[0, ..., :2] if flat else vectors, isVector=True)
    field.SetSpacing(geometry.spacing[::-1][: field.GetDimension()])
    if geometry.origin:
        field.SetOrigin(geometry.origin)
        field.SetDirection(geometry.direction)
    with atomic_path(path) as temporary:
        sitk.WriteImage(field, str(temporary), True)


def to_scanner(geometry: Geometry) -> npt.NDArray[np.float64]:
    """The matrix (4, 4) from a voxel (x, y, z, 1) to its place in the scanner (x, y, z, 1), in mm, LPS as in DICOM.

    An image without a direction lies unrotated at zero; a 2D image lies in the plane z = 0.
    """
    matrix, dims = np.eye(4), len(geometry.origin)
    if dims:
        matrix[:dims, :dims] = np.reshape(geometry.direction, (dims, dims))
        matrix[:dims, 3] = geometry.origin
    matrix[:3, :3] *= geometry.spacing[::-1]
    return matrix


def _save(image: Any, geometry: Geometry, path: Path) -> None:
    image.set_qform(LPS_TO_RAS @ to_scanner(geometry), _IN_SCANNER)
    image.set_sform(LPS_TO_RAS @ to_scanner(geometry), _IN_SCANNER)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        image.to_filename(temporary)
