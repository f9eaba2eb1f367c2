"""Known displacements are found again, and MIND is what its paper says."""

import numpy as np
import pytest
import torch

from nnssl_ext.downstream.convex import ConvexConfig, consistent, match, resized, search, warp
from nnssl_ext.downstream.mind import mind_ssc

SHAPE = (22, 24, 26)


def texture(places: torch.Tensor) -> torch.Tensor:
    """Four smooth random functions of places (3, ...), so that a warped one needs no interpolation: (4, ...)."""
    rng = np.random.default_rng(0)
    waves = torch.from_numpy(rng.normal(0, 0.28, (4, 12, 3))).float()
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, (4, 12))).float()
    angles = torch.einsum("cwd,d...->cw...", waves, places)
    return torch.cos(angles + phases.view(4, 12, *[1] * (places.ndim - 1))).mean(1) * 12**0.5 / 2**0.5


def voxels(shape=SHAPE) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))


def swirl(shape, size: float) -> torch.Tensor:
    """A smooth displacement that vanishes at the border, (3, ...), of about `size` voxels at most."""
    z, y, x = (torch.sin(np.pi * (part + 0.5) / n) for part, n in zip(voxels(shape), shape, strict=True))
    hump = z * y * x if shape[0] > 1 else y * x
    flat = 0.0 if shape[0] == 1 else 1.0
    return size * hump * torch.stack([0.6 * flat * torch.ones_like(hump), -0.5 * y, 0.7 * x])


def inverse(field: torch.Tensor) -> torch.Tensor:
    """The displacement that undoes another one, by fixed points."""
    back = torch.zeros_like(field)
    for _ in range(30):
        back = -warp(field, back)
    return back


def error(found: torch.Tensor, truth: torch.Tensor, border: int = 5) -> float:
    """Mean end-point error in voxels, away from the border."""
    inside = tuple(slice(border, -border) if n > 1 else slice(None) for n in truth.shape[1:])
    return float((found - truth)[(slice(None), *inside)].norm(dim=0).mean())


@pytest.mark.parametrize("shape", [SHAPE, (1, 40, 36)], ids=["3d", "2d"])
def test_a_translation_is_found_to_a_tenth(shape):
    """Fails where a field is applied in the other direction, axes are swapped, or cells are not turned into voxels."""
    shift = torch.tensor([3.0 if shape[0] > 1 else 0.0, -4.0, 5.0]).view(3, 1, 1, 1)
    fixed, moving = texture(voxels(shape) + shift), texture(voxels(shape))
    found = match(fixed, moving, torch.ones(shape), ConvexConfig())
    assert error(found, shift.expand(3, *shape), 7) < 0.1 * float(shift.norm())


def test_a_smooth_warp_is_found_to_less_than_half():
    truth = swirl(SHAPE, 5.0)
    found = match(texture(voxels() + truth), texture(voxels()), torch.ones(SHAPE), ConvexConfig())
    assert error(found, truth) < 0.5 * error(torch.zeros_like(truth), truth)
    assert error(found, truth) < 0.6


def test_the_search_alone_finds_the_nearest_cell():
    coarse = (12, 10, 11)
    fixed, moving = texture(2 * voxels(coarse) + 4), texture(2 * voxels(coarse))
    found = search(fixed, moving, torch.ones(1, *coarse), 3)
    middle = (slice(None), *(slice(2, -5) for _ in coarse))
    assert torch.allclose(found[middle], torch.full_like(found[middle], 2.0), atol=1e-4)


def test_equal_images_stay_where_they_are():
    image = texture(voxels())
    found = match(image, image, torch.ones(SHAPE), ConvexConfig())
    assert found.abs().max() < 0.05


def test_the_search_rests_where_nothing_is_known():
    """The far half moves the other way, and does not count: fails where it does, or where ties go to the first."""
    coarse = (8, 8, 20)
    shift = torch.zeros(3, *coarse)
    shift[2] = torch.where(voxels(coarse)[2] < 8, 2.0, -2.0)
    weight = (voxels(coarse)[2] < 8).float()
    found = search(texture(2 * (voxels(coarse) + shift)), texture(2 * voxels(coarse)), weight[None], 3)
    assert torch.allclose(found[2, 2:-2, 2:-2, 2:6], torch.tensor(2.0), atol=1e-4)
    assert found[2, :, :, 10:].min() > -1e-4
    assert found[:, :, :, 18:].abs().max() < 1e-4


def test_what_does_not_count_has_no_say():
    """The far half of the fixed image moves the other way: fails where Adam follows it."""
    shift = torch.zeros(3, *SHAPE)
    shift[2] = torch.where(voxels()[2] < 14, 3.0, -3.0)
    weight = (voxels()[2] < 14).float()
    found = match(texture(voxels() + shift), texture(voxels()), weight, ConvexConfig())
    assert found[2, 8:-8, 8:-8, 6:12].mean() > 2.7
    assert found[2, 8:-8, 8:-8, 20:26].mean() > 0


def test_a_warp_reads_at_the_displaced_place():
    values = torch.arange(60.0).view(1, 3, 4, 5)
    field = torch.zeros(3, 3, 4, 5)
    field[0, 0], field[2] = 1.0, 0.5
    moved = warp(values, field)
    assert torch.allclose(moved[0, 0, :, :4], values[0, 1, :, :4] + 0.5)
    assert torch.allclose(moved[0, 2, :, 4], values[0, 2, :, 4], atol=1e-5)  # the border goes on


def test_a_field_keeps_its_extent_when_it_is_resized():
    field = torch.ones(3, 4, 6, 2)
    wide = resized(field, (8, 6, 6))
    assert torch.allclose(wide, torch.tensor([2.0, 1.0, 3.0]).view(3, 1, 1, 1).expand(3, 8, 6, 6))


def test_consistent_fields_are_inverses_of_each_other():
    forward = swirl(SHAPE, 3.0)
    backward = inverse(forward)
    assert error(consistent(forward, backward), forward, 1) < 0.05
    halfway = consistent(forward, torch.zeros_like(forward))
    assert error(halfway, forward / 2, 1) < 0.25


def slow_mind(image: np.ndarray, z: int, y: int, x: int) -> np.ndarray:
    """The twelve values of one voxel, by their definition; and the noise that they are divided by."""
    ends = [
        np.array(offset)
        for axis in range(3)
        for offset in (-2 * np.eye(3, dtype=int)[axis], 2 * np.eye(3, dtype=int)[axis])
    ]
    at = lambda p: image[tuple(np.clip(p, 0, np.array(image.shape) - 1))]  # noqa: E731
    values = []
    for i in range(6):
        for j in range(i + 1, 6):
            if i // 2 == j // 2:
                continue
            around = [np.array([a, b, c]) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)]
            values.append(
                np.mean(
                    [
                        (at(np.array([z, y, x]) + o + ends[i]) - at(np.array([z, y, x]) + o + ends[j])) ** 2
                        for o in around
                    ]
                )
            )
    values = np.array(values) - min(values)
    return np.exp(-values / values.mean())


def test_mind_equals_a_slow_version():
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 10, 11))).float()
    found = mind_ssc(image)
    assert found.shape == (12, 9, 10, 11)
    assert np.allclose(found[:, 4, 5, 6], slow_mind(image.numpy(), 4, 5, 6), atol=1e-4)


def test_mind_does_not_see_contrast():
    """Brighter, darker, inverted: the same features. Fails where the noise is not divided out."""
    image = texture(voxels())[0]
    assert torch.allclose(mind_ssc(image), mind_ssc(100 - 7 * image), atol=1e-3)
    assert mind_ssc(texture(voxels((1, 20, 20)))[0]).shape[0] == 4
    assert torch.isfinite(mind_ssc(torch.zeros(8, 8, 8))).all()


@pytest.mark.parametrize("setting", [{"reach": 0}, {"lr": 0.0}, {"regularization": -1.0}, {"fine": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ConvexConfig(**setting)
