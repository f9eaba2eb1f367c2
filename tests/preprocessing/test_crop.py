"""Cropping against nnU-Net's."""

import numpy as np
import pytest
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask

from nnssl_ext.preprocessing.crop import crop_to_box, nonzero_mask


@pytest.mark.parametrize("seed", range(4))
def test_nonzero_mask_equals_nnunet(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = (rng.random((2, 9, 11, 8)) > 0.72).astype(np.float32)
    data[0, 2:7, 2:9, 2:7] = 1
    data[:, 3:6, 4:7, 3:5] = 0
    mask = nonzero_mask(data)
    np.testing.assert_array_equal(mask, create_nonzero_mask(data))
    assert mask[4, 5, 4]
    assert not mask.all()


def test_a_crop_is_a_copy() -> None:
    data = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)
    crop = crop_to_box(data, ((1, 3), (0, 5), (2, 4)))
    np.testing.assert_array_equal(crop, data[:, 1:3, :, 2:4])
    crop[:] = -1
    assert data.min() == 0
    assert crop.flags.c_contiguous
