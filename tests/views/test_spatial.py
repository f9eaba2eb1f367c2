import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, map_coordinates

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.spatial import SpatialConfig, _spline_weights, draw_transform, spatial_view
from nnssl_ext.views.transform import SpatialTransform, apply_transform, place_view, valid_box

BATCH = 5
RANDOM = SampleRandom(1, 2, tuple(range(BATCH)))
ROUNDING = 1e-3  # in voxels: as near to its border a point may be called inside or outside
CROPS = [(17, 22, 13), (18, 25)]
UNMOVED = SpatialConfig(flip=0, rotation=0, scaling=0, elastic=0)
WILD = SpatialConfig(rotation=1, scaling=1, elastic=1)


def crops(shape: tuple[int, ...], channels: int = 2, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, *shape, generator=generator), torch.ones(batch, 1, *shape, dtype=torch.bool)


def spacing(dims: int, anisotropy: float = 1.0, batch: int = BATCH) -> torch.Tensor:
    return torch.tensor([anisotropy, *[1.0] * (dims - 1)]).expand(batch, -1)


def by_scipy(volume: np.ndarray, transform: SpatialTransform, row: int) -> tuple[np.ndarray, np.ndarray]:
    """One channel, linearly interpolated where the transform's definition says, in float64.

    Also how far each point lies inside the volume (negative: outside), in voxels.
    """
    matrix, centre = transform.matrix[row].double().numpy(), transform.centre[row].double().numpy()
    middle = (np.array(transform.size) - 1) / 2
    voxels = np.indices(transform.size).reshape(len(middle), -1) - middle[:, None]
    if transform.displacement is not None:
        voxels = voxels + transform.displacement[row].double().numpy().reshape(len(middle), -1)
    points = matrix @ voxels + centre[:, None]
    last = np.array(volume.shape)[:, None] - 1
    depth = np.minimum(points, last - points).min(axis=0)
    values = map_coordinates(volume, points, order=1, mode="nearest")
    return values.reshape(transform.size), depth.reshape(transform.size)


@pytest.mark.parametrize("shape", CROPS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("smaller", [0, 5])
def test_view_equals_scipy(shape, inside: bool, smaller: int) -> None:
    data, valid = crops(shape)
    size = tuple(edge - smaller for edge in shape)
    view = spatial_view(data, valid, spacing(len(shape), 2.0), RANDOM, replace(WILD, inside=inside), size)
    assert view.data.shape == (BATCH, 2, *size)
    for row, channel in itertools.product(range(BATCH), range(2)):
        expected, depth = by_scipy(data[row, channel].double().numpy(), view.transform, row)
        got, real = view.data[row, channel].numpy(), view.valid[row, 0].numpy()
        assert (real == (depth >= 0))[np.abs(depth) > ROUNDING].all()
        np.testing.assert_allclose(got[depth > 0], expected[depth > 0], atol=2e-4)
        np.testing.assert_allclose(got[real], expected[real], atol=ROUNDING * 5)
        assert (got[~real] == 0).all()
    assert view.valid.float().mean() > 0.4


@pytest.mark.parametrize("shape", CROPS)
def test_affine_part_equals_scipys_affine_transform(shape) -> None:
    data, valid = crops(shape, 1)
    view = spatial_view(data, valid, spacing(len(shape)), RANDOM, replace(WILD, elastic=0.0))
    for row in range(BATCH):
        matrix, centre = view.transform.matrix[row].double().numpy(), view.transform.centre[row].double().numpy()
        offset = centre - matrix @ ((np.array(shape) - 1) / 2)
        expected = affine_transform(data[row, 0].double().numpy(), matrix, offset, order=1, mode="nearest")
        real = view.valid[row, 0].numpy()
        np.testing.assert_allclose(view.data[row, 0].numpy()[real], expected[real], atol=5 * ROUNDING)


@pytest.mark.parametrize("shape", CROPS)
def test_nothing_drawn_leaves_the_crop_as_it_is(shape) -> None:
    data, valid = crops(shape)
    valid[2, :, :4] = False
    view = spatial_view(data, valid, spacing(len(shape)), RANDOM, UNMOVED)
    torch.testing.assert_close(view.data, data * valid, atol=1e-4, rtol=0)
    assert torch.equal(view.valid, valid)


@pytest.mark.parametrize("shape", CROPS)
def test_flips_reach_every_axis_and_no_other(shape) -> None:
    """Every combination of axes turns up, and a view is the flipped crop and nothing else: channels stay in place."""
    batch, dims = 80, len(shape)
    data, valid = crops(shape, batch=batch)
    random = SampleRandom(0, 0, tuple(range(batch)))
    view = spatial_view(data, valid, spacing(dims, batch=batch), random, replace(UNMOVED, flip=0.5))
    seen = set()
    for row in range(batch):
        signs = torch.diagonal(view.transform.matrix[row])
        flipped = tuple(axis for axis in range(dims) if signs[axis] < 0)
        expected = data[row].flip([1 + axis for axis in flipped])
        torch.testing.assert_close(view.data[row], expected, atol=1e-4, rtol=0)
        seen.add(flipped)
    assert len(seen) == 2**dims
    assert view.valid.all()


@pytest.mark.parametrize("anisotropy", [1.0, 2.5])
@pytest.mark.parametrize("dims", [2, 3])
def test_matrix_is_a_rotation_with_scaling_in_millimetres(dims: int, anisotropy: float) -> None:
    mm = spacing(dims, anisotropy)
    valid = torch.ones(BATCH, 1, *[20] * dims, dtype=torch.bool)
    config = SpatialConfig(rotation=1, scaling=1, scale_range=(0.7, 1.4), rotation_degrees=30)
    matrix = draw_transform(valid, mm, RANDOM, config, [20] * dims).matrix.double()
    edges = mm[0].double()
    physical = edges[:, None] * matrix / edges[None]
    gram = physical.transpose(1, 2) @ physical
    zoom = gram[:, 0, 0]
    torch.testing.assert_close(gram, zoom[:, None, None] * torch.eye(dims, dtype=torch.double), atol=1e-5, rtol=1e-5)
    scale = zoom.rsqrt()
    assert ((scale >= 0.7) & (scale <= 1.4)).all()
    assert scale.std() > 0.05
    turned = physical / zoom.sqrt()[:, None, None]
    signs = torch.sign(torch.diagonal(turned, dim1=1, dim2=2))
    angle = torch.rad2deg(torch.acos(((turned / signs[:, None]).diagonal(dim1=1, dim2=2).sum(1) - dims + 2) / 2))
    assert (angle > 1).all()
    assert (angle < 30 * dims).all()


def test_a_ball_stays_a_ball_where_voxels_are_anisotropic() -> None:
    edges = np.array([2.5, 1.0, 0.8])
    shape = tuple(np.ceil(60 / edges).astype(int))
    offsets = (np.indices(shape) - ((np.array(shape) - 1) / 2)[:, None, None, None]) * edges[:, None, None, None]
    ball = torch.from_numpy(np.clip(20 - np.linalg.norm(offsets, axis=0), -1, 1)).float().expand(BATCH, 1, *shape)
    mm = torch.from_numpy(edges).float().expand(BATCH, -1)
    config = SpatialConfig(flip=0, rotation=1, scaling=0, rotation_degrees=45, max_anisotropy=4)
    view = spatial_view(ball, torch.ones(BATCH, 1, *shape, dtype=torch.bool), mm, RANDOM, config)
    assert (view.transform.matrix - torch.eye(3)).abs().amax((1, 2)).min() > 0.1
    error = ((view.data - ball) * view.valid).abs()
    assert error.max() < 1.0
    assert error.mean() < 0.02


def test_planes_that_are_too_anisotropic_are_not_rotated() -> None:
    mm = torch.tensor([[5.0, 1.0, 1.0]]).expand(BATCH, -1)
    valid = torch.ones(BATCH, 1, 8, 20, 20, dtype=torch.bool)
    matrix = draw_transform(valid, mm, RANDOM, replace(UNMOVED, rotation=1.0), (8, 20, 20)).matrix
    assert (matrix[:, 0, 1:] == 0).all()
    assert (matrix[:, 1:, 0] == 0).all()
    assert (matrix[:, 1, 2].abs() > 0.01).all()


@pytest.mark.parametrize("shape", CROPS)
def test_validity_follows_the_transform_and_no_padding_is_called_real(shape) -> None:
    """Padding is poisoned with huge values: a valid voxel of the view has none of them, and none is lost needlessly."""
    data, valid = crops(shape)
    data = data.clamp(-1, 1)
    valid[0, :, :5], valid[1, ..., -6:], valid[2, :, :, 9:] = False, False, False
    poisoned = data.masked_fill(~valid, 1e6)
    view = spatial_view(poisoned, valid, spacing(len(shape)), RANDOM, WILD)
    assert view.data.abs().max() < 1e6 * 2e-3
    for row in range(BATCH):
        weight, depth = by_scipy(valid[row, 0].double().numpy(), view.transform, row)
        real = view.valid[row, 0].numpy()
        assert real[(weight > 1 - 1e-6) & (depth > 0)].all()
        assert (weight[real] > 1 - 2 * ROUNDING).all()


@pytest.mark.parametrize("shape", CROPS)
def test_views_are_moved_into_the_real_voxels_where_they_fit(shape) -> None:
    data, valid = crops(shape)
    valid[0, :, :6], valid[1, ..., -5:] = False, False
    size = tuple(edge - 8 for edge in shape)
    config = replace(UNMOVED, flip=0.5)
    view = spatial_view(data, valid, spacing(len(shape)), RANDOM, config, size)
    assert view.valid.all()
    lower = view.transform.centre - (torch.tensor(size) - 1) / 2
    assert lower[0, 0] == 6  # just past the padding
    assert lower[1, -1] == shape[-1] - 5 - size[-1]
    assert torch.equal(lower[2], torch.full((len(shape),), 4.0))  # the middle where nothing is in the way


@pytest.mark.parametrize("shape", CROPS)
@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_inside_shrinks_views_until_they_are_real_everywhere(shape, elastic: float) -> None:
    data, valid = crops(shape)
    valid[0, :, :3], valid[1, ..., -2:] = False, False
    config = SpatialConfig(rotation=1, scaling=1, elastic=elastic, inside=True)
    assert spatial_view(data, valid, spacing(len(shape)), RANDOM, config).valid.all()
    assert not spatial_view(data, valid, spacing(len(shape)), RANDOM, replace(config, inside=False)).valid.all()


@pytest.mark.parametrize("shape", [(24, 24, 24), (30, 22)])
def test_strongest_deformation_does_not_fold(shape) -> None:
    dims, batch = len(shape), 12
    valid = torch.ones(batch, 1, *shape, dtype=torch.bool)
    config = replace(UNMOVED, elastic=1.0, elastic_magnitude=0.4)
    random = SampleRandom(0, 0, tuple(range(batch)))
    points = draw_transform(valid, spacing(dims, batch=batch), random, config, shape).coordinates()
    steps = torch.stack(torch.gradient(points, dim=tuple(range(2, 2 + dims))), dim=-1)
    determinant = torch.linalg.det(steps.movedim(1, -1))
    assert determinant.min() > 0
    assert determinant.std() > 0.1
    still = draw_transform(valid, spacing(dims, batch=batch), random, UNMOVED, shape).coordinates()
    moved = (points - still).abs().flatten(2).amax(2)
    cells = torch.tensor(shape) / config.elastic_cells
    assert (moved <= 0.4 * cells).all()
    assert (moved > 0.05 * cells).all()


def test_spline_weights_add_up_to_one_so_a_constant_control_grid_is_a_shift() -> None:
    torch.testing.assert_close(_spline_weights(19, 4).sum(1), torch.ones(19))


def test_a_sample_has_its_view_whatever_batch_it_is_in() -> None:
    data, valid = crops(CROPS[0])
    together = spatial_view(data, valid, spacing(3), RANDOM, replace(WILD, elastic=0.5))
    for row in range(BATCH):
        random = replace(RANDOM, samples=(row,))
        part = slice(row, row + 1)
        alone = spatial_view(data[part], valid[part], spacing(3)[part], random, replace(WILD, elastic=0.5))
        torch.testing.assert_close(alone.data, together.data[part], atol=1e-5, rtol=0)
        assert torch.equal(alone.valid, together.valid[part])


@pytest.mark.parametrize("shape", CROPS)
def test_threads_share_a_sample_and_change_nothing(shape) -> None:
    """Planted fault: slabs put together in another order. 12 slices are cut into 2, 4 or 6 slabs, 11 into none."""
    data, valid = crops(shape)
    valid[:2, ..., :3] = False
    threads, views = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4, 7):
            torch.set_num_threads(number)
            for edge in (12, 11):
                view = spatial_view(data, valid, spacing(len(shape)), RANDOM, WILD, (edge, *shape[1:]))
                views.append((view.data, view.valid))
    finally:
        torch.set_num_threads(threads)
    for data, valid in views[2:]:
        expected = views[0] if data.shape == views[0][0].shape else views[1]
        torch.testing.assert_close(data, expected[0], atol=1e-5, rtol=0)
        assert torch.equal(valid, expected[1])


def test_every_thread_has_its_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a sample left to one thread, which changes no number."""
    slabs, plain = [], torch.nn.functional.grid_sample

    def spy(data: torch.Tensor, grid: torch.Tensor, **options: object) -> torch.Tensor:
        slabs.append(len(grid))
        return plain(data, grid, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("nnssl_ext.views.transform.F.grid_sample", spy)
    data, valid = crops((12, 10, 9))
    spatial_view(data, valid, spacing(3), RANDOM, replace(UNMOVED, rotation=1), (12, 10, 9))
    assert slabs == [4] * BATCH


def test_probabilities_are_those_of_samples() -> None:
    batch = 400
    valid = torch.ones(batch, 1, 4, 4, dtype=torch.bool)
    random = SampleRandom(0, 0, tuple(range(batch)))
    config = replace(UNMOVED, rotation=0.2, scaling=0.3)
    matrix = draw_transform(valid, spacing(2, batch=batch), random, config, (4, 4)).matrix
    rotated = matrix[:, 0, 1] != 0
    scaled = (torch.linalg.det(matrix) - 1).abs() > 1e-5
    assert rotated.float().mean() == pytest.approx(0.2, abs=0.06)
    assert scaled.float().mean() == pytest.approx(0.3, abs=0.07)
    assert (rotated & scaled).float().mean() == pytest.approx(0.06, abs=0.04)


def test_coordinates_name_the_voxels_that_were_looked_at() -> None:
    """An image of its own coordinates, resampled, is the coordinates."""
    shape = (11, 14, 9)
    image = torch.stack(torch.meshgrid(*[torch.arange(float(edge)) for edge in shape], indexing="ij"))
    data = image.expand(BATCH, -1, *shape).contiguous()
    view = spatial_view(data, torch.ones(BATCH, 1, *shape, dtype=torch.bool), spacing(3), RANDOM, WILD)
    real = view.valid.expand_as(view.data)
    torch.testing.assert_close(view.data[real], view.transform.coordinates()[real], atol=15 * ROUNDING, rtol=0)


def test_valid_box_is_where_the_real_voxels_are() -> None:
    valid = torch.zeros(3, 1, 6, 7, 8, dtype=torch.bool)
    valid[0, :, 2:5, 1:7, :3] = True
    valid[1] = True
    lower, upper = valid_box(valid)
    assert lower.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert upper.tolist() == [[4, 6, 2], [5, 6, 7], [5, 6, 7]]


def test_a_single_slice_does_not_shrink_a_view_to_a_point() -> None:
    valid = torch.zeros(1, 1, 8, 16, 16, dtype=torch.bool)
    valid[:, :, 3] = True
    transform = place_view(valid, torch.eye(3).unsqueeze(0), None, (8, 16, 16), inside=True)
    assert torch.allclose(transform.matrix[0], torch.diag(torch.tensor([0.0, 1.0, 1.0])), atol=1e-5)
    assert transform.centre[0, 0] == pytest.approx(3, abs=1e-4)


def test_a_view_larger_than_its_crop_is_invalid_beyond_it() -> None:
    data, valid = crops((6, 9))
    view = spatial_view(data, valid, spacing(2), RANDOM, UNMOVED, (8, 9))
    torch.testing.assert_close(view.data[:, :, 1:7], data, atol=1e-4, rtol=0)
    assert view.valid[:, :, 1:7].all()
    assert not view.valid[:, :, 0].any()
    assert not view.valid[:, :, 7].any()


def test_views_of_size_one_on_an_axis() -> None:
    data, valid = crops((1, 12, 10))
    view = spatial_view(data, valid, spacing(3, 100.0), RANDOM, SpatialConfig(rotation=1, scaling=0))
    assert view.data.shape == data.shape
    assert 0.5 < view.valid.float().mean() <= 1
    still = apply_transform(data, valid, draw_transform(valid, spacing(3), RANDOM, UNMOVED, (1, 12, 10)))
    torch.testing.assert_close(still.data, data, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, r"flip=1.5 must lie in \[0, 1\]: it is a probability"),
        ({"scale_range": (1.4, 0.7)}, r"scale_range=\(1.4, 0.7\) must be two numbers in \(0, inf\)"),
        ({"elastic_magnitude": 0.6}, r"elastic_magnitude=0.6 must lie in \[0, 0.4\]"),
        ({"elastic_cells": 0}, "elastic_cells=0 must be 1 or more"),
        ({"max_anisotropy": 0.5}, "max_anisotropy=0.5 must be 1 or more"),
        ({"rotation_degrees": -3}, "rotation_degrees=-3 must lie in"),
    ],
)
def test_refusals(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpatialConfig(**setting)
