"""Shape, spacing and number of channels of a file, without reading its voxels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.imageio.formats import TIFF_ENDINGS, file_ending_of, reader_name_for
from nnssl_ext.imageio.geometry import SLICE_SPACING_FACTOR, Geometry, from_sitk

CHANNEL_SUFFIX_LENGTH = len("_0000")


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
        raise ValueError(f"{path} cannot be read: {last_line(error)}") from error
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
    shape, components = _tiff_picture(path) if is_tiff else _natural_picture(path)
    geometry = Geometry(spacing=(SLICE_SPACING_FACTOR, 1.0, 1.0))
    return Header(shape=(1, *shape), geometry=geometry, num_components=components, dimension=2)


def _natural_picture(path: Path) -> tuple[tuple[int, int], int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            palette = 4 if "transparency" in image.info else 3
            components = palette if image.mode == "P" else len(image.getbands())
            return (image.height, image.width), components
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _tiff_picture(path: Path) -> tuple[tuple[int, int], int]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            height, width, *colours = file.series[0].shape
            return (int(height), int(width)), int(colours[0]) if colours else 1
    except (tifffile.TiffFileError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _tiff_volume_header(path: Path) -> Header:
    import tifffile

    with tifffile.TiffFile(path) as file:
        shape = tuple(int(length) for length in file.series[0].shape)
    if len(shape) != 3:
        raise ValueError(f"{path} holds an array of shape {shape}; a volume (Z, Y, X) or a picture is possible")
    return Header(
        shape=(shape[0], shape[1], shape[2]),
        geometry=Geometry(spacing=_tiff_spacing(path)),
        num_components=1,
        dimension=3,
    )


def _tiff_spacing(path: Path) -> tuple[float, float, float]:
    """The spacing in nnU-Net's `CASE.json` beside a TIFF volume, or 1 mm as its reader assumes."""
    stem = path.name[: -len(file_ending_of(path))]
    for name in (stem[:-CHANNEL_SUFFIX_LENGTH], stem):
        side = path.with_name(f"{name}.json")
        if name and side.is_file():
            z, y, x = json.loads(side.read_text(encoding="utf-8"))["spacing"]
            return float(z), float(y), float(x)
    return 1.0, 1.0, 1.0


def last_line(error: Exception) -> str:
    """The last line of an error's text that says something: ITK and nrrd put the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
