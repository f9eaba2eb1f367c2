"""Registration: what is asked of two images is true, deformations are found, and nothing is learned from padding."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.evaluation.learning import gate
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.fields import affine_field, warp
from nnssl_ext.models.registration import Deformation, RegistrationHead
from nnssl_ext.trainers.registration import Registration, RegistrationTrainer
from tests.tasks import task_on

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12, 13))
CROPS = {(16, 24, 8): (22, 34, 11), (24, 16): (34, 22)}


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Noise of some voxels' width and variance 1, (B, C, *shape)."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    pool = functional.avg_pool3d if len(shape) == 5 else functional.avg_pool2d
    for _ in range(2):
        noise = pool(noise, 3, 1, 1)
    return noise / noise.std()


def make_batch(size: tuple[int, ...], data: torch.Tensor | None = None) -> Batch:
    """Four crops, the last of them padded with rubbish along the first axis."""
    data = smooth(4, 1, *size) if data is None else data
    valid = torch.ones(4, 1, *size, dtype=torch.bool)
    valid[3, :, -5:] = False
    lower = torch.zeros(4, len(size), dtype=torch.int64)
    return Batch(torch.where(valid, data, 1e4), valid, tuple("abcd"), RANDOM.samples, lower, torch.ones(4, len(size)))


make_task = partial(task_on, Registration, block_size=4)


def test_a_sample_is_two_cases_one_after_the_other(tiny_plan, patch_size):
    """Catches rows of different samples laid upon each other, holes in what is asked for, padding in any of it, and the
    spacing of the moving case."""
    task, batch = make_task(tiny_plan(patch_size)), make_batch(patch_size)
    batch = replace(batch, spacing=batch.spacing + torch.arange(4)[:, None])
    assert (task.needs.images, task.needs.same, task.parent_scale) == (2, "modality", 1)
    views = task.views(batch, RANDOM, train=False)
    assert views["spacing"][:, 0].tolist() == [2, 4]
    for sample in range(2):
        for number in range(2):
            row = 2 * sample + number
            assert torch.equal(views["target"][sample, number], batch.data[row].masked_fill(~batch.valid[row], 0))
            assert torch.equal(views["valid"][sample, number], batch.valid[row])
    assert not views["images"][views["hidden"]].any()
    assert torch.equal(views["images"][~views["hidden"]], views["target"][~views["hidden"]])
    shares = (views["hidden"] & views["valid"]).flatten(2).sum(2) / views["valid"].flatten(2).sum(2)
    assert (shares - 0.25).abs().max() < 0.05
    assert not torch.equal(views["hidden"][:, 0], views["hidden"][:, 1])


@pytest.mark.parametrize("train", [True, False], ids=["train", "validation"])
def test_the_truth_leads_from_the_fixed_view_to_the_moving_one(tiny_plan, patch_size, train):
    """Voxels hold their coordinates, so under the truth the moving view must show the fixed one's.

    Catches the inverse displacement, half of it, one without the deformation, moving views that are not taken into
    account, and places that the moving view does not show. One that is the identity shows other coordinates.
    """
    crop = CROPS[patch_size]
    places = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in crop), indexing="ij"))
    task = make_task(tiny_plan(patch_size, len(crop)), pair="warp")
    assert (task.needs.images, task.parent_scale) == (1, 1.4)
    views = task.views(make_batch(crop, places.expand(4, *places.shape)), RANDOM, train)
    moving, fixed = views["target"].unbind(1)
    moved = warp(moving, views["truth"])
    known = views["known"].expand_as(fixed)
    assert views["known"].flatten(1).float().mean(1).min() > 0.2
    torch.testing.assert_close(moved[known], fixed[known], atol=2e-2, rtol=1e-3)
    assert (moving - fixed).abs()[known].mean() > 0.3


@pytest.mark.parametrize("dims", [2, 3])
def test_the_head_recovers_a_known_affine_map(dims):
    """Its own affine layers, trained on one pair of made images alone to make them alike, find the map between them.

    Catches an affine matrix that is rebuilt from numbers and has no gradient, maps that are inverted, transposed or
    halved, and a head that leaves the map to the flow.
    """
    shape = (20, 24, 16)[:dims] if dims == 3 else (32, 28)
    truth = torch.zeros(1, dims + 1, dims)
    truth[0, :dims] = 0.08 * torch.tensor([[0.5, -1.0, 0.3], [1.0, 0.8, 0.0], [0.0, 0.5, -0.6]])[:dims, :dims]
    truth[0, -1] = torch.tensor([0.1, -0.08, 0.05])[:dims]
    moving = smooth(1, 4, *shape)
    fixed = warp(moving, affine_field(truth, shape))
    torch.manual_seed(0)
    head = RegistrationHead(dims, 4, 16)
    real = torch.ones(1, 1, *shape, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.votes.parameters(), lr=5e-3)
    for _ in range(60):
        found = head(moving, fixed, real)
        loss = (warp(moving, found.field) - fixed).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    affine = head(moving, fixed, real).affine
    assert (affine - truth).norm() < 0.2 * truth.norm()


def test_both_heads_get_a_gradient_from_how_alike_the_images_become(tiny_plan, patch_size):
    """Catches an affine map that is detached on its way; restoring and smoothness alone would not tell."""
    task = make_task(tiny_plan(patch_size), restoration=0, smoothness=0)
    task(task.views(make_batch(patch_size), RANDOM, train=True)).loss.backward()
    for layers in (task.head.votes, task.head.velocity):
        assert all(parameter.grad.any() for parameter in layers.parameters())
    assert all(p.grad is None or not p.grad.any() for p in task.restore.parameters())


@pytest.mark.parametrize("pair", ["view", "warp"])
def test_a_known_deformation_is_found_by_half_and_more(tiny_plan, pair):
    """After a short training on one made pair, be it told or only by how alike the images become.

    Catches what a loss alone does not: fields of the other direction, in other units or axes, and the identity.
    """
    task = make_task(tiny_plan((24, 16)), pair=pair, smoothness=0.1, window=7)
    batch = make_batch((34, 22))
    views = task.views(batch, RANDOM, train=False)
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    for _ in range(80):
        output = task(views)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.metrics["error_untouched"] > 0.8
    assert output.metrics["error"] < 0.5 * output.metrics["error_untouched"]
    assert output.metrics["ncc"] > output.metrics["ncc_untouched"]
    assert output.metrics["folded"] < 0.01


def test_the_untouched_likeness_is_that_of_the_images_as_they_are(tiny_plan, patch_size):
    """At the start the deformation is nearly none, so both likenesses agree; equal images are alike."""
    task, batch = make_task(tiny_plan(patch_size)).eval(), make_batch(patch_size)
    metrics = task(task.views(batch, RANDOM, train=False)).metrics
    assert metrics["ncc"].item() == pytest.approx(metrics["ncc_untouched"].item(), abs=2e-3)
    assert metrics["ncc_untouched"] < 0.5
    assert metrics["folded"] == 0
    assert metrics["shown"] == 1  # padding of a fixed image is not asked for
    half = batch.valid.clone()
    half[0, :, : patch_size[0] // 2] = False
    shown = task(task.views(replace(batch, valid=half), RANDOM, train=False)).metrics["shown"]
    assert shown.item() == pytest.approx(1 - 0.5 / (1 + (patch_size[0] - 5) / patch_size[0]), abs=0.02)
    same = replace(batch, data=batch.data[:1].expand_as(batch.data), valid=torch.ones_like(batch.valid))
    output = task(task.views(same, RANDOM, train=False))
    assert output.metrics["ncc_untouched"].item() == pytest.approx(1, abs=1e-3)
    assert {"fixed", "moving", "warped"} <= set(output.images)
    torch.testing.assert_close(output.images["warped"], output.images["moving"], atol=1e-2, rtol=1e-2)


def test_the_velocity_is_smooth_in_millimetres_of_each_case(tiny_plan):
    """Of a velocity that grows by .1 voxels of 3 mm along its axis for every voxel of .5 mm along the other one: .6, of
    one component and one axis of two each; of cubic voxels .1. Catches gradients in voxels, spacings of the plan or of
    another case, and the padding's."""
    task = make_task(tiny_plan((24, 16)))
    velocity = torch.zeros(2, 2, 12, 8)
    velocity[:, 0] = 0.1 * torch.arange(8)
    velocity[:, :, 6:] = 9 * torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    real = torch.zeros(2, 1, 24, 16, dtype=torch.bool)
    real[:, :, :12] = True
    nothing = torch.zeros(2)
    found = task._roughness(Deformation(nothing, velocity, nothing), real, torch.tensor([[3.0, 0.5], [1.0, 1.0]]))
    assert found.item() == pytest.approx((0.6**2 + 0.1**2) / 8, rel=1e-4)


def test_air_need_not_look_alike(tiny_plan):
    """Flat tissue correlates with nothing, not even with itself. Catches a mean over all voxels, 0.4 here, and moving
    air that has an influence."""
    task = make_task(tiny_plan((24, 16)), window=3).eval()
    data = smooth(2, 1, 24, 16).repeat_interleave(2, 0)
    data[:, :, :, :11] = -1
    noisy = data.clone()
    noisy[::2, :, :, :7] = 5 * smooth(2, 1, 24, 7, seed=1)
    for each in (data, noisy):
        batch = replace(make_batch((24, 16)), data=each, valid=torch.ones_like(each, dtype=torch.bool))
        assert task(task.views(batch, RANDOM, train=False)).metrics["ncc_untouched"] > 0.75


@pytest.mark.parametrize("pair", ["case", "warp"])
def test_a_sham_deforms_and_restores_another_sample(tiny_plan, pair):
    """Catches a loss that still sees the pair which the network saw."""
    task = make_task(tiny_plan((24, 16)), pair=pair).eval()
    views = task.views(make_batch((34, 22) if pair == "warp" else (24, 16)), RANDOM, train=False)
    sham = task.sham(views, RANDOM)
    assert torch.equal(sham["images"], views["images"])
    assert torch.equal(sham["target"], views["target"].roll(1, 0))
    assert not (sham["asked"] & ~views["asked"]).any()
    if pair == "warp":
        assert torch.equal(sham["truth"], views["truth"].roll(1, 0))
        assert not (sham["known"] & ~views["known"]).any()


def test_likeness_counts_as_beaten_where_it_is_higher():
    """Catches correlation taken for an error by the gate of the benchmark."""
    assert gate([{"ncc": [0.8, 0.5]}] * 2)[0] == "passed"
    assert gate([{"ncc": [0.4, 0.5]}] * 2)[0] == "failed"


@pytest.mark.parametrize(
    "override",
    ["pair=twin", "similarity=-1", "window=4", "mask_ratio=0", "spatial.flip=0.5", "warp.flip=1", "parent_scale=0.5"],
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        RegistrationTrainer.configured([override])


def test_deformed_moving_views_and_blocks_that_hide_nothing_are_refused(tiny_plan):
    with pytest.raises(ValueError, match=r"set warp\.elastic"):
        RegistrationTrainer.configured(["pair=view", "spatial.elastic=1"])
    with pytest.raises(ValueError, match="holds 1 blocks"):
        make_task(tiny_plan((24, 16)), block_size=32)
