"""TIFF files: pictures and stacks of slices."""

from __future__ import annotations

import struct
from pathlib import Path

from nnssl_ext.core.records import read_json

TIFF_ENDINGS = (".tif", ".tiff")
CHANNEL_SUFFIX_LENGTH = len("_0000")


def tiff_layout(path: Path) -> tuple[tuple[int, ...], int]:
    """Shape of the array in a TIFF file without its colours, and the number of colours (1 when grey).

    Raises:
        ValueError: If the file is damaged.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            shape, axes = file.series[0].shape, file.series[0].axes
    except (tifffile.TiffFileError, struct.error, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    pairs = list(zip(axes, shape, strict=True))
    colours = next((int(length) for axis, length in pairs if axis == "S"), 1)
    return tuple(int(length) for axis, length in pairs if axis != "S"), colours


def tiff_spacing(path: Path) -> tuple[float, float, float]:
    """The spacing in nnU-Net's `CASE.json` beside a TIFF volume, or 1 mm as its reader assumes.

    Raises:
        ValueError: If that file does not hold three numbers.
    """
    stem = path.name.rpartition(".")[0]
    for name in (stem[:-CHANNEL_SUFFIX_LENGTH], stem):
        side = path.with_name(f"{name}.json")
        if name and side.is_file():
            try:
                z, y, x = read_json(side)["spacing"]
                return float(z), float(y), float(x)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{side} must hold {{"spacing": [z, y, x]}} in mm: {error}') from error
    return 1.0, 1.0, 1.0
