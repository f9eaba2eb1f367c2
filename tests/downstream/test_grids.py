"""Positions on an image, and values between them."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnssl_ext.downstream.grids import (
    Grid,
    by_rows,
    coarser,
    image_grid,
    index_to_scanner,
    interpolate,
    nearest,
    prepared_grid,
)
from nnssl_ext.imageio import Geometry

OBLIQUE = Geometry(
    spacing=(3.0, 0.8, 1.2),
    origin=(-20.0, 31.0, 7.0),
    direction=(0.8, 0.0, 0.6, 0.36, 0.8, -0.48, -0.48, 0.6, 0.64),
)

FLAT = Geometry(spacing=(1998.0, 2.0, 0.5), origin=(3.0, -4.0), direction=(0.6, -0.8, 0.8, 0.6))


def test_the_matrix_is_that_of_simpleitk():
    import SimpleITK as sitk

    image = sitk.Image(5, 6, 7, sitk.sitkUInt8)
    image.SetSpacing(OBLIQUE.spacing[::-1])
    image.SetOrigin(OBLIQUE.origin)
    image.SetDirection(OBLIQUE.direction)
    place = index_to_scanner(OBLIQUE) @ [6.0, 2.0, 4.0, 1.0]
    assert np.allclose(place[:3], image.TransformIndexToPhysicalPoint((4, 2, 6)))
    assert np.array_equal(index_to_scanner(Geometry(spacing=(3.0, 2.0, 1.0)))[:3, 3], [0, 0, 0])


def test_a_cell_lies_in_the_middle_of_its_voxels():
    """Cropped from voxel 3, resampled by 2, transposed, cells of 4: by hand."""
    properties = {
        "bbox_used_for_cropping": [[3, 13], [0, 8], [2, 8]],
        "shape_after_cropping_and_before_resampling": [10, 8, 6],
    }
    grid = prepared_grid(properties, (20, 8, 3), (2, 0, 1))
    assert grid == Grid((3, 20, 8), (2.5, 2.75, 0.0), (2.0, 0.5, 1.0))
    cells = coarser(grid, (1, 4, 4))
    assert cells == Grid((3, 5, 2), (2.5, 3.5, 1.5), (2.0, 2.0, 4.0))
    middle = index_to_scanner(cells.geometry(OBLIQUE)) @ [1, 2, 1, 1]
    assert np.allclose(middle, index_to_scanner(OBLIQUE) @ [4.5, 7.5, 5.5, 1])


@pytest.mark.parametrize("image", [OBLIQUE, Geometry(spacing=(999.0, 1.0, 2.0)), FLAT], ids=["3d", "bare", "2d"])
def test_a_volume_of_cells_lies_where_the_cells_do(image):
    """Also on a picture whose format has no placement: fails where its crop and half a cell are then forgotten."""
    cells = Grid((1, 4, 3), (0.0, 1.5, 7.5), (1.0, 4.0, 4.0))
    found = index_to_scanner(cells.geometry(image)) @ [0, 2, 1, 1]
    assert np.allclose(found, index_to_scanner(image) @ [0, 9.5, 11.5, 1])


@pytest.mark.parametrize("shape", [(12, 8, 9), (1, 8, 9)])
def test_interpolation_is_that_of_torch_where_cells_fill_the_image(shape):
    size = tuple(max(n // 2, 1) for n in shape)
    values = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    steps = tuple(n / m for n, m in zip(shape, size, strict=True))
    source = Grid(size, tuple(step / 2 - 0.5 for step in steps), steps)
    expected = functional.interpolate(values[None], size=shape, mode="trilinear")[0]
    assert torch.allclose(interpolate(values, source, image_grid(shape)), expected, atol=1e-5)
    parts = [interpolate(values, source, grid) for _, grid in by_rows(image_grid(shape))]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)


def test_nothing_lies_beyond_the_outer_cells():
    mask = torch.ones(2, 1, 1, dtype=torch.bool)
    found = nearest(mask, Grid((2, 1, 1), (3.0, 0.0, 0.0), (2.0, 1.0, 1.0)), image_grid((9, 1, 2)))
    assert found[:, 0, 0].tolist() == [False, False, True, True, True, True, False, False, False]
    assert not found[:, 0, 1].any()


def test_rows_cover_a_large_grid_once():
    whole = image_grid((37, 2, 2))
    assert [rows.start for rows, _ in by_rows(whole)] == [0, 16, 32]
    assert sum(grid.size[0] for _, grid in by_rows(whole)) == 37
