"""Shape, spacing and number of channels of a file, without reading its voxels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.imageio.formats import file_ending_of, reader_name_for
from nnssl_ext.imageio.geometry import SLICE_SPACING_FACTOR, Geometry, from_sitk
from nnssl_ext.imageio.nifti import count_non_finite, is_nifti
from nnssl_ext.imageio.tiff import TIFF_ENDINGS, tiff_layout, tiff_spacing


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about the image in it."""

    shape: tuple[int, int, int]
    """Number of voxels, (Z, Y, X)."""
    geometry: Geometry
    num_components: int
    """Channels that reading the file gives: colours of a picture, volumes of a 4D file."""
    dimension: int
    """Dimensions of the stored array: 2, 3 or 4."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm, (z, y, x)."""
        return self.geometry.spacing


def read_header(path: Path) -> Header:
    """Reads the header of any readable file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or damaged, or holds vectors, complex numbers or more than four dimensions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file. Copy it again")
    reader = reader_name_for(file_ending_of(path), path)
    if reader == "SimpleITKIO":
        return _itk_header(path)
    return _tiff_volume_header(path) if reader == "Tiff3DIO" else _picture_header(path)


def _itk_header(path: Path) -> Header:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if is_nifti(path):
            count_non_finite(path)  # says more where the file is damaged
        ending = file_ending_of(path)
        hint = f". Rename it to end in {ending.lower()}" if ending != ending.lower() else ""
        raise ValueError(f"{path} cannot be read: {last_line(error)}{hint}") from error
    size, spacing = reader.GetSize(), reader.GetSpacing()
    components, dimension = reader.GetNumberOfComponents(), reader.GetDimension()
    if components != 1:
        raise ValueError(
            f"{path} holds {components} values per voxel (a vector, colour or complex image); give one file per channel"
        )
    if not 2 <= dimension <= 4:
        raise ValueError(f"{path} has {dimension} dimensions; 2, 3 or 4 are possible")
    if dimension == 2:
        size, spacing = (*size, 1), (*spacing, SLICE_SPACING_FACTOR * max(spacing))
    return Header(
        shape=(size[2], size[1], size[0]),
        geometry=from_sitk((spacing[2], spacing[1], spacing[0]), reader.GetOrigin(), reader.GetDirection()),
        num_components=size[3] if dimension == 4 else 1,
        dimension=dimension,
    )


def _picture_header(path: Path) -> Header:
    is_tiff = file_ending_of(path).lower() in TIFF_ENDINGS
    shape, components = tiff_layout(path) if is_tiff else _natural_layout(path)
    if len(shape) != 2:
        raise ValueError(
            f"{path} holds an array of shape {shape} with {components} colours; nnU-Net reads no such TIFF"
        )
    geometry = Geometry(spacing=(SLICE_SPACING_FACTOR, 1.0, 1.0))
    return Header(shape=(1, shape[0], shape[1]), geometry=geometry, num_components=components, dimension=2)


def _natural_layout(path: Path) -> tuple[tuple[int, ...], int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            palette = 4 if "transparency" in image.info else 3
            components = palette if image.mode == "P" else len(image.getbands())
            return (image.height, image.width), components
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _tiff_volume_header(path: Path) -> Header:
    shape, _ = tiff_layout(path)
    if len(shape) != 3:
        raise ValueError(f"{path} holds an array of shape {shape}; a volume (Z, Y, X) or a picture (Y, X) is possible")
    geometry = Geometry(spacing=tiff_spacing(path))
    return Header(shape=(shape[0], shape[1], shape[2]), geometry=geometry, num_components=1, dimension=3)


def last_line(error: Exception) -> str:
    """The line of an error's text that names the cause: ITK's and nrrd's last one, without memory addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else type(error).__name__
