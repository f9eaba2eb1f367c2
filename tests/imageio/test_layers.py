"""What lies over an image lies where the image does, also for other programs."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.imageio import write_image
from nnssl_ext.imageio.layers import write_field, write_rgb, write_stack
from tests.downstream.test_grids import FLAT, OBLIQUE


def test_colours_lie_on_the_image(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    write_rgb(rgb, OBLIQUE, tmp_path / "rgb.nii.gz")
    write_image(np.zeros((4, 5, 6), np.float32), OBLIQUE, tmp_path / "image.nii.gz")
    found, image = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("rgb", "image"))
    assert np.array_equal(sitk.GetArrayFromImage(found), rgb)
    for index in ((0, 0, 0), (5, 4, 3)):
        assert np.allclose(
            found.TransformIndexToPhysicalPoint(index), image.TransformIndexToPhysicalPoint(index), atol=1e-4
        )
    assert nibabel.load(tmp_path / "rgb.nii.gz").get_data_dtype().names == ("R", "G", "B")


def test_a_stack_of_half_precision_is_a_4d_image(tmp_path):
    values = np.random.default_rng(1).normal(size=(3, 4, 5, 6)).astype(np.float16)
    write_stack(values, OBLIQUE, tmp_path / "stack.nii.gz")
    found = sitk.ReadImage(str(tmp_path / "stack.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(found), values.astype(np.float32))
    assert np.allclose(found.GetOrigin()[:3], OBLIQUE.origin, atol=1e-4)
    assert np.allclose(found.GetSpacing()[:3], OBLIQUE.spacing[::-1], atol=1e-5)
    assert np.allclose(np.reshape(found.GetDirection(), (4, 4))[:3, :3].ravel(), OBLIQUE.direction, atol=1e-4)


@pytest.mark.parametrize(("geometry", "size"), [(OBLIQUE, 3), (FLAT, 2)], ids=["3d", "2d"])
def test_a_field_is_a_vector_image(tmp_path, geometry, size):
    shape = (4, 5, 6) if size == 3 else (1, 5, 6)
    vectors = np.random.default_rng(2).normal(size=(*shape, 3)).astype(np.float32)
    write_field(vectors, geometry, tmp_path / "field.nii.gz")
    found = sitk.ReadImage(str(tmp_path / "field.nii.gz"))
    assert found.GetNumberOfComponentsPerPixel() == found.GetDimension() == size
    assert np.allclose(sitk.GetArrayFromImage(found).reshape(*shape, size), vectors[..., :size])
    assert np.allclose(found.GetDirection(), geometry.direction, atol=1e-4)
