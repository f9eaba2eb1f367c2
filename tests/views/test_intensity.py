from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.views.intensity import IntensityConfig, intensity_view

BATCH = 4
RANDOM = SampleRandom(9, 4, tuple(range(BATCH)))
SHAPES = [(12, 15, 10), (20, 17)]
LONG = [(70, 6, 5), (5, 70, 6), (5, 6, 70), (70, 6)]
"""Each axis longer than the blocks that filters work in: a block that ends at its neighbour's edge is found here."""
OFF = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)
CHANGES = ["noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "inverted_gamma"]


def crops(shape: tuple[int, ...], batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, *shape, generator=generator), torch.ones(batch, 1, *shape, dtype=torch.bool)


def always(name: str, **ranges: tuple[float, float]) -> IntensityConfig:
    return replace(OFF, **{name: 1.0}, **ranges)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_its_standard_deviation_and_differs_everywhere(shape) -> None:
    data, valid = crops(shape)
    noise = intensity_view(data, valid, RANDOM, always("noise", noise_std=(0.07, 0.07))) - data
    spread = noise.flatten(2).std(2)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.07), atol=0.01, rtol=0)
    assert noise.flatten(2).mean(2).abs().max() < 0.02
    rows = noise.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.3


@pytest.mark.parametrize("shape", SHAPES + LONG)
def test_blur_equals_scipy_normalised_at_the_border(shape) -> None:
    data, valid = crops(shape)
    blurred = intensity_view(data, valid, RANDOM, always("blur", blur_sigma=(0.8, 0.8)))
    mass = gaussian_filter(np.ones(shape), 0.8, mode="constant", truncate=8)
    for row in range(BATCH):
        for channel in range(2):
            expected = gaussian_filter(data[row, channel].double().numpy(), 0.8, mode="constant", truncate=8) / mass
            np.testing.assert_allclose(blurred[row, channel].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_brightness_multiplies(shape) -> None:
    data, valid = crops(shape)
    ratio = (intensity_view(data, valid, RANDOM, always("brightness")) / data).flatten(2)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert ((ratio >= 0.75) & (ratio <= 1.25)).all()
    assert len(ratio[..., 0].unique()) == 2 * BATCH  # a factor for each sample and channel


@pytest.mark.parametrize("shape", SHAPES)
def test_contrast_stretches_about_the_mean_within_the_range(shape) -> None:
    data, valid = crops(shape)
    stretched = intensity_view(data, valid, RANDOM, always("contrast", contrast_range=(1.25, 1.25)))
    for image, result in zip(data.flatten(0, 1).numpy(), stretched.flatten(0, 1).numpy(), strict=True):
        expected = np.clip((image - image.mean()) * 1.25 + image.mean(), image.min(), image.max())
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_a_power_of_the_range_that_keeps_mean_and_spread(inverted: bool) -> None:
    data, valid = crops(SHAPES[0])
    result = intensity_view(
        data, valid, RANDOM, always("inverted_gamma" if inverted else "gamma", gamma_range=(1.5, 1.5))
    )
    for image, got in zip(data.flatten(0, 1).double().numpy(), result.flatten(0, 1).numpy(), strict=True):
        sign = -1 if inverted else 1
        x = sign * image
        bent = ((x - x.min()) / (x.max() - x.min())) ** 1.5
        expected = sign * ((bent - bent.mean()) / bent.std() * x.std() + x.mean())
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert got.mean() == pytest.approx(image.mean(), abs=1e-4)
        assert got.std() == pytest.approx(image.std(), abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES + LONG)
@pytest.mark.parametrize("zoom", [0.5, 0.73, 1.0])
def test_low_resolution_equals_interpolation_down_and_up(shape, zoom: float) -> None:
    data, valid = crops(shape)
    result = intensity_view(data, valid, RANDOM, always("low_resolution", low_resolution_range=(zoom, zoom)))
    coarse = F.interpolate(data, size=[round(edge * zoom) for edge in shape], mode="nearest-exact")
    linear = {2: "bilinear", 3: "trilinear"}[len(shape)]
    torch.testing.assert_close(result, F.interpolate(coarse, size=shape, mode=linear), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_reaches_nothing(name: str, shape) -> None:
    """Whatever stands in the padding, real voxels come out the same, and padding comes out 0."""
    data, valid = crops(shape)
    valid[0, :, :5], valid[1, ..., -4:] = False, False
    expected = intensity_view(data, valid, RANDOM, always(name))
    poisoned = intensity_view(data.masked_fill(~valid, 1e6), valid, RANDOM, always(name))
    assert torch.equal(poisoned, expected)
    assert (expected.masked_fill(valid, 0) == 0).all()
    assert expected.isfinite().all()


@pytest.mark.parametrize("name", ["blur", "contrast", "gamma"])
def test_a_padded_crop_is_treated_as_its_real_part_alone(name: str) -> None:
    data, valid = crops((12, 15, 10))
    valid[:, :, :, 11:] = False
    padded = intensity_view(data, valid, RANDOM, always(name))[..., :11, :]
    alone = intensity_view(data[..., :11, :], valid[..., :11, :], RANDOM, always(name))
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_how_the_input_lies_in_memory_makes_no_difference() -> None:
    data, valid = crops(SHAPES[0])
    config = IntensityConfig(**dict.fromkeys(CHANGES, 1.0))
    channels_last = data.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(
        intensity_view(channels_last, valid, RANDOM, config), intensity_view(data, valid, RANDOM, config)
    )


@pytest.mark.parametrize("name", ["noise", "blur", "low_resolution", "gamma"])
def test_in_place_gives_the_same_in_the_same_memory(name: str) -> None:
    data, valid = crops(SHAPES[0])
    valid[0, :, :5] = False
    expected = intensity_view(data, valid, RANDOM, always(name))
    result = intensity_view(data, valid, RANDOM, always(name), inplace=True)
    assert result is data
    assert torch.equal(result, expected)
    last = expected.contiguous(memory_format=torch.channels_last_3d)
    assert intensity_view(last, valid, RANDOM, always(name), inplace=True) is not last


def test_only_drawn_samples_change_and_the_input_never_does() -> None:
    data, valid = crops((6, 6), 300)
    random = SampleRandom(0, 0, tuple(range(300)))
    before = data.clone()
    changed = (intensity_view(data, valid, random, replace(OFF, brightness=0.3)) != data).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.3, abs=0.07)
    assert torch.equal(data, before)
    assert torch.equal(intensity_view(data, valid, random, OFF), data)


def test_a_sample_changes_the_same_way_whatever_batch_it_is_in() -> None:
    data, valid = crops(SHAPES[0])
    config = IntensityConfig(**dict.fromkeys(CHANGES, 0.7))
    together = intensity_view(data, valid, RANDOM, config)
    for row in range(BATCH):
        part = slice(row, row + 1)
        alone = intensity_view(data[part], valid[part], replace(RANDOM, samples=(row,)), config)
        torch.testing.assert_close(alone, together[part], atol=1e-5, rtol=0)


def test_constant_and_empty_crops_stay_finite() -> None:
    data, valid = torch.ones(BATCH, 1, 8, 8, 8), torch.ones(BATCH, 1, 8, 8, 8, dtype=torch.bool)
    valid[0] = False
    result = intensity_view(data, valid, RANDOM, IntensityConfig(**dict.fromkeys(CHANGES, 1.0)))
    assert result.isfinite().all()
    assert (result[0] == 0).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"blur": -0.1}, r"blur=-0.1 must lie in \[0, 1\]: it is a probability"),
        ({"blur_sigma": (0.0, 1.0)}, r"blur_sigma=\(0.0, 1.0\) must be two numbers in \(0, inf\)"),
        ({"gamma_range": (1.5, 0.7)}, r"gamma_range=\(1.5, 0.7\) must be two numbers in \(0, inf\)"),
        ({"noise_std": (-0.1, 0.1)}, r"noise_std=\(-0.1, 0.1\) must be two numbers in \[0, inf\)"),
        ({"low_resolution_range": (0.5, 2.0)}, r"low_resolution_range=\(0.5, 2.0\) must be two numbers in \(0, 1\]"),
    ],
)
def test_refusals(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntensityConfig(**setting)
