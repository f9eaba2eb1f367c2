"""What SimpleITK does not tell about NIfTI files: whether they are whole, and the numbers they really hold.

ITK reads a truncated `.nii` or `.nii.gz` without complaint and fills the missing slices with zeros, replaces voxels
that are NaN or infinite by zero, and a voxel size of zero or NaN by 1 mm.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

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


def check_whole(path: Path) -> None:
    """Makes sure that a NIfTI file is as long as its header announces. Quick: gzip tells its length at its end.

    Raises:
        ValueError: If the file is truncated.
    """
    start, num_bytes, _ = _voxel_bytes(path)
    expected = start + num_bytes
    whole = _gzip_trailer(path) == expected % (1 << 32) if _is_gzip(path) else path.stat().st_size >= expected
    if not whole:
        count_non_finite(path)  # truncated, or a gzip file of several members, whose last one alone was asked


def count_non_finite(path: Path) -> int:
    """Reads every byte of a NIfTI file and counts the voxels that are NaN or infinite.

    Raises:
        ValueError: If the file is truncated, or its compressed data do not match their checksum.
    """
    start, num_bytes, dtype = _voxel_bytes(path)
    count = 0
    try:
        with _open(path) as file:
            found = len(file.read(start))
            while block := file.read(_BLOCK):
                voxels = memoryview(block)[: max(0, start + num_bytes - found)]
                found += len(block)
                if dtype.kind == "f":
                    values = np.frombuffer(voxels[: len(voxels) // dtype.itemsize * dtype.itemsize], dtype)
                    count += values.size - int(np.isfinite(values).sum())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}. Copy it again") from error
    if found < start + num_bytes:
        expected = start + num_bytes
        raise ValueError(f"{path} is truncated: its header announces {expected} bytes, it holds {found}. Copy it again")
    return count


def _voxel_bytes(path: Path) -> tuple[int, int, np.dtype[Any]]:
    """Where the voxels start, how many bytes they are, and their type."""
    header = _read_header(path)
    dtype = header.get_data_dtype()
    num_voxels = math.prod(int(length) for length in header.get_data_shape())
    return int(header.get_data_offset()), dtype.itemsize * num_voxels, dtype


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if _is_gzip(path) else path.open("rb")


def _read_header(path: Path) -> Any:
    """The header as it is in the file: nibabel's own loading would repair it."""
    from nibabel import Nifti1Header, Nifti2Header
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        with _open(path) as file:
            content = file.read(Nifti2Header.template_dtype.itemsize)
        is_second = NIFTI_2_SIZE in (int.from_bytes(content[:4], order) for order in ("little", "big"))
        header_class = Nifti2Header if is_second else Nifti1Header
        return header_class(content[: header_class.template_dtype.itemsize], check=False)
    except (HeaderDataError, WrapStructError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} cannot be read: it has no NIfTI header ({error})") from error


def _gzip_trailer(path: Path) -> int:
    """The uncompressed size, modulo 2**32, that the last four bytes of a gzip file give."""
    with path.open("rb") as file:
        file.seek(-_GZIP_SIZE_BYTES, 2)
        return int.from_bytes(file.read(_GZIP_SIZE_BYTES), "little")
