"""Quarter turns: the same as `rot90`, and nothing besides the picture tells them apart."""

import pytest
import torch

from nnssl_ext.views.turns import only_shown, quarter_turned, turning_plane

TURNS = torch.arange(4)


def crops(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """One crop, four times."""
    return torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(seed)).expand(4, -1, *shape)


def everything(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(4, 1, *shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shape", "plane"), [((6, 8, 8), (1, 2)), ((8, 6, 8), (0, 2)), ((8, 8, 5), (0, 1)), ((8, 8), (0, 1))]
)
def test_square_crops_are_turned_as_rot90_turns_them(shape, plane):
    """Catches labels that do not tell the turn, turns the other way round, and a wrong axis."""
    data = crops(shape)
    view = quarter_turned(data, everything(shape), TURNS, plane, shape)
    assert view.valid.all()
    for turn in range(4):
        expected = torch.rot90(data[turn], turn, [axis + 1 for axis in plane])
        torch.testing.assert_close(view.data[turn], expected, atol=1e-4, rtol=1e-4)


def test_windows_that_are_not_square_show_the_same_place_without_distortion():
    """A window of 12 x 8 lies across after a quarter turn: the crop is wide enough, so nothing is shrunk."""
    data = crops((16, 16))
    view = quarter_turned(data, everything((16, 16)), TURNS, (0, 1), (12, 8))
    for turn in range(4):
        whole = torch.rot90(data[turn], turn, [1, 2])
        torch.testing.assert_close(view.data[turn], whole[:, 2:14, 4:12], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [0, 1, 4])
@pytest.mark.parametrize(("shape", "plane"), [((24, 16), (0, 1)), ((16, 24, 8), (0, 1)), ((8, 13, 16), (1, 2))])
def test_padding_and_magnification_do_not_tell_the_turn(shape, plane, padded):
    """Catches views that reach into padding in some turns only, and views that are shrunk in some turns only."""
    valid = everything(shape)
    valid[:, :, shape[0] - padded :] = False
    data = crops(shape).masked_fill(~valid, 1e4)
    view = quarter_turned(data, valid, TURNS, plane, shape)
    assert view.valid.all()
    zoom = view.transform.matrix.abs().amax((1, 2))
    assert (zoom == zoom[0]).all()
    assert view.data.abs().max() < 10


@pytest.mark.parametrize("padded", [(0, 0), (1, 0), (3, 2), (0, 5)])
def test_sharpness_does_not_tell_the_turn(padded):
    """Interpolation blurs the view's axes alike in every turn: noise loses the same variance along each of them.

    Catches a centre half a voxel off along one axis of the crop, which blurs that axis alone.
    """
    shape, size = (40, 40), (30, 36)
    valid = everything(shape).repeat(100, 1, 1, 1)
    valid[:, :, shape[0] - padded[0] :] = False
    valid[:, :, :, shape[1] - padded[1] :] = False
    data = torch.randn(400, 1, *shape, generator=torch.Generator().manual_seed(0))
    view = quarter_turned(data, valid, TURNS.repeat(100), (0, 1), size).data
    steps = [view.diff(dim=axis).square().flatten(1).mean(1).view(100, 4).mean(0) for axis in (2, 3)]
    for step in steps:
        assert step.max() / step.min() < 1.03


def test_the_plane_is_the_most_square_one_and_the_axial_one_of_equals():
    assert turning_plane((8, 8, 8), (1, 1, 1), 1.1) == (1, 2)
    assert turning_plane((16, 24, 8), (1, 1, 1), 1.1) == (0, 1)
    assert turning_plane((40, 56, 40), (1, 1, 1), 1.1) == (0, 2)
    assert turning_plane((24, 16), (1, 1), 1.1) == (0, 1)


def test_planes_of_unequal_spacing_are_dropped_or_refused():
    assert turning_plane((40, 56, 40), (3, 1, 1), 1.1) == (1, 2)
    with pytest.raises(ValueError, match=r"no two axes .* 1\.1 or less.*-spacing iso"):
        turning_plane((40, 56, 40), (3, 2, 1), 1.1)


@pytest.mark.parametrize(("real", "fair"), [((16, 16, 16), True), ((2, 16, 16), True), ((16, 2, 16), False)])
def test_padding_that_tells_the_turn_is_found(real, fair):
    """Two of sixteen voxels are real along an axis, and no view is shrunk to an eighth: it shows padding.

    Catches a claim that none is there: two turns then differ from the two others in where their padding lies. Along the
    axis that is turned about it lies alike in all.
    """
    shape, plane = (16, 16, 16), (1, 2)
    valid = torch.zeros(4, 1, *shape, dtype=torch.bool)
    valid[(slice(None), 0, *map(slice, real))] = True
    view = quarter_turned(crops(shape), valid, TURNS, plane, shape)
    assert only_shown(view.valid, plane).tolist() == [fair] * 4
    assert torch.equal(view.valid[0], view.valid[1]) == fair


def test_turns_stay_on_the_device():
    data, valid = crops((8, 6)).to("meta"), everything((8, 6)).to("meta")
    assert quarter_turned(data, valid, TURNS.to("meta"), (0, 1), (8, 6)).data.device.type == "meta"
