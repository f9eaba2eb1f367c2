"""Reading images and segmentations through nnU-Net's readers, with the faults they pass over made errors."""

from __future__ import annotations

import contextlib
import io
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nnssl_ext.imageio.formats import make_reader
from nnssl_ext.imageio.geometry import Geometry
from nnssl_ext.imageio.headers import Header, last_line, read_header
from nnssl_ext.imageio.nifti import check_whole, is_nifti

logger = logging.getLogger(__name__)

SPACING_TOLERANCE = 1e-5
"""Relative difference up to which spacings are the same: that of nnU-Net's readers."""


def read_image(files: Sequence[Path]) -> tuple[np.ndarray, Geometry]:
    """Reads the channels of one case.

    Args:
        files: One file per channel, in order; a colour picture or a 4D file brings several channels by itself.

    Returns:
        The voxels, float32 (C, Z, Y, X), exactly as nnU-Net's reader gives them, and their geometry.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If no file is given, one cannot be read or is truncated, or the channels differ in shape or spacing.
    """
    files = [Path(file) for file in files]
    if not files:
        raise ValueError("no image file was given")
    headers = [read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        _require_same(files[0], headers[0], file, header)
        if is_nifti(file):
            check_whole(file)
    reader = make_reader(files[0])
    with _reader_errors(files):
        data, properties = reader.read_images([str(file) for file in files])
    return np.ascontiguousarray(data, dtype=np.float32), Geometry.from_nnunet_properties(properties)


def read_segmentation(path: Path) -> tuple[np.ndarray, Geometry]:
    """Reads a label map.

    Returns:
        The labels, (Z, Y, X), uint8 where they fit, else int16; and their geometry.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read, has several channels, or values that are no integers of 16 bits.
    """
    path = Path(path)
    header = read_header(path)
    if header.num_components != 1:
        raise ValueError(f"{path} has {header.num_components} channels; a label map has one")
    if is_nifti(path):
        check_whole(path)
    reader = make_reader(path)
    with _reader_errors([path]):
        data, properties = reader.read_seg(str(path))
    labels = data[0]
    if not np.array_equal(labels, np.rint(labels)):
        raise ValueError(f"{path} holds values that are no whole numbers, so it is no label map")
    low, high = labels.min(), labels.max()
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise ValueError(f"{path} holds labels from {low:g} to {high:g}; {limits.min} to {limits.max} are possible")
    narrow = low >= 0 and high <= np.iinfo(np.uint8).max
    return labels.astype(np.uint8 if narrow else np.int16), Geometry.from_nnunet_properties(properties)


def read_segmentation_of(path: Path, shape: tuple[int, ...], geometry: Geometry) -> np.ndarray:
    """Reads the label map or mask of an image that has been read.

    Args:
        path: Its file.
        shape: (Z, Y, X) of the image.
        geometry: Of the image.

    Returns:
        The labels, as `read_segmentation` gives them.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it cannot be read, or lies in another place than the image.
    """
    labels, placed = read_segmentation(path)
    if labels.shape != shape or not placed.same_place(geometry):
        raise ValueError(
            f"{path} and its image do not lie in the same place: its shape is {labels.shape} with {placed}, the "
            f"image's {tuple(shape)} with {geometry}. Resample it to the image, or correct its header"
        )
    return labels


def _require_same(first: Path, reference: Header, file: Path, header: Header) -> None:
    if header.shape != reference.shape or header.num_components != reference.num_components:
        raise ValueError(
            f"channels differ in shape: {first} has {reference.shape}, {file} has {header.shape}; resample one of them"
        )
    if not np.allclose(header.spacing, reference.spacing, rtol=SPACING_TOLERANCE):
        raise ValueError(
            f"channels differ in spacing: {first} has {reference.spacing} mm, {file} has {header.spacing} mm"
        )


@contextlib.contextmanager
def _reader_errors(files: Sequence[Path]) -> Iterator[None]:
    """Turns what the libraries raise into a ValueError that names the files, and what nnU-Net prints into log lines."""
    import tifffile

    causes = (RuntimeError, OSError, AssertionError, SyntaxError, ValueError, EOFError, IndexError, zlib.error)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except (*causes, tifffile.TiffFileError) as error:
        raise ValueError(f"{', '.join(map(str, files))} cannot be read: {last_line(error)}") from error
    if printed.getvalue():
        logger.info("%s", " ".join(printed.getvalue().split()))
