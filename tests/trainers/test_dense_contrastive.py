"""Dense contrast: places that correspond in scanner coordinates, none of them padding or air, and near ones spared."""

from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.dense_contrastive import DenseContrastive, DenseContrastiveTrainer
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.places import read_at
from nnssl_ext.views.spatial import SpatialConfig
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))
CROPS = {(16, 24, 8): (24, 34, 12), (24, 16): (34, 24)}
NOTHING = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)


def make_batch(patch_size: tuple[int, ...], spacing: float = 1.0) -> Batch:
    """Every channel is a coordinate in mm; the last crop is padded with rubbish."""
    crop = CROPS[patch_size]
    millimetres = torch.ones(3, len(crop))
    millimetres[:, 0] = spacing
    data = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in crop), indexing="ij")).clone()
    data[0] *= spacing
    valid = torch.ones(3, 1, *crop, dtype=torch.bool)
    valid[2, :, -6:] = False
    data = torch.where(valid, data.expand(3, *data.shape), 1e4)
    return Batch(
        data, valid, ("a", "b", "c"), RANDOM.samples, torch.zeros(3, len(crop), dtype=torch.int64), millimetres
    )


make_task = partial(task_on, DenseContrastive)


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_places_correspond_in_scanner_coordinates(tiny_plan, patch_size, spacing):
    """Voxels hold their coordinates, so both views have to show the same numbers at a place, and these are `where`.

    Catches places that are not carried through both crops (shifted, of another size, turned, flipped, of anisotropic
    voxels), axes that are swapped, and padding among the places.
    """
    moves = SpatialConfig(flip=0.5, rotation=1.0, scaling=0)
    task = make_task(tiny_plan(patch_size, len(patch_size)), spatial=moves, intensity=NOTHING)
    for step in range(4):
        views = task.views(make_batch(patch_size, spacing), replace(RANDOM, step=step), train=True)
        index = views["places"][:, None].expand(-1, len(patch_size), -1)
        first = views["first"].flatten(2).gather(2, index).transpose(1, 2)
        grid = views["there"].flip(2).view(3, -1, *[1] * (len(patch_size) - 1), len(patch_size))
        second = functional.grid_sample(views["second"], grid, padding_mode="border", align_corners=False)
        second = second.flatten(2).transpose(1, 2)
        counted = views["counted"]
        assert counted.any(1).all()
        torch.testing.assert_close(first[counted], second[counted], atol=2e-2, rtol=1e-3)
        torch.testing.assert_close(first[counted], views["where"][counted], atol=1e-2, rtol=1e-3)
        assert all(len(set(row.tolist())) == len(row) for row in views["places"])


def test_features_are_read_at_the_places(tiny_plan, patch_size, monkeypatch):
    """With the voxels themselves as features, those of both views are the same at a place.

    Catches axes that are swapped where the second view is read, and voxels of another place of the first.
    """
    monkeypatch.setattr("nnssl_ext.trainers.dense_contrastive.run_dense", lambda *args: (args[2], None))
    task = make_task(tiny_plan(patch_size, len(patch_size)), intensity=NOTHING)
    views = task.views(make_batch(patch_size), RANDOM, train=True)
    shown = task(views).embeddings
    assert views["counted"][:, 0].all()
    torch.testing.assert_close(shown.first, views["where"][:, 0], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(shown.second, shown.first, atol=2e-2, rtol=1e-3)


def test_air_is_left_out(tiny_plan):
    """Catches places in flat regions, which look alike wherever they are."""
    task, batch = make_task(tiny_plan((24, 16))), make_batch((24, 16))
    noise = torch.randn(3, 1, 34, 24, generator=torch.Generator().manual_seed(0))
    noise[:, :, :, 12:] = -1
    batch = replace(batch, data=noise, valid=torch.ones_like(noise, dtype=torch.bool))
    views = task.views(batch, RANDOM, train=False)
    assert views["counted"].any(1).all()
    assert views["where"][views["counted"]][:, 1].max() < 15


def test_the_sham_compares_with_the_same_place_in_another_case(tiny_plan):
    """Catches a sham whose features are still the case's own, and a loss that does not look at the partner."""
    task = make_task(tiny_plan((24, 16))).eval()
    batch = make_batch((24, 16))
    batch = replace(batch, data=torch.randn(3, 1, 34, 24, generator=torch.Generator().manual_seed(0)))
    views = task.views(batch, RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    with torch.no_grad():
        swapped = {**views, "second": views["second"].roll(1, 0), "second_valid": views["second_valid"].roll(1, 0)}
        losses = [task(each).loss.item() for each in (sham, swapped, views)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_near_places_are_no_negatives_of_each_other(tiny_plan):
    """With everything within reach there is nothing to tell apart; with nothing, all places are candidates."""
    task = make_task(tiny_plan((24, 16))).eval()
    batch = make_batch((24, 16))
    batch = replace(batch, data=torch.randn(3, 1, 34, 24, generator=torch.Generator().manual_seed(0)))
    views = task.views(batch, RANDOM, train=False)
    with torch.no_grad():
        assert task({**views, "reach": torch.full((3,), 1e3)}).loss.item() == pytest.approx(0, abs=1e-6)
        chance = task({**views, "reach": torch.zeros(3)}).metrics["contrast_chance"]
    assert chance.item() == pytest.approx(views["counted"].sum(1).float().log().mean().item(), rel=1e-5)
    assert views["places"].shape == (3, prod((24, 16)) // 2)


def test_near_is_closer_than_two_strides_of_the_wider_view(tiny_plan):
    """Steps are measured between neighbours in the picture, which holds its coordinates in mm.

    Catches the largest entry of a turned view's matrix taken for its step.
    """
    moves = SpatialConfig(flip=0, rotation=1, scaling=0)
    task = make_task(tiny_plan((24, 16), 2), spatial=moves, intensity=NOTHING)
    task.stride = (2, 2)
    views = task.views(make_batch((24, 16), 2.5), RANDOM, train=True)
    middle = [views[name][:, :, 8:16, 5:11] for name in ("first", "second")]
    steps = [view.diff(dim=axis).norm(dim=1).flatten(1).mean(1) for view in middle for axis in (2, 3)]
    torch.testing.assert_close(views["reach"], 4 * torch.stack(steps).amax(0), rtol=1e-3, atol=0)


LOWER, ORIGIN, MID_PLANE = 7, 4.0, 19.5


def make_mirror(plan, patch_size: tuple[int, ...], spacing: float) -> tuple[DenseContrastive, Batch]:
    """A task with a mid-plane that cuts the first axis, and crops whose voxels hold coordinates, away from the border
    of their volumes, which do not begin where their raw images do."""
    moves = SpatialConfig(flip=0.5, rotation=1.0, scaling=0)
    plane = MID_PLANE * spacing + ORIGIN
    task = make_task(plan, spatial=moves, intensity=NOTHING, mirror=True, mirror_axis=0, mid_plane=plane, width=8)
    batch = make_batch(patch_size, spacing)
    lower = torch.zeros_like(batch.lower)
    lower[:, 0] = LOWER + torch.arange(3)
    return task, replace(batch, lower=lower, origin=((ORIGIN, *[9.0] * (len(patch_size) - 1)),) * 3)


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_mirror_images_lie_on_the_other_side_of_the_mid_plane(tiny_plan, patch_size, spacing):
    """The mirror image of the volume's voxel i is its voxel 2 MID_PLANE - 1 - i, whatever the crop.

    Catches a plane taken in the middle of the crop, crops or volumes that are thought to begin at the raw image's
    border, half a voxel that is lost, views that are not turned with their crop, and other axes that are mirrored.
    """
    task, batch = make_mirror(tiny_plan(patch_size, len(patch_size)), patch_size, spacing)
    for step in range(3):
        views = task.views(batch, replace(RANDOM, step=step), train=True)
        begins = torch.tensor([2 * MID_PLANE - 1 - 2 * (LOWER + row) for row in range(3)]) * spacing
        expected = views["where"].clone()
        expected[:, :, 0] = begins[:, None] - expected[:, :, 0]
        for name in ("first", "second"):
            shown = views["counted"] & views[f"{name}_shows"]
            assert shown.any()
            found = read_at(views[name], views[f"{name}_mirror"])
            torch.testing.assert_close(found[shown], expected[shown], atol=5e-2, rtol=1e-3)


def test_a_mirror_image_is_a_weak_positive_and_no_negative(tiny_plan, monkeypatch):
    """Features that are the same on both sides of the plane, and else tell places apart, are what is asked for; and
    they are held against a method that does not know the plane.

    Catches mirror images that stay among the negatives, that are compared with the wrong place, or are left out.
    """
    task, batch = make_mirror(tiny_plan((24, 16), 2), (24, 16), 1.0)
    batch = replace(batch, lower=torch.full_like(batch.lower, 3), valid=torch.ones_like(batch.valid))

    def features(kind: str):
        def run(encoder, decoder, image, *rest):
            rows = (image[:, :1] - (MID_PLANE - 0.5 - 3)) / 3
            side = rows.abs() if kind == "symmetric" else rows
            waves = [
                function(rate * each)
                for each in (side, image[:, 1:] / 3)
                for rate in (1, 2)
                for function in (torch.sin, torch.cos)
            ]
            return torch.cat(waves, 1), None

        return run

    views = task.views(batch, RANDOM, train=False)
    plain = make_task(tiny_plan((24, 16), 2), width=8)
    found = {}
    for kind in ("symmetric", "sided"):
        monkeypatch.setattr("nnssl_ext.trainers.dense_contrastive.run_dense", features(kind))
        with torch.no_grad():
            found[kind] = task(views)
            found[f"{kind}, plane unknown"] = plain(views)
    losses = {kind: output.loss.item() for kind, output in found.items()}
    assert losses["symmetric"] < losses["sided"]
    assert losses["symmetric, plane unknown"] > losses["sided, plane unknown"] + 0.1
    symmetric, sided = found["symmetric"].metrics, found["sided"].metrics
    assert symmetric["mirror_contrast"] < symmetric["mirror_contrast_chance"] - 1
    assert symmetric["mirror_contrast"] < sided["mirror_contrast"] - 0.5
    assert symmetric["contrast"] < found["symmetric, plane unknown"].metrics["contrast"] - 0.1
    expected = symmetric["contrast"] + 0.25 * symmetric["mirror_contrast"]
    assert losses["symmetric"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [[], ["mirror_axis=0"], ["mid_plane=90.5"]])
def test_mirror_images_are_refused_without_a_known_mid_plane(settings):
    """Catches the middle of the crop, or of the volume, taken for the mid-plane."""
    with pytest.raises(ValueError, match="needs a known mid-plane"):
        DenseContrastiveTrainer.configured(["mirror=True", *settings])


def test_a_mirror_axis_that_images_do_not_have_is_refused(tiny_plan):
    with pytest.raises(ValueError, match="mirror_axis=2 must be one of 0 to 1"):
        make_task(tiny_plan((24, 16)), mirror=True, mirror_axis=2, mid_plane=3.0)


@pytest.mark.parametrize(
    "override",
    [
        "mirror_weight=0",
        "positions=1",
        "width=0",
        "temperature=0",
        "parent_scale=0.5",
        "crop_scale=[1,0.5]",
        "shift=1",
        "spatial.elastic=1",
    ],
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        DenseContrastiveTrainer.configured([override])
