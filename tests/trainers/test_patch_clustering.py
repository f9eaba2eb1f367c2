"""Patch-level clustering: places correspond, assignments are not scrambled, prototypes have length 1, no air."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.trainers.patch_clustering import (
    PatchClustering,
    PatchClusteringConfig,
    PatchClusteringTrainer,
    features_at,
)
from nnssl_ext.views.crops import place_pair
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.overlapping import intersection_over_union, with_overlap
from nnssl_ext.views.spatial import SpatialConfig
from nnssl_ext.views.transform import SpatialTransform

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))
CROPS = {(16, 24, 8): (24, 34, 12), (24, 16): (34, 24)}
NOTHING = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)
MOVES = SpatialConfig(flip=0.5, rotation=1.0, scaling=0)


def make_batch(data: torch.Tensor, spacing: float = 1.0) -> Batch:
    """The last crop is padded with rubbish."""
    crop, dims = data.shape[2:], data.ndim - 2
    millimetres = torch.ones(3, dims)
    millimetres[:, 0] = spacing
    valid = torch.ones(3, 1, *crop, dtype=torch.bool)
    valid[2, :, -6:] = False
    data = torch.where(valid, data, 1e4)
    return Batch(data, valid, ("a", "b", "c"), RANDOM.samples, torch.zeros(3, dims, dtype=torch.int64), millimetres)


def coordinates(patch_size: tuple[int, ...], spacing: float) -> Batch:
    """Every channel is a coordinate in mm."""
    data = torch.stack(torch.meshgrid(*(torch.arange(float(edge)) for edge in CROPS[patch_size]), indexing="ij"))
    scale = torch.tensor([spacing] + [1.0] * (len(patch_size) - 1)).view(-1, *[1] * len(patch_size))
    return make_batch((data * scale).expand(3, *data.shape), spacing)


def noise(patch_size: tuple[int, ...] = (24, 16)) -> torch.Tensor:
    return torch.randn(3, 1, *CROPS[patch_size], generator=torch.Generator().manual_seed(0))


def make_task(plan, num_cases: int = 8, batch_size: int = 2, **settings) -> PatchClustering:
    torch.manual_seed(0)
    configuration = replace(plan.configuration(plan.configuration_names[0]), batch_size=batch_size)
    return PatchClustering(PatchClusteringConfig(**settings), configuration, num_cases)


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_places_correspond_in_scanner_coordinates(tiny_plan, patch_size, spacing):
    """Voxels hold their coordinates in mm, so both views have to show the same numbers at a place.

    Catches places that are not carried through both crops (shifted, of another size, turned, flipped, of anisotropic
    voxels) and swapped axes; planted once: places of the second view taken from the first, and axes that are not
    flipped for the sampling.
    """
    task = make_task(tiny_plan(patch_size, len(patch_size)), spatial=MOVES, intensity=NOTHING)
    for step in range(4):
        views = task.views(coordinates(patch_size, spacing), replace(RANDOM, step=step), train=True)
        counted = views["counted"]
        first, second = (features_at([views[name]], views[at]) for name, at in (("first", "here"), ("second", "there")))
        assert counted.any(1).all()
        torch.testing.assert_close(first[counted], second[counted], atol=2e-2, rtol=1e-3)


def test_a_pair_overlaps_by_a_third_or_more(patch_size):
    """Drawn far apart, and turned; what shares too little is cut at one place. Catches pairs left apart."""
    number = 24
    valid = torch.ones(number, 1, *CROPS[patch_size], dtype=torch.bool)
    random, spacing = SampleRandom(0, 0, tuple(range(number))), torch.ones(number, len(patch_size))
    pair = place_pair(valid, spacing, random, (0.4, 1.0), patch_size, MOVES, 0.5)
    drawn = intersection_over_union(*pair)
    first, second = with_overlap(*pair, 0.3)
    assert (drawn < 0.3).any()
    assert (drawn > 0.3).any()
    assert (intersection_over_union(first, second) > 0.29).all()
    assert torch.equal(second.centre[drawn >= 0.3], pair[1].centre[drawn >= 0.3])


def test_overlap_is_that_computed_by_hand():
    """Two squares of 4 voxels, one shifted by 2 rows: 8 of 24 are shared; a square of half the edge within it: 1/4."""
    square = SpatialTransform((4, 4), torch.eye(2)[None], torch.tensor([[10.0, 10.0]]))
    shifted = replace(square, centre=torch.tensor([[12.0, 10.0]]))
    assert intersection_over_union(square, shifted).item() == pytest.approx(1 / 3)
    assert intersection_over_union(square, replace(square, matrix=torch.eye(2)[None] / 2)).item() == pytest.approx(0.25)


def test_planted_assignments_come_out_at_their_tokens(tiny_plan):
    """Each of 2x3x20 tokens likes one prototype best, of 5, in an order that no symmetry keeps; the queue is empty.

    Catches assignments that are scrambled on their way out of Sinkhorn, as by its result
    reshaped instead of transposed; planted once.
    """
    task = make_task(tiny_plan((24, 16)), prototypes=5)
    planted = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(n)) % 5 for n in range(2)])
    planted = planted.view(2, 3, 20)
    scores = 0.4 * functional.one_hot(planted, 5) + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.6])
    targets = task.assign(scores, torch.ones(3, 20, dtype=torch.bool))
    assert torch.equal(targets.argmax(-1), planted)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 3, 20))


def test_background_takes_no_part(tiny_plan):
    """Half of each image is flat. Catches places in air, an inverted threshold (planted once: all places lay in air),
    and air in the balance: what is assigned elsewhere must not depend on how many flat tokens there are."""
    data = noise()
    data[:, :, :, 12:] = -1
    task = make_task(tiny_plan((24, 16)))
    batch = make_batch(data)
    views = task.views(batch, RANDOM, train=False)
    assert views["counted"].any(1).all()
    values = features_at([views["first"]], views["here"])[views["counted"]]
    assert ((values - -1).abs() > 1e-3).float().mean() > 0.7
    scores = torch.randn(1, 3, 6, 50, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True] * 4 + [False] * 2] * 3)
    other = torch.where(counted[..., None], scores, 7.0)
    found, expected = (task.assign(each, counted)[0][counted] for each in (other, scores))
    torch.testing.assert_close(found, expected)


def test_prototypes_have_length_one_and_rest_at_the_start(tiny_plan):
    """Catches prototypes that grow, a start in which they move, and an end of it that never comes."""
    task, total = make_task(tiny_plan((24, 16)), freeze_share=0.2), 10
    directions = [task.before.clone()]
    optimizer = torch.optim.SGD(task.parameters(), lr=1.0, momentum=0.9)
    batch = make_batch(noise())
    for step in range(4):
        views = task.train().views(batch, replace(RANDOM, step=step), train=True)
        optimizer.zero_grad()
        task(views).loss.backward()
        optimizer.step()
        with torch.no_grad():
            task.after_step(step, total)
        directions.append(task.head.weight.detach().clone())
        torch.testing.assert_close(task.head.weight.norm(dim=1), torch.ones(50))
    for step in range(2):
        torch.testing.assert_close(directions[step + 1], directions[0])
    moved = (directions[3] - directions[2]).norm(dim=1).mean()
    assert moved > 1e-3
    assert task.drift == pytest.approx((directions[4] - directions[3]).norm(dim=1).mean().item())


def test_predictions_are_cosines_over_the_temperature(tiny_plan):
    """Against plain loops; and neither the length of prototypes nor of the projected tokens matters.

    Catches a student that is not normalised, a loss without the temperature, and one that is not what is logged.
    """
    task = make_task(tiny_plan((24, 16)), temperature=0.2).eval()
    views = task.views(make_batch(noise()), RANDOM, train=False)
    seen, assign = [], task.assign
    task.assign = lambda scores, counted: seen.append((scores, assign(scores, counted))) or seen[-1][1]
    with torch.no_grad():
        output = task(views)
        before, (scores, targets) = output.loss, seen[0]
        assert before == output.metrics["swap"]
        entropy = -(targets.flip(0) * (scores / 0.2).softmax(-1).log()).sum(-1).mean(0)
        means = [each[counted].mean() for each, counted in zip(entropy, views["counted"], strict=True)]
        torch.testing.assert_close(before, torch.stack(means).mean())
        task.head.weight *= 3
        task.head.layers[-1].weight *= 4
        torch.testing.assert_close(task(views).loss, before)


def test_the_queue_fills_up_what_a_batch_lacks(tiny_plan):
    """16 tokens a prototype, those of 2 samples from the batch, no more than the other cases have. Catches a queue of
    fixed size, and one that a validation or tokens of background fill."""
    plan = tiny_plan((24, 16))
    assert len(make_task(plan, places=100).queue.keys) == 16 * 50 - 2 * 100
    assert len(make_task(plan, places=100, num_cases=5).queue.keys) == 3 * 100
    assert len(make_task(plan, places=100, prototypes=12).queue.keys) == 0
    task = make_task(plan, places=100)
    views = task.views(make_batch(noise()), RANDOM, train=False)
    views["counted"][:, 50:] = False
    task.eval()(views)
    assert (task.queue.keys < 0).all()
    task.train()(views)
    assert (task.queue.keys >= 0).sum() == 3 * 50
    assert task.eval()(task.views(make_batch(noise()), RANDOM, train=True)).images is None  # as the monitor looks


class Means(nn.Module):
    """An encoder whose tokens are the means of their cells."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x, functional.avg_pool2d(x, 4)]


class Sign(nn.Module):
    """A head of two clusters: bright and dark."""

    def scores(self, embedded: torch.Tensor) -> torch.Tensor:
        return torch.cat([embedded[..., :1], -embedded[..., :1]], -1)

    embed = staticmethod(torch.clone)
    forward = scores


def test_pictures_show_what_both_views_say_of_the_same_place(tiny_plan):
    """Stripes, bright and dark, and a flat half: clusters are the stripes, and the second view, elsewhere and of
    another size, predicts them where they are. Catches a second view that is not carried into the first,
    and clusters where there is background."""
    task = make_task(tiny_plan((24, 16)), crop_scale=(0.6, 1), shift=0.3, prototypes=2, tokens_per_prototype=0).eval()
    task.encoder, task.head = Means(), Sign()
    stripes = (torch.arange(34) // 6 % 2 * 2.0 - 1)[:, None] + 0.2 * noise()
    stripes[:, :, :, 12:] = 0.5
    images = [task(task.views(make_batch(stripes), replace(RANDOM, step=n), train=False)).images for n in range(4)]
    first, assigned, predicted = (torch.cat([each[name] for each in images]) for name in images[0])
    assert not assigned.is_floating_point()
    assert set(assigned.unique().tolist()) == set(predicted.unique().tolist()) == {0, 1, 2}
    assert ((first > 0) == (assigned == 1))[assigned > 0].float().mean() > 0.75
    both = (assigned > 0) & (predicted > 0)
    assert both.float().mean() > 0.2
    assert (assigned == predicted)[both].float().mean() > 0.8


def test_scores_of_a_whole_view_tell_the_cluster_of_every_cell(tiny_plan):
    """Of an image whose cells are bright or dark on the mean. Catches cells in another order, and padding that is
    looked at."""
    task = make_task(tiny_plan((24, 16)), prototypes=2, tokens_per_prototype=0).eval()
    task.encoder, task.head = Means(), Sign()
    image = torch.randn(3, 1, 24, 16, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 1, 24, 16, dtype=torch.bool)
    valid[2, :, 12:] = False
    scores = task.scores(torch.where(valid, image, 1e4), valid)
    means = functional.avg_pool2d(image * valid, 4)[:, 0]
    assert torch.equal(scores.argmax(1), (means < 0).long())
    torch.testing.assert_close(scores[:, 0], means / task.config.temperature)


@pytest.mark.parametrize(
    "override",
    [
        "prototypes=1",
        "temperature=0",
        "freeze_share=1",
        "least_overlap=2",
        "crop_scale=[1,0.5]",
        "spatial.elastic=1",
    ],
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        PatchClusteringTrainer.configured([override])
