"""Pixel-level clustering: labels are those of the whole image, move with it, and are never changed by a batch."""

from dataclasses import replace

import pytest
import torch

from nnssl_ext.core.random import SampleRandom
from nnssl_ext.loading.batch import Batch
from nnssl_ext.models.cluster_model import ClusterModel, Origin, save_clusters
from nnssl_ext.models.clusters import Clusters
from nnssl_ext.models.gaussian_scales import GaussianScales
from nnssl_ext.trainers.pixel_clustering import (
    PixelClustering,
    PixelClusteringConfig,
    PixelClusteringTrainer,
    put_back,
)
from nnssl_ext.views.crops import UNMOVED
from nnssl_ext.views.intensity import IntensityConfig
from nnssl_ext.views.spatial import SpatialConfig

RANDOM = SampleRandom(seed=3, step=5, samples=(10, 11, 12))
NOTHING = IntensityConfig(noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0, inverted_gamma=0)
NOISY = replace(NOTHING, noise=1.0, noise_std=(2.0, 2.0))
SIZE = (24, 16)


def make_task(plan, **settings) -> PixelClustering:
    torch.manual_seed(0)
    configuration = plan.configuration(plan.configuration_names[0])
    return PixelClustering(PixelClusteringConfig(**settings), configuration, 8)


def make_batch(task: PixelClustering, flat: bool = False, cases: tuple[str, ...] = ("a", "b", "c")) -> Batch:
    """Noise; the last crop is padded with rubbish, and with `flat` the far half of each has no texture."""
    crop = [round(edge * task.parent_scale) for edge in task.configuration.patch_size]
    data = torch.randn(3, 1, *crop, generator=torch.Generator().manual_seed(0))
    if flat:
        data[..., crop[-1] // 2 :] = -1
    valid = torch.ones(3, 1, *crop, dtype=torch.bool)
    valid[2, :, -6:] = False
    data = torch.where(valid, data, 1e4)
    dims = len(crop)
    return Batch(data, valid, cases, RANDOM.samples, torch.zeros(3, dims, dtype=torch.int64), torch.ones(3, dims))


class BySign(torch.nn.Module):
    """Two clusters, which every voxel tells by itself: dark and bright."""

    num_clusters = 2

    def __init__(self) -> None:
        super().__init__()
        self.clusters = Clusters(1, 2)

    def forward(self, image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return (image > 0).long()


@pytest.mark.parametrize("size", [(16, 24, 8), SIZE], ids=["3d", "2d"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "validation"])
def test_labels_move_with_the_image_and_are_those_of_the_clean_one(tiny_plan, size, train):
    """Flips alone, so that nothing is interpolated, and strong noise on the image. Catches labels that stay, are moved
    by themselves, or are made of the noisy image; and padding that is asked for."""
    task = make_task(tiny_plan(size), spatial=SpatialConfig(rotation=0, scaling=0), intensity=NOTHING)
    noisy = make_task(tiny_plan(size), spatial=SpatialConfig(rotation=0, scaling=0), intensity=NOISY)
    task.labels = noisy.labels = BySign()
    batch = make_batch(task)
    views, changed = (each.views(batch, RANDOM, train) for each in (task, noisy))
    asked = views["asked"]
    assert views["image"].shape[2:] == views["classes"].shape[2:] == size
    assert torch.equal((views["image"] > 0).long()[asked], views["classes"][asked])
    assert torch.equal(changed["classes"], views["classes"])
    assert torch.equal(changed["image"], views["image"]) is not train
    assert asked[:2].all()
    assert not (asked & ~views["valid"]).any()
    assert (views["image"].abs() < 100).all()


def test_labels_turn_and_shrink_with_the_image(tiny_plan):
    """Broad stripes, turned and scaled: all but their borders keep their label. Catches labels that only flip."""
    task = make_task(tiny_plan(SIZE), spatial=SpatialConfig(rotation=1, scaling=1), intensity=NOTHING)
    task.labels = BySign()
    batch = make_batch(task)
    rows = torch.arange(batch.data.shape[2]) // 6 % 2 * 2.0 - 1
    batch = replace(batch, data=(rows.view(1, 1, -1, 1) + 0.2 * batch.data) * batch.valid)
    for step in range(3):
        views = task.views(batch, replace(RANDOM, step=step), train=True)
        same = (views["image"] > 0).long() == views["classes"]
        assert same[views["asked"]].float().mean() > 0.9


def test_labels_are_those_of_the_whole_image(tiny_plan):
    """A crop with a border as wide as the Gaussians reach is labelled as the whole image is. Catches labels made of the
    patch alone, which at its border miss what lies beyond (planted once)."""
    task = make_task(tiny_plan(SIZE), border=GaussianScales.reach, spatial=UNMOVED, intensity=NOTHING)
    batch = make_batch(task)
    whole = torch.randn(1, 1, 90, 90, generator=torch.Generator().manual_seed(1))
    task.labels.clusters.fit(
        task.labels.features(whole, torch.ones_like(whole, dtype=torch.bool))[0].flatten(1).T[::20], 0
    )
    labels = task.labels(whole, torch.ones_like(whole, dtype=torch.bool))
    height, width = batch.data.shape[2:]
    batch = replace(batch, data=whole[..., 7 : 7 + height, 9 : 9 + width].expand(3, 1, -1, -1))
    batch = replace(batch, valid=torch.ones_like(batch.valid))
    views = task.views(batch, RANDOM, train=True)
    top, left = 7 + (height - 24) // 2, 9 + (width - 16) // 2
    assert torch.equal(views["classes"][0, 0], labels[0, 0, top : top + 24, left : left + 16])


def test_background_takes_no_part(tiny_plan):
    """Half of each image is flat, but for the border of the texture. Catches air in the loss, also where it lies beside
    padding, and in the sample that clusters are found in."""
    task = make_task(tiny_plan(SIZE), spatial=UNMOVED, intensity=NOTHING, per_case=60, num_clusters=3)
    batch = make_batch(task, flat=True)
    views = task.views(batch, RANDOM, train=True)
    assert 0.3 < views["asked"][:2].float().mean() < 0.75
    assert (views["asked"] & (views["image"] == -1)).sum(-1).max() == 2
    foreground = task._foreground(torch.where(batch.valid, batch.data, 0), batch.valid)
    assert not foreground[..., foreground.shape[-1] // 2 + 2 :].any()
    seen = []
    task.labels.clusters.fit = lambda sample, seed: seen.append(sample)
    task.begin([(batch, RANDOM)])
    assert len(seen[0]) == 180
    assert (seen[0][:, 0] == -1).float().mean() < 0.2
    assert (seen[0].abs() < 100).all()


def test_clusters_are_found_once_in_as_many_voxels_of_every_case(tiny_plan):
    """Catches a case that counts twice because it was shown twice, clusters that depend on the network's seed, and
    clusters that a step or a validation changes."""
    task = make_task(tiny_plan(SIZE), per_case=50, num_clusters=4)
    seen = []
    fit = task.labels.clusters.fit
    task.labels.clusters.fit = lambda sample, seed: (seen.append(sample), fit(sample, seed))
    batches = [(make_batch(task), RANDOM), (make_batch(task, cases=("b", "d", "a")), replace(RANDOM, step=6))]
    task.begin(batches)
    assert len(seen[0]) == 4 * 50
    state = {name: value.clone() for name, value in task.labels.state_dict().items()}
    torch.manual_seed(9)
    other = PixelClustering(task.config, task.configuration, 8)
    other.begin(batches)
    assert all(torch.equal(value, state[name]) for name, value in other.labels.state_dict().items())
    for train in (True, False):
        views = task.train(train).views(make_batch(task), RANDOM, train)
        assert len(views["classes"][views["asked"]].unique()) == 4
        task(views)
        task.after_step(0, 10)
    assert all(torch.equal(value, state[name]) for name, value in task.labels.state_dict().items())
    assert not task.labels.training
    assert not any(parameter.requires_grad for parameter in task.labels.parameters())


def test_ranks_find_the_clusters_that_one_process_finds(tiny_plan, monkeypatch):
    """The second rank's rows are recorded, and put after the first one's. Catches a rank that fits to its own cases."""
    plan = tiny_plan(SIZE)
    task = make_task(plan, per_case=50)
    batch = make_batch(task)
    halves = [
        (
            replace(batch, **{name: getattr(batch, name)[rows] for name in ("data", "valid", "cases", "samples")}),
            replace(RANDOM, samples=RANDOM.samples[rows]),
        )
        for rows in (slice(0, 2), slice(2, 3))
    ]
    samples, others = [], []

    def begin(batches, gather):
        monkeypatch.setattr("nnssl_ext.trainers.pixel_clustering.all_rows", gather)
        task.labels.clusters.fit = lambda sample, seed: samples.append(sample)
        task.begin(batches)

    begin([(batch, RANDOM)], torch.Tensor.detach)
    begin([halves[1]], lambda rows: others.append(rows) or rows)
    begin([halves[0]], lambda rows: torch.cat([rows, others.pop(0)]))
    assert torch.equal(samples[2], samples[0])
    assert len(samples[1]) < len(samples[0])


def test_swapped_views_predict_each_others_labels(tiny_plan):
    """Stripes, of two views that are turned and of different sizes: what one is asked for is what the other shows
    there. Catches a view that is asked for its own labels, and labels beyond the intersection."""
    task = make_task(tiny_plan(SIZE), swapped=True, crop_scale=(0.6, 1), shift=0.3, intensity=NOTHING)
    task.labels = BySign()
    batch = make_batch(task)
    rows = torch.arange(batch.data.shape[2]) // 6 % 2 * 2.0 - 1
    batch = replace(batch, data=(rows.view(1, 1, -1, 1) + 0.2 * batch.data) * batch.valid)
    asked = agreeing = 0.0
    for step in range(4):
        views = task.views(batch, replace(RANDOM, step=step), train=step % 2 == 0)
        assert len(views["image"]) == 6
        same = (views["image"] > 0).long() == views["classes"]
        asked += views["asked"].float().mean().item() / 4
        agreeing += same[views["asked"]].float().mean().item() / 4
    assert 0.3 < asked < 0.95
    assert 0.85 < agreeing < 1


def test_a_file_of_clusters_serves_in_place_of_a_fit(tiny_plan, tmp_path):
    """A checkpoint's features as well as Gaussian scales. Catches clusters of images that were prepared otherwise, and
    a file's path in the checkpoint's recipe."""
    from nnssl_ext.engine.checkpoint import build_checkpoint

    plan = tiny_plan(SIZE)
    configuration = plan.configuration("2d")
    encoder = make_task(plan).encoder
    for extractor, source in ((encoder, "checkpoint"), (GaussianScales(2, 1), "scales")):
        model = ClusterModel(extractor, Clusters(extractor.channels[0], 3))
        save_clusters(tmp_path / "clusters.pth", model, Origin(source, plan, 0.05))
        trainer = PixelClusteringTrainer.configured([f"clustering={tmp_path / 'clusters.pth'}", "num_clusters=3"])
        task = trainer.build_task(configuration, 4)
        assert task.first_look == 0
        batch = make_batch(task)
        image = torch.where(batch.valid, batch.data, 0)
        assert torch.equal(task.labels(image, batch.valid), model(image, batch.valid))
        assert torch.isfinite(task(task.views(batch, RANDOM, train=True)).loss)
    checkpoint = build_checkpoint(task, trainer, plan, content_hashes=[])
    assert checkpoint["nnssl_pretraining"]["recipe"]["task_config"]["clustering"] is None
    assert str(tmp_path) not in str(checkpoint["nnssl_pretraining"]["recipe"])
    with pytest.raises(ValueError, match="add --set num_clusters=3"):
        make_task(plan, clustering=tmp_path / "clusters.pth")
    coarse = replace(configuration, spacing=(2.0, 2.0))
    with pytest.raises(ValueError, match="with spacing"):
        PixelClustering(trainer.task_config, coarse, 4)


def test_tokens_go_back_to_their_places():
    """Catches tokens in another order, and what fills up the end taken for a token."""
    tokens = torch.tensor([[[1.0], [2.0], [9.0]], [[3.0], [4.0], [5.0]]])
    kept = torch.tensor([[0, 2, -1], [1, 2, 3]])
    expected = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]]], [[[0.0, 3.0], [4.0, 5.0]]]])
    assert torch.equal(put_back(tokens, kept, (2, 2)), expected)


def test_pictures_show_the_clusters_where_there_are_any(tiny_plan):
    task = make_task(tiny_plan(SIZE)).eval()
    batch = make_batch(task, flat=True)
    views = task.views(batch, RANDOM, train=False)
    images = task(views).images
    assert list(images) == ["input", "assignment", "prediction"]
    assert torch.equal(images["assignment"], (views["classes"] + 1) * views["asked"])
    assert torch.equal(images["prediction"] > 0, views["asked"])
    assert not images["assignment"].is_floating_point()


@pytest.mark.parametrize(
    "override",
    ["num_clusters=1", "per_case=0", "border=-1", "weight_limits=[2,1]", "shift=1", "crop_scale=[1,0.5]"],
)
def test_impossible_settings_are_refused(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        PixelClusteringTrainer.configured([override])
    with pytest.raises(ValueError, match="elastic"):
        PixelClusteringTrainer.configured(["swapped=true", "spatial.elastic=1"])
