from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.imageio import Geometry, read_image, read_segmentation, write_image, write_segmentation

GEOMETRY = Geometry(
    spacing=(3.0, 0.8, 0.7), origin=(1.0, -2.0, 3.5), direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_written_labels_come_back_where_they_were(tmp_path: Path, ending: str) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    write_segmentation(labels, GEOMETRY, tmp_path / f"s{ending}")
    found, geometry = read_segmentation(tmp_path / f"s{ending}")
    np.testing.assert_array_equal(found, labels)
    assert geometry.spacing == pytest.approx(GEOMETRY.spacing)
    assert geometry.origin == pytest.approx(GEOMETRY.origin)
    assert geometry.direction == pytest.approx(GEOMETRY.direction)


def test_many_labels_need_two_bytes(tmp_path: Path) -> None:
    labels = np.full((3, 4, 5), 300, np.int16)
    write_segmentation(labels, GEOMETRY, tmp_path / "s.nii.gz")
    assert sitk.ReadImage(str(tmp_path / "s.nii.gz")).GetPixelID() == sitk.sitkUInt16
    np.testing.assert_array_equal(read_segmentation(tmp_path / "s.nii.gz")[0], labels)


def test_flat_images_stay_flat(tmp_path: Path) -> None:
    flat = Geometry(spacing=(999.0, 1.0, 1.0), origin=(0.0, 0.0), direction=(1.0, 0.0, 0.0, 1.0))
    write_segmentation(np.ones((1, 6, 7), np.uint8), flat, tmp_path / "s.nii.gz")
    assert sitk.ReadImage(str(tmp_path / "s.nii.gz")).GetDimension() == 2
    write_image(np.ones((1, 6, 7), np.float32), flat, tmp_path / "i.nrrd")
    assert read_image([tmp_path / "i.nrrd"])[1] == flat
    picture = Geometry(spacing=(999.0, 1.0, 1.0))
    write_segmentation(np.ones((1, 6, 7), np.uint8), picture, tmp_path / "s.png")
    assert read_segmentation(tmp_path / "s.png")[0].shape == (1, 6, 7)


def test_image_keeps_its_number_type(tmp_path: Path) -> None:
    write_image(np.full((3, 4, 5), -7, np.int16), GEOMETRY, tmp_path / "i.nii.gz")
    assert sitk.ReadImage(str(tmp_path / "i.nii.gz")).GetPixelID() == sitk.sitkInt16


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels start at 0"):
        write_segmentation(np.full((2, 2, 2), -1), GEOMETRY, tmp_path / "s.nii.gz")
    with pytest.raises(ValueError, match=r"axes \(Z, Y, X\)"):
        write_segmentation(np.zeros((2, 2), np.uint8), GEOMETRY, tmp_path / "s.nii.gz")
    with pytest.raises(ValueError, match=r"axes \(Z, Y, X\)"):
        write_image(np.zeros((1, 2, 2, 2)), GEOMETRY, tmp_path / "i.nii.gz")
    for name in ("i.png", "i.mhd", "i.MHA"):
        with pytest.raises(ValueError, match=f"{name} cannot be written"):
            write_image(np.zeros((1, 2, 2)), GEOMETRY, tmp_path / name)
    with pytest.raises(ValueError, match=r"s\.mhd cannot be written"):
        write_segmentation(np.zeros((2, 2, 2), np.uint8), GEOMETRY, tmp_path / "s.mhd")
    with pytest.raises(RuntimeError):
        write_image(np.zeros((2, 2, 2), np.complex64), Geometry(spacing=(0.0, 1.0, 1.0)), tmp_path / "i.nii.gz")
    assert list(tmp_path.iterdir()) == []
