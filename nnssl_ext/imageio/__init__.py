"""Arrays with geometry, read and written through nnU-Net's own readers: the one place where axes are converted."""

from nnssl_ext.imageio.formats import FILE_ENDINGS, file_ending_of, reader_name_for
from nnssl_ext.imageio.geometry import Geometry
from nnssl_ext.imageio.headers import Header, read_header
from nnssl_ext.imageio.read import read_image, read_segmentation, read_segmentation_of
from nnssl_ext.imageio.write import write_image, write_segmentation

__all__ = [
    "FILE_ENDINGS",
    "Geometry",
    "Header",
    "file_ending_of",
    "read_header",
    "read_image",
    "read_segmentation",
    "read_segmentation_of",
    "reader_name_for",
    "write_image",
    "write_segmentation",
]
