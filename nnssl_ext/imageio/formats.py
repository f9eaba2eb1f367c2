"""Which of nnU-Net's readers opens which file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnssl_ext.imageio.tiff import TIFF_ENDINGS, tiff_layout

ITK_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
NATURAL_ENDINGS = (".png", ".bmp")
FILE_ENDINGS = ITK_ENDINGS + NATURAL_ENDINGS + TIFF_ENDINGS
"""Every file ending that can be read."""


def file_ending_of(path: Path) -> str:
    """The known file ending of a path, in the case it is written in (".nii.gz" whole).

    Raises:
        ValueError: If it is no image that can be read.
    """
    name = Path(path).name
    for ending in FILE_ENDINGS:
        if name.lower().endswith(ending):
            return name[-len(ending) :]
    raise ValueError(f"{path} is not an image that can be read. Readable: {', '.join(FILE_ENDINGS)}")


def reader_name_for(file_ending: str, example: Path | None = None) -> str:
    """Name of the nnU-Net class that reads such files, as plans and `dataset.json` give it.

    Args:
        file_ending: Such as ".nii.gz".
        example: A file of that kind; decides between 2D and 3D readers for TIFF, which has both.

    Raises:
        ValueError: If no reader knows the ending, or the example is damaged.
    """
    ending = file_ending.lower()
    if ending in ITK_ENDINGS:
        return "SimpleITKIO"
    if ending in NATURAL_ENDINGS:
        return "NaturalImage2DIO"
    if ending in TIFF_ENDINGS:
        return "Tiff3DIO" if example is not None and _is_tiff_volume(example) else "NaturalImage2DIO"
    raise ValueError(f"no reader knows the file ending {file_ending!r}. Readable: {', '.join(FILE_ENDINGS)}")


def make_reader(path: Path) -> Any:
    """An instance of the nnU-Net reader for one file, found without importing torch.

    Raises:
        ValueError: If no reader knows the file's ending, or the file is a damaged TIFF.
    """
    name = reader_name_for(file_ending_of(path), path)
    if name == "SimpleITKIO":
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        return SimpleITKIO()
    if name == "Tiff3DIO":
        from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

        return Tiff3DIO()
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    return NaturalImage2DIO()


def _is_tiff_volume(path: Path) -> bool:
    """Whether a TIFF file holds a stack of slices and not one grey or colour picture."""
    if not path.is_file():
        return False
    shape, colours = tiff_layout(path)
    return len(shape) > 2 and colours == 1
