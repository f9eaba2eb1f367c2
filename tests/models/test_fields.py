"""Displacement fields: where they lead, how they join, that flows can be undone, and affine maps that fit."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl_ext.models.fields import affine_field, determinants, fit_affine, flow, joined, resized, warp

SHAPES = [(12, 18, 10), (20, 14)]


def voxels(shape) -> torch.Tensor:
    """The coordinates of every voxel, (1, D, *shape)."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in shape), indexing="ij"))[None]


def middle(shape) -> torch.Tensor:
    return torch.tensor([(edge - 1) / 2 for edge in shape]).view(1, -1, *[1] * len(shape))


def smooth_velocity(shape, size: float) -> torch.Tensor:
    """A random velocity whose longest vector has that length, and that ends at the border."""
    dims = len(shape)
    coarse = torch.randn(1, dims, *[5] * dims, generator=torch.Generator().manual_seed(0))
    mode = "trilinear" if dims == 3 else "bilinear"
    velocity = functional.interpolate(coarse, size=list(shape), mode=mode, align_corners=True)
    for axis, edge in enumerate(shape, start=2):
        window = torch.sin(torch.pi * (torch.arange(edge) + 0.5) / edge)
        velocity = velocity * window.view(-1, *[1] * (dims + 1 - axis))
    return velocity * size / velocity.norm(dim=1).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_warp_reads_at_the_displaced_place_of_its_own_sample(shape):
    """Catches axes that are swapped, a shift to the other side, and samples mixed up."""
    values = voxels(shape).expand(2, -1, *[-1] * len(shape)).clone()
    values[1] += 100
    field = torch.zeros_like(values)
    field[0, 0], field[1, 1] = 2, -1.5
    moved = warp(values, field)
    torch.testing.assert_close(moved[0, 0, 1:-3], values[0, 0, 3:-1])
    torch.testing.assert_close(moved[0, 1], values[0, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[1, 1][:, 2:-2], values[1, 1][:, 2:-2] - 1.5, atol=1e-4, rtol=1e-5)
    assert warp(torch.ones_like(values), field, "zeros")[0, 0, -2:].max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_join_in_their_order(shape):
    """First a shift by 2, then the growth at the new place: x to 2 + .1 (x + 2). In the other order it is 2 + .1 x."""
    shift, growth = torch.zeros(1, len(shape), *shape), torch.zeros(1, len(shape), *shape)
    shift[:, 0] = 2
    growth[:, 0] = 0.1 * voxels(shape)[:, 0]
    found = joined(shift, growth)[0, 0, :-3]
    torch.testing.assert_close(found, 2 + 0.1 * (voxels(shape)[0, 0, :-3] + 2), atol=1e-4, rtol=1e-4)


def test_a_field_keeps_its_extent_when_it_is_resized():
    field = torch.ones(1, 2, 4, 8)
    wide = resized(field, (8, 8))
    assert (wide[:, 0] == 2).all()
    assert (wide[:, 1] == 1).all()


@pytest.mark.parametrize("rate", [0.4, -0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_flow_of_a_linear_velocity_is_exponential(shape, rate):
    """Away from the middle at a rate, a place r ends at r e^rate: catches a squaring too many or too few, and the
    field of one small step, which ends at r (1 + rate)."""
    distance = voxels(shape) - middle(shape)
    found = flow(rate * distance)
    near = (distance.abs() * math.exp(max(rate, 0)) < middle(shape)).all(1, keepdim=True).expand_as(found)
    assert near.float().mean() > 0.1
    torch.testing.assert_close(found[near], ((math.exp(rate) - 1) * distance)[near], atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [(24, 20, 28), (40, 32)])
def test_long_flows_are_undone_by_the_opposite_velocity_and_do_not_fold(shape):
    """Catches displacements taken for velocities (v there and -v back miss the start), and identity in disguise."""
    velocity = smooth_velocity(shape, 5)
    there, back = flow(velocity), flow(-velocity)
    assert there.norm(dim=1).max() > 3
    assert joined(there, back).norm(dim=1).max() < 0.4
    assert joined(velocity, -velocity).norm(dim=1).max() > 1
    assert (determinants(there) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_determinants_of_linear_maps_are_theirs(shape):
    """Catches a transposed or a missing identity, and folds that are not seen."""
    place = voxels(shape)
    field = torch.zeros_like(place)
    field[:, 0] = 0.5 * place[:, 0] + 2 * place[:, 1]
    field[:, 1] = 0.25 * place[:, 0]
    assert torch.allclose(determinants(field), torch.tensor(1.5 - 0.5), atol=1e-4)
    field[:, 0] = -1.5 * place[:, 0]
    assert torch.allclose(determinants(field), torch.tensor(-0.5), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_affine_map_is_read_off_its_field_where_places_count(shape):
    """Catches rows and columns that are swapped, half extents that are whole ones, and padding that has a say."""
    dims = len(shape)
    truth = torch.randn(2, dims + 1, dims, generator=torch.Generator().manual_seed(1)) / 5
    field = affine_field(truth, shape)
    corner = field[0, :, 0, 0, 0] if dims == 3 else field[0, :, 0, 0]
    outermost = torch.tensor([1 / edge - 1 for edge in shape])
    expected = (outermost @ truth[0, :-1] + truth[0, -1]) * torch.tensor(shape) / 2
    torch.testing.assert_close(corner, expected, atol=1e-4, rtol=1e-4)
    weight = torch.ones(2, 1, *shape)
    weight[:, :, :3] = 0
    field[:, :, :3] = 50
    torch.testing.assert_close(fit_affine(field, weight), truth, atol=2e-3, rtol=2e-2)
    assert not fit_affine(field, torch.zeros_like(weight)).any()


def test_an_affine_map_is_the_same_on_every_grid():
    coefficients = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(2)) / 5
    coarse, fine = (affine_field(coefficients, size) for size in ((6, 4, 5), (12, 8, 10)))
    inner = (slice(None), slice(None), *[slice(1, -1)] * 3)
    torch.testing.assert_close(resized(coarse, (12, 8, 10))[inner], fine[inner], atol=1e-4, rtol=1e-4)
