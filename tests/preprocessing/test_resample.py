"""Resampling against skimage, scipy and nnU-Net's own function."""

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from scipy import ndimage
from skimage.transform import resize as skimage_resize

from nnssl_ext.preprocessing.resample import (
    check_resampling,
    interpolation_matrix,
    new_shape,
    resample,
    resize,
    resize_nearest,
    separate_axis,
)
from nnssl_ext.preprocessing.resample_torch import check_device, resize_on_device

SHAPE = (21, 30, 17)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEFAULTS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@pytest.fixture
def volume() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=SHAPE)
    smooth = ndimage.gaussian_filter(noise, 1)
    return (smooth / smooth.std()).astype(np.float32)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("shape", [(11, 41, 17), (42, 31, 8), (1, 2, 3), (20, 60, 34)])
def test_resize_gives_the_numbers_of_skimage(volume: np.ndarray, order: int, shape: tuple[int, ...]) -> None:
    reference = skimage_resize(volume.astype(float), shape, order, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(resize(volume, shape, order), reference, atol=1e-5)


def test_cubic_resize_stays_within_the_values_of_the_volume() -> None:
    step = np.zeros((12, 12, 12), np.float32)
    step[6:] = 1
    resized = resize(step, (25, 12, 12), order=3)
    assert resized.min() == 0
    assert resized.max() == 1


@pytest.mark.parametrize(
    ("spacing", "target", "options"),
    [
        ((1.0, 1.0, 1.0), (0.8, 1.3, 1.1), {}),
        ((5.0, 1.0, 1.0), (3.0, 0.8, 1.2), {}),
        ((1.0, 1.0, 5.0), (1.2, 0.7, 5.0), {}),
        ((1.0, 4.0, 1.0), (1.2, 1.5, 1.0), {"order_z": 1}),
        ((1.0, 4.0, 1.0), (1.2, 1.5, 1.0), {"order_z": 3}),
        ((1.0, 1.0, 1.0), (5.0, 1.0, 2.0), {}),
        ((5.0, 5.0, 1.0), (3.0, 3.0, 2.0), {}),
        ((2.0, 1.0, 1.0), (1.0, 1.0, 1.2), {"force_separate_z": True}),
        ((5.0, 1.0, 1.0), (5.0, 2.0, 2.0), {"force_separate_z": False}),
        ((2.5, 1.0, 1.0), (1.0, 1.0, 1.3), {"separate_z_anisotropy_threshold": 2}),
    ],
)
def test_resample_equals_nnunet(
    volume: np.ndarray, spacing: tuple[float, ...], target: tuple[float, ...], options: dict[str, object]
) -> None:
    data = np.stack([volume, volume[::-1]])
    shape = new_shape(SHAPE, spacing, target)
    np.testing.assert_array_equal(shape, compute_new_shape(SHAPE, spacing, target))
    settings = DEFAULTS | options
    reference = resample_data_or_seg_to_shape(data, shape, spacing, target, **settings)
    ours = resample(data, shape, spacing, target, **settings)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference, atol=1e-5)


def test_the_separate_axis_is_nnunets() -> None:
    rng = np.random.default_rng(1)
    edges = np.array([0.5, 1.0, 2.0, 4.0])
    found = set()
    for _ in range(300):
        before, after = rng.choice(edges, 3), rng.choice(edges, 3)
        for force in (None, True, False):
            _, expected = determine_do_sep_z_and_axis(force, before, after)
            axis = separate_axis(tuple(before), tuple(after), force=force)
            assert axis == expected
            found.add(axis)
    assert found == {None, 0, 1, 2}


@pytest.mark.parametrize(("size", "new_size"), [(20, 33), (33, 20), (7, 100), (100, 7), (9, 9)])
def test_rows_of_an_interpolation_matrix_sum_to_one_and_are_narrow(size: int, new_size: int) -> None:
    matrix = interpolation_matrix(size, new_size, 3)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    nonzero = np.abs(matrix[matrix != 0])
    assert nonzero.min() >= 1e-9
    np.testing.assert_array_equal(matrix != 0, (matrix != 0)[::-1, ::-1])


def test_cubic_interpolation_is_exact_for_a_cubic_away_from_the_border() -> None:
    positions = np.arange(60.0)
    centres = 60 / 90 * (np.arange(90) + 0.5) - 0.5
    cubic = np.polynomial.Polynomial([1.0, -0.3, 0.02, -0.0002])
    resized = interpolation_matrix(60, 90, 3).astype(np.float64) @ cubic(positions)
    np.testing.assert_allclose(resized[30:60], cubic(centres)[30:60], atol=1e-4)


def test_nearest_keeps_type_and_values() -> None:
    mask = np.zeros((2, 4, 4), bool)
    mask[1, 1, 3] = True
    resized = resize_nearest(mask, (4, 4, 2))
    assert resized.dtype == bool
    np.testing.assert_array_equal(np.argwhere(resized), [[2, 1, 1], [3, 1, 1]])


def test_an_axis_may_not_vanish() -> None:
    with pytest.raises(ValueError, match="leaves no voxel"):
        new_shape((2, 30, 30), (1.0, 1.0, 1.0), (8.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("resample_torch_fornnunet", {}, "resample_torch_fornnunet.*not supported.*resample_data_or_seg_to_shape"),
        ("resample_data_or_seg_to_shape", {"order": 2}, "order 2; allowed"),
        ("resample_data_or_seg_to_shape", {"is_seg": True}, "is_seg"),
        ("resample_data_or_seg_to_shape", {"memefficient": True}, "memefficient"),
    ],
)
def test_what_cannot_be_resampled_is_refused(function: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_resampling(function, settings)


def test_no_resampling_returns_the_data(volume: np.ndarray) -> None:
    data = volume[None]
    assert resample(data, SHAPE, (1, 1, 1), (2, 2, 2), "no_resampling_hack") is data


@pytest.mark.parametrize(
    ("order", "axis", "order_z"), [(0, None, 0), (1, None, 0), (3, None, 0), (3, 0, 0), (3, 1, 1), (1, 2, 3)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_a_torch_device_gives_the_same_numbers(
    volume: np.ndarray, order: int, axis: int | None, order_z: int, device: str
) -> None:
    for shape in ((11, 41, 17), (42, 31, 8)):
        ours = resize_on_device(volume, shape, order, axis, order_z, device)
        np.testing.assert_allclose(ours, resize(volume, shape, order, axis, order_z), atol=1e-4)


def test_resampling_goes_to_the_device_that_is_asked_for(volume: np.ndarray) -> None:
    data, shape = np.stack([volume, -volume]), (20, 33, 19)
    expected = resample(data, shape, (1, 1, 1), (1, 1, 1))
    found = resample(data, shape, (1, 1, 1), (1, 1, 1), device="cpu:0")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_device_that_is_not_there_is_refused() -> None:
    check_device("cpu")
    with pytest.raises(ValueError, match=r"device 'warp' cannot be used here .* -device cpu"):
        check_device("warp")
