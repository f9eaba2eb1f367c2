"""Likeness, smoothness and distance of deformations, against values computed by hand or slowly."""

import numpy as np
import pytest
import torch

from nnssl_ext.losses.registration import FLAT, endpoint_error, local_ncc, mean_ncc, squared_gradients


def images(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images that are somewhat alike, and which voxels are real."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2, 1, *shape, generator=generator)
    second = 0.5 * first + torch.randn(2, 1, *shape, generator=generator)
    return first, second, torch.rand(2, 1, *shape, generator=generator) > 0.2


def slow_ncc(first: np.ndarray, second: np.ndarray, real: np.ndarray, window: int) -> np.ndarray:
    """Voxel by voxel, of two images (Z, Y, X)."""
    result, reach = np.zeros(first.shape), window // 2
    for place in np.argwhere(real):
        box = tuple(slice(max(index - reach, 0), index + reach + 1) for index in place)
        a, b = (image[box][real[box]].astype(np.float64) for image in (first, second))
        covariance = ((a - a.mean()) * (b - b.mean())).mean()
        result[tuple(place)] = covariance / np.sqrt(a.var() * b.var() + FLAT)
    return result


@pytest.mark.parametrize("shape", [(6, 9, 5), (11, 8)])
def test_correlation_equals_a_slow_version(shape):
    """Catches windows that are too small or hold padding, and a border that counts zeros."""
    first, second, real = images(*shape)
    found = local_ncc(first.masked_fill(~real, 1e4), second.masked_fill(~real, -1e4), real, 5)
    for sample in range(2):
        expected = slow_ncc(first[sample, 0].numpy(), second[sample, 0].numpy(), real[sample, 0].numpy(), 5)
        np.testing.assert_allclose(found[sample, 0].numpy(), expected, atol=2e-4)


def test_correlation_does_not_see_brightness_and_contrast_but_inversion():
    """Catches a squared correlation, to which an inverted image is alike."""
    first, _, real = images(12, 12)
    assert mean_ncc(3 * first + 7, first, real, real, 5).item() == pytest.approx(1, abs=1e-3)
    assert mean_ncc(-first, first, real, real, 5).item() == pytest.approx(-1, abs=1e-3)
    assert mean_ncc(torch.ones_like(first), first, real, real, 5).item() == pytest.approx(0, abs=1e-3)


def test_correlation_is_float32_under_autocast():
    """Catches sums of squares in half precision, whose difference is noise where the mean is far from 0."""
    first, second, real = images(12, 12)
    expected = local_ncc(first + 5, second + 5, real, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = local_ncc(first + 5, second + 5, real, 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_only_what_is_asked_for_counts_and_a_sample_without_it_does_not():
    first, second, _ = images(12, 12)
    asked = torch.zeros_like(first, dtype=torch.bool)
    asked[0, :, :6] = True
    values = local_ncc(first, second, torch.ones_like(asked), 5)
    found = mean_ncc(first, second, torch.ones_like(asked), asked, 5)
    assert found.item() == pytest.approx(values[0, :, :6].mean().item(), abs=1e-6)


def test_nothing_is_gained_by_moving_tissue_out_of_sight():
    """Catches a mean over what is left: one corner that happens to fit would then be as good as all of it."""
    first, _, _ = images(12, 12)
    asked = torch.ones_like(first, dtype=torch.bool)
    real = torch.zeros_like(asked)
    real[:, :, :3] = True
    assert mean_ncc(first, first, real, asked, 5).item() == pytest.approx(0.5, abs=1e-3)
    assert mean_ncc(first, first, torch.zeros_like(asked), asked, 5).item() == 0
    real[:, :, :6] = True
    assert mean_ncc(first, first, real, asked, 5).item() == pytest.approx(1, abs=1e-3)


def test_gradients_are_finite_where_images_are_flat_and_fields_are_true():
    first = torch.zeros(1, 1, 8, 8, requires_grad=True)
    field = torch.zeros(1, 2, 8, 8, requires_grad=True)
    everywhere = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    flat = mean_ncc(first, torch.zeros(1, 1, 8, 8), everywhere, everywhere, 5)
    (flat + endpoint_error(field, torch.zeros_like(field), torch.ones(1, 2), everywhere)).backward()
    assert torch.isfinite(first.grad).all()
    assert torch.isfinite(field.grad).all()


def test_smoothness_is_measured_in_millimetres():
    """Along axes of 3 and .5 mm, 2 voxels more every voxel are 2 mm/mm; 1 voxel of the second axis every voxel of the
    first one is .5/3 mm/mm. Catches gradients in voxels, and the spacing of one axis taken for the other's."""
    rows = torch.arange(6.0).view(-1, 1).expand(6, 4)
    field = torch.stack([2 * rows, rows])[None]
    everywhere = torch.ones(1, 1, 6, 4, dtype=torch.bool)
    expected = (2**2 + (0.5 / 3) ** 2) / 2  # over both components; and then over both axes, of which the other has none
    spacing = torch.tensor([[3.0, 0.5]])
    assert squared_gradients(field, spacing, everywhere).item() == pytest.approx(expected / 2, rel=1e-5)
    columns = field.transpose(2, 3).contiguous()
    assert squared_gradients(columns, spacing, everywhere.transpose(2, 3)).item() == pytest.approx(
        ((2 * 3 / 0.5) ** 2 + 1) / 4, rel=1e-5
    )


def test_padding_need_not_be_smooth():
    field, real = torch.zeros(1, 2, 6, 4), torch.ones(1, 1, 6, 4, dtype=torch.bool)
    field[:, :, 3:] = 9
    assert squared_gradients(field, torch.ones(1, 2), real) > 1
    real[:, :, 3:] = False
    assert squared_gradients(field, torch.ones(1, 2), real) == 0


def test_the_distance_is_in_millimetres_and_of_known_places():
    field, truth = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    truth[0, 0], truth[0, 1] = 3, 8
    truth[:, :, 2:] = 100
    known = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    known[0, :, :2] = True
    spacing = torch.tensor([[1.0, 0.5], [7.0, 7.0]])
    assert endpoint_error(field, truth, spacing, known).item() == pytest.approx(5)
