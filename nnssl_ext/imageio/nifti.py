"""What SimpleITK does not tell about NIfTI files: whether they are whole, and the voxel size they really hold.

ITK reads a truncated `.nii` or `.nii.gz` without complaint and fills the missing slices with zeros, and replaces a
voxel size of zero or NaN by 1 mm.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

NIFTI_ENDINGS = (".nii.gz", ".nii")
_BLOCK = 1 << 20
_GZIP_SIZE_BYTES = 4
NIFTI_2_SIZE = 540
"""Length in bytes of a NIfTI-2 header, its own first entry; a NIfTI-1 header has 348."""


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI, by its name."""
    return path.name.lower().endswith(NIFTI_ENDINGS)


def stored_spacing(path: Path) -> tuple[float, ...]:
    """The voxel size written in the header, (x, y, z), unrepaired: may be zero, negative or NaN.

    Raises:
        ValueError: If the header cannot be read.
    """
    header = _read_header(path)
    return tuple(float(value) for value in header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))])


def check_whole(path: Path, *, every_byte: bool = False) -> None:
    """Makes sure that a NIfTI file holds all the voxels that its header announces.

    Args:
        path: A `.nii` or `.nii.gz` file.
        every_byte: Decompress everything and compare gzip's checksum too; else the sizes alone are compared.

    Raises:
        ValueError: If the file is truncated or its compressed data are damaged.
    """
    header = _read_header(path)
    num_bytes = header.get_data_dtype().itemsize * math.prod(int(length) for length in header.get_data_shape())
    expected = int(header.get_data_offset()) + num_bytes
    if not _is_gzip(path):
        found = path.stat().st_size
    elif not every_byte and _gzip_trailer(path) == expected % (1 << 32):
        return
    else:
        found = _decompressed_size(path)
    if found < expected:
        raise ValueError(f"{path} is truncated: its header announces {expected} bytes, it holds {found}. Copy it again")


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _read_header(path: Path) -> Any:
    """The header as it is in the file: nibabel's own loading would repair it."""
    from nibabel import Nifti1Header, Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    try:
        with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as file:
            content = file.read(Nifti2Header.template_dtype.itemsize)
        is_second = NIFTI_2_SIZE in (int.from_bytes(content[:4], order) for order in ("little", "big"))
        header_class = Nifti2Header if is_second else Nifti1Header
        return header_class(content[: header_class.template_dtype.itemsize], check=False)
    except (HeaderDataError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} has no readable NIfTI header: {error}") from error


def _gzip_trailer(path: Path) -> int:
    """The uncompressed size, modulo 2**32, that the last four bytes of a gzip file give."""
    with path.open("rb") as file:
        file.seek(-_GZIP_SIZE_BYTES, 2)
        return int.from_bytes(file.read(_GZIP_SIZE_BYTES), "little")


def _decompressed_size(path: Path) -> int:
    size = 0
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                size += len(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}. Copy it again") from error
    return size
