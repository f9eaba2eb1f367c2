import numpy as np
import pytest
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from skimage.filters import threshold_otsu

from nnssl_ext.fingerprint.foreground import SAMPLED_VOXELS, foreground_mask, nonzero_box, otsu_threshold
from nnssl_ext.imageio import read_image


def body(shape=(20, 30, 24), lower=(4, 6, 5), upper=(16, 24, 20), seed=0):
    """A bright box in a dark field, both noisy, and the box's mask."""
    inside = np.zeros(shape, dtype=bool)
    inside[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
    noise = np.random.default_rng(seed).normal(0, 5, shape)
    return (np.where(inside, 100, 0) + noise).astype(np.float32), inside


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_otsu_is_scikit_images(share):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(20_000) < share, rng.normal(80, 12, 20_000), rng.normal(10, 8, 20_000))
    bin_width = (values.max() - values.min()) / 256
    assert otsu_threshold(values) == pytest.approx(threshold_otsu(values, nbins=256), abs=bin_width)


def test_bright_body_is_found_exactly():
    image, inside = body()
    assert np.array_equal(foreground_mask(image), inside)


def test_small_parts_are_left_out_and_large_ones_kept():
    image, inside = body()
    image[0, 0, 0:5] = 100  # 5 voxels, far below 5% of the body's 3240
    assert np.array_equal(foreground_mask(image), inside)
    image[0:2, 0:5, 0:20] = 100  # 200 voxels, above
    assert foreground_mask(image)[0:2, 0:5, 0:20].all()


def test_parts_are_counted_in_blocks_that_share_faces():
    image = np.zeros((12, 40, 41), dtype=np.float32)
    image[2:10, 2:20, 2:20] = 100  # 2592 voxels
    image[2:10, 21:26, 2:4] = 100  # its block shares a face with the body's neighbour, though a row between is dark
    image[2:10, 30:35, 30:32] = 100  # as many voxels far away: 80 are below 5%
    expected = image > 0
    expected[:, 30:] = False
    image[11, 39, 40] = 100  # alone in the last, incomplete block
    assert np.array_equal(foreground_mask(image), expected)


def test_a_sample_decides_the_threshold_of_large_images():
    image, _ = body(shape=(64, 96, 96), lower=(10, 10, 10), upper=(50, 80, 80))
    image[10:50, 10:80, 10:80] -= np.linspace(0, 80, 40, dtype=np.float32)[:, None, None]
    bright = image > otsu_threshold(np.clip(image, *np.percentile(image, (0.1, 99.9))))
    found = foreground_mask(image)
    assert np.logical_xor(found, bright).mean() < 0.01
    assert image.size > 2 * SAMPLED_VOXELS


def test_extreme_voxels_do_not_move_the_threshold():
    image, inside = body()
    image[10, 10, 10] = 1e6
    assert np.array_equal(foreground_mask(image), inside)


def test_sparse_structure_in_zeros_is_found():
    image = np.zeros((20, 50, 50), dtype=np.float32)
    image[10, 20:23, 20:23] = 7  # 9 of 50,000 voxels: both percentiles are 0
    assert np.array_equal(foreground_mask(image), image > 0)


def test_voxels_that_are_no_numbers_are_background():
    image, inside = body()
    image[8, 8, 8], image[9, 9, 9] = np.nan, np.inf
    found = foreground_mask(image)
    assert not found[8, 8, 8]
    assert not found[9, 9, 9]
    assert found.sum() == inside.sum() - 2


@pytest.mark.parametrize("value", [0.0, 3.5, np.nan])
def test_constant_images_have_no_foreground(value):
    assert not foreground_mask(np.full((4, 5, 6), value, dtype=np.float32)).any()


def test_single_slice():
    image, inside = body(shape=(1, 40, 40), lower=(0, 10, 10), upper=(1, 30, 30))
    assert np.array_equal(foreground_mask(image), inside)


@pytest.mark.parametrize("seed", range(5))
def test_box_is_nnunets(seed):
    rng = np.random.default_rng(seed)
    data = np.zeros((2, 9, 11, 13), dtype=np.float32)
    for channel in data:
        for _ in range(3):
            channel[tuple(rng.integers(2, size - 1) for size in channel.shape)] = rng.choice([-1, 2])
    _, _, box = crop_to_nonzero(data)
    assert nonzero_box(data) == tuple(tuple(side) for side in box)


def test_box_of_nothing_is_everything():
    assert nonzero_box(np.zeros((1, 3, 4, 5))) == ((0, 3), (0, 4), (0, 5))


@pytest.mark.real_data
def test_ct_foreground_is_the_body(real_data):
    data, _ = read_image([real_data / "volumes" / "ct_small.nii.gz"])
    found = foreground_mask(data[0])
    assert 0.5 < found.mean() < 0.75
    assert found[data[0] > 0].mean() > 0.99  # soft tissue and bone
    assert not found[data[0] < -700].any()  # air
