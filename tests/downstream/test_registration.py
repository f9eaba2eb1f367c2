"""Whole registrations in the scanner: directions, folding, orientations, and what SimpleITK makes of the field."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl_ext.downstream.convex import ConvexConfig
from nnssl_ext.downstream.fields import (
    deformation,
    jacobian_determinants,
    places_moved,
    sample_moving,
    to_scanner_vectors,
)
from nnssl_ext.downstream.frozen import random_frozen
from nnssl_ext.downstream.grids import index_to_scanner
from nnssl_ext.downstream.registration import (
    Image,
    cubes,
    mind_features,
    moved_labels,
    network_features,
    overlaps,
    register,
)
from nnssl_ext.imageio import Geometry
from nnssl_ext.imageio.layers import write_field
from tests.downstream.test_convex import texture
from tests.downstream.test_grids import OBLIQUE

CPU = torch.device("cpu")
FIXED = Geometry(spacing=(1.0, 1.0, 1.0), origin=(5.0, -3.0, 11.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
TURNED = Geometry(spacing=(0.9, 1.4, 1.1), origin=(37.0, -14.0, 1.0), direction=(0, -1.0, 0, 1.0, 0, 0, 0, 0, 1.0))
"""Another order of axes, one of them mirrored, other spacings; its field of view holds that of `FIXED`."""
QUICK = ConvexConfig(steps=40)


def scanned(geometry: Geometry, shape: tuple[int, ...], shift: np.ndarray | float = 0.0) -> Image:
    """An image of a texture in the scanner's own coordinates, moved by a displacement (x, y, z)."""
    places = np.indices(shape).reshape(3, -1)
    points = (index_to_scanner(geometry) @ np.vstack([places, np.ones(places.shape[1])]))[:3]
    points = points + np.reshape(shift, (3, -1)) if np.ndim(shift) else points
    return Image(
        "scan.nii.gz", 100 * texture(torch.from_numpy(points).float())[:1].numpy().reshape(1, *shape), geometry
    )


@pytest.mark.parametrize(("geometry", "shape"), [(FIXED, (26, 25, 27)), (TURNED, (47, 28, 40))])
def test_a_translation_is_found_whatever_the_orientation_of_the_moving_image(geometry, shape):
    """Fails where vectors stay along the voxels' axes, components are swapped, or one spacing serves for both."""
    shift = np.array([4.0, -3.0, 2.5])
    found = register(
        scanned(geometry, shape), scanned(FIXED, (24, 22, 26), shift), mind_features(CPU), 1.0, config=QUICK
    )
    middle = found.field[6:-6, 6:-6, 6:-6]
    if geometry is FIXED:  # what the moving image does not show cannot be found
        middle = middle[:, 2:]
    assert np.linalg.norm(middle - shift, axis=-1).mean() < 0.1 * np.linalg.norm(shift)
    assert found.deformation.folding < 0.05


def test_simpleitk_warps_as_we_do(tmp_path):
    """The written field in ITK's own transform gives the same image, oblique and anisotropic."""
    rng = np.random.default_rng(0)
    moving = scanned(TURNED, (20, 22, 18))
    shape = (9, 14, 12)
    jitter = to_scanner_vectors(rng.normal(0, 1.5, (3, *shape)), OBLIQUE)
    vectors = jitter + np.float32([40.0, -30.0, 5.0])
    write_field(vectors, OBLIQUE, tmp_path / "field.nii.gz")
    field = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    image = sitk.GetImageFromArray(moving.voxels[0])
    image.SetSpacing(TURNED.spacing[::-1])
    image.SetOrigin(TURNED.origin)
    image.SetDirection(TURNED.direction)
    reference = sitk.Image(*shape[::-1], sitk.sitkFloat32)
    reference.SetSpacing(OBLIQUE.spacing[::-1])
    reference.SetOrigin(OBLIQUE.origin)
    reference.SetDirection(OBLIQUE.direction)
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(image, reference, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, -1e4)
    )
    ours, seen = sample_moving(moving.voxels, TURNED, vectors, OBLIQUE)
    both = seen & (theirs > -1e4)
    assert (seen == (theirs > -1e4)).mean() > 0.99
    assert 0.1 < both.mean() < 1
    assert np.allclose(ours[0][both], theirs[both], atol=0.5)
    assert np.abs(ours[0][both]).max() > 50


def test_equal_images_are_registered_by_nothing():
    image = scanned(FIXED, (20, 22, 24))
    found = register(image, image, mind_features(CPU), 1.0, config=QUICK)
    assert np.abs(found.field).max() < 0.05
    assert found.deformation.folding == 0
    assert found.deformation.sd_log_jacobian < 0.01


@pytest.mark.parametrize("start", ["centre", "mass"])
def test_a_start_brings_images_together_that_the_scanner_keeps_apart(start):
    shape = (12, 14, 16)
    voxels = np.zeros((1, *shape), np.float32)
    voxels[:, 4:8, 4:8, 4:8] = 1
    far = Geometry(spacing=(1.0, 1.0, 1.0), origin=(500.0, 0.0, 0.0), direction=FIXED.direction)
    fixed, moving = Image("fixed", voxels, FIXED), Image("moving", voxels, far)
    found = register(moving, fixed, None, 1.0, start)
    assert np.allclose(found.field, [495.0, 3.0, -11.0])
    with pytest.raises(ValueError, match=r"moving covers 0% of fixed .*Use --start centre or mass"):
        register(moving, fixed, mind_features(CPU), 1.0)
    with pytest.raises(ValueError, match="start 'middle' is not known: use one of scanner, centre, mass"):
        register(moving, fixed, None, 1.0, "middle")


@pytest.mark.parametrize("patch", [(16, 24, 16), (24, 16)], ids=["3d", "2d"])
def test_features_of_a_network_find_a_translation(tiny_plan, patch):
    """Random weights will do for an image and itself, moved: fails where maps are interpolated to other places."""
    plan = tiny_plan(patch)
    frozen = random_frozen(plan, plan.configuration(plan.configuration_names[0]), 0)
    shift = np.array([3.0, -2.0, 0.0 if len(patch) == 2 else 2.0])
    fixed, moving = scanned(FIXED, (22, 26, 24), shift), scanned(FIXED, (22, 26, 24))
    found = register(moving, fixed, network_features(frozen, 0), 1.0, config=QUICK)
    apart = np.linalg.norm(found.field[6:-6, 6:-6, 6:-6] - shift, axis=-1).mean()
    assert apart < 0.5 * np.linalg.norm(shift)


def test_pictures_are_registered_in_their_plane():
    flat = Geometry(spacing=(999.0, 1.0, 1.0), origin=(0.0, 0.0), direction=(1.0, 0, 0, 1.0))
    shift = np.array([3.0, -2.0, 0.0])
    found = register(scanned(flat, (1, 40, 36)), scanned(flat, (1, 40, 36), shift), mind_features(CPU), 1.0)
    assert np.linalg.norm(found.field[:, 8:-8, 8:-8] - shift, axis=-1).mean() < 0.4
    assert not found.field[..., 2].any()


def test_folds_are_counted():
    """One voxel in 8 x 6 x 10 is carried past its neighbour along x: by hand, three determinants change."""
    geometry = OBLIQUE
    field = np.zeros((3, 8, 6, 10))
    field[2, 3, 2, 4] = 3.0
    determinants = jacobian_determinants(to_scanner_vectors(field, geometry), geometry)
    expected = np.ones((8, 6, 10))
    expected[3, 2, 3], expected[3, 2, 5] = 2.5, -0.5
    assert np.allclose(determinants, expected, atol=1e-4)
    found = deformation(to_scanner_vectors(field, geometry), geometry)
    assert found.folding == pytest.approx(1 / 480)
    assert found.sd_log_jacobian == pytest.approx(np.log([2.5] + [1] * 478).std(), rel=1e-3)


def test_volumes_do_not_depend_on_the_slices_worked_on_together(monkeypatch):
    """Fails where a slab's first or last slice takes a one-sided difference, or a slice is lost."""
    vectors = np.random.default_rng(0).normal(size=(9, 4, 5, 3)).astype(np.float32)
    whole = jacobian_determinants(vectors, OBLIQUE)
    for rows in (1, 4):
        monkeypatch.setattr("nnssl_ext.downstream.grids.ROWS_AT_ONCE", rows)
        assert np.allclose(jacobian_determinants(vectors, OBLIQUE), whole, atol=1e-6)


def test_a_scaling_changes_all_volumes_alike():
    field = np.indices((6, 7, 8)) * np.array([0.1, -0.2, 0.5]).reshape(3, 1, 1, 1)
    vectors = to_scanner_vectors(field, OBLIQUE)
    assert np.allclose(jacobian_determinants(vectors, OBLIQUE), 1.1 * 0.8 * 1.5, atol=1e-4)
    assert deformation(vectors, OBLIQUE).sd_log_jacobian < 1e-4
    assert np.allclose(places_moved(vectors, OBLIQUE)[2, 0, 0], 1.5 * np.arange(8), atol=1e-4)


def test_cubes_fill_an_anisotropic_image():
    grid = cubes((10, 30, 1), Geometry(spacing=(3.0, 0.8, 1.0)), 1.0)
    assert grid.size == (30, 24, 1)
    assert np.allclose(grid.step, (1 / 3, 1.25, 1.0))
    assert np.allclose(grid.first, (-1 / 3, 0.125, 0.0))


def test_labels_move_with_their_image():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3], labels[4, 4, 4] = 1, 5
    field = np.zeros((6, 6, 6, 3), np.float32) + np.float32([-2.0, 0.0, 0.0])
    moved = moved_labels(labels, FIXED, field, FIXED)
    assert np.array_equal(moved[:, :, 2:], labels[:, :, :4])
    assert not moved[:, :, :2].any()
    fixed = np.zeros_like(labels)
    fixed[1:3, 1:3, 2:5] = 1
    assert overlaps(moved, fixed) == {1: pytest.approx(2 * 8 / 20)}
    assert overlaps(labels, fixed)[5] == 0
