"""Cluster maps: the sample is stratified, voxels are between cells, and a file says all that a map takes."""

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_ext.downstream.clustering import (
    ModelMapper,
    cluster_map,
    drawn_voxels,
    fit_clusters,
    load_mapper,
    unfitted_clusters,
)
from nnssl_ext.downstream.features import FeatureMap, Place, prepare
from nnssl_ext.downstream.grids import Grid, coarser, image_grid
from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.imageio import Geometry
from nnssl_ext.models.cluster_model import ClusterModel, Origin, load_clusters, save_clusters
from nnssl_ext.planners.plan import Plan
from nnssl_ext.trainers.patch_clustering import PatchClusteringTrainer
from nnssl_ext.trainers.pixel_clustering import PixelClusteringTrainer

SHAPE = (4, 6, 8)
UNIT = Geometry(spacing=(1.0, 1.0, 1.0))


def scales(tmp_path, tiny_plan, size=(16, 24, 8), num_clusters: int = 3) -> tuple[ClusterModel, ModelMapper]:
    plan = tiny_plan(size)
    plan.save(tmp_path / "plans.json")
    model, origin = unfitted_clusters(
        None, (tmp_path / "plans.json", plan.configuration_names[0]), None, None, num_clusters
    )
    return model, ModelMapper(model, origin)


def feature_map(name: str, grid: Grid | None = None) -> FeatureMap:
    """Features (voxel number, 1) on the cells of a grid; one voxel in ten is altered, and one in five background."""
    rng = np.random.default_rng(0)
    known, inside = (torch.from_numpy(rng.random(SHAPE) < share) for share in (0.9, 0.8))
    grid = grid or image_grid(SHAPE)
    number = torch.arange(np.prod(grid.size)).view(grid.size).float()
    values = torch.stack([number, torch.ones(grid.size)]).half().numpy()
    place = Place(name, SHAPE, UNIT, image_grid(SHAPE), known, inside)
    cells = torch.ones(grid.size, dtype=torch.bool)
    return FeatureMap(place, values, cells, cells, grid)


def test_every_case_gives_as_many_voxels_all_of_foreground():
    """Catches a sample of large images alone, one with padding or background in it, and the same draw for all cases."""
    features = feature_map("a")
    allowed = set((features.place.known & features.place.foreground).flatten().nonzero().flatten().tolist())
    drawn = drawn_voxels(features, 50, seed=0)
    assert drawn.shape == (50, 2)
    assert len(set(drawn[:, 0].tolist())) == 50
    assert set(drawn[:, 0].tolist()) < allowed
    assert len(drawn_voxels(features, 10**6, seed=0)) == len(allowed)
    for other in (drawn_voxels(features, 50, seed=1), drawn_voxels(feature_map("b"), 50, seed=0)):
        assert not torch.equal(drawn, other)
    assert torch.equal(drawn, drawn_voxels(features, 50, seed=0))


def test_voxels_lie_between_cells():
    """Features are linear in the place of cells of 2x1x4 voxels; so they are in voxels, but beyond the outer cells.

    Catches cells taken whole, and axes or halves of a cell mixed up."""
    grid = coarser(image_grid(SHAPE), (2, 1, 4))
    z, y, x = (torch.arange(edge) for edge in SHAPE)
    depth = (((z - 0.5) / 2).clamp(0, 1) * 12)[:, None, None]
    across = ((x - 1.5) / 4).clamp(0, 1)
    expected = depth + (y * 2)[None, :, None] + across
    features = feature_map("a", grid)
    chosen = (features.place.known & features.place.foreground).flatten()
    found = drawn_voxels(features, 10**6, seed=0)
    torch.testing.assert_close(found[:, 0], expected.expand(SHAPE).flatten()[chosen].float(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [(16, 24, 8), (24, 16)], ids=["3d", "2d"])
def test_scales_are_those_of_the_whole_image(tmp_path, tiny_plan, size, monkeypatch):
    """Twice the patch, computed 5 slices at a time. Catches features of windows, which miss what lies beyond, and of
    slabs without their surroundings; planted once."""
    monkeypatch.setattr("nnssl_ext.downstream.clustering.SLICES_AT_ONCE", 5)
    model, mapper = scales(tmp_path, tiny_plan, size)
    image = np.random.default_rng(0).normal(size=(1, 20, 40, 30)).astype(np.float32)
    volume = prepare(mapper.frozen, image, UNIT, "a")
    found = torch.from_numpy(mapper.features(volume).values.astype(np.float32))
    rows = volume.data[None] if len(size) == 3 else volume.data.movedim(1, 0)
    expected = model.extractor(rows, torch.ones_like(rows, dtype=torch.bool))
    expected = expected[0] if len(size) == 3 else expected.movedim(0, 1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_a_map_is_told_at_every_voxel(tmp_path, tiny_plan):
    """Two clusters of one feature, which rises along the first axis over cells of 2 voxels: the border lies where the
    feature crosses the middle, between voxels, and not at a border of cells.

    Catches labels that are interpolated or repeated by cells, background that is mapped, and clusters from 0."""
    model, mapper = scales(tmp_path, tiny_plan, num_clusters=2)
    features = feature_map("a", coarser(image_grid(SHAPE), (2, 1, 1)))
    values = np.zeros((8, *features.grid.size), np.float16)
    values[0, 1] = 1
    features = FeatureMap(features.place, values, features.known, features.foreground, features.grid)
    model.clusters.centroids.zero_()
    model.clusters.centroids[:, 0] = torch.tensor([0.1, 1.1])
    labels = cluster_map(mapper, features, background=True)
    assert [set(row.tolist()) - {0} for row in labels.reshape(4, -1)] == [{1}, {1}, {2}, {2}]
    model.clusters.centroids[:, 0] = torch.tensor([-0.5, 0.9])
    labels = cluster_map(mapper, features, background=True)
    assert [set(row.tolist()) - {0} for row in labels.reshape(4, -1)] == [{1}, {2}, {2}, {2}]
    assert ((labels > 0) == features.place.known.numpy()).all()
    both = (features.place.known & features.place.foreground).numpy()
    assert ((cluster_map(mapper, features) > 0) == both).all()


def test_a_file_holds_all_that_a_map_takes_and_mapping_changes_nothing(tmp_path, tiny_plan):
    """Catches k-means that goes on with the image in hand: the order of images would matter."""
    model, mapper = scales(tmp_path, tiny_plan)
    images = [np.random.default_rng(seed).normal(size=(1, 16, 24, 8)).astype(np.float32) for seed in (0, 1)]
    features = [mapper.features(prepare(mapper.frozen, image, UNIT, "ab"[n])) for n, image in enumerate(images)]
    fit_clusters(model, [drawn_voxels(each, 50, seed=0) for each in features], seed=0)
    path = tmp_path / "clusters.pth"
    save_clusters(path, model, Origin("scales", mapper.frozen.plan, 0.05))
    before = path.read_bytes()
    loaded = load_mapper(path)
    maps = [cluster_map(loaded, each) for each in features]
    again = [cluster_map(load_mapper(path), each) for each in reversed(features)]
    assert all(map(np.array_equal, maps, reversed(again)))
    assert np.array_equal(maps[0], cluster_map(mapper, features[0]))
    assert set(np.unique(maps[0])) == {0, 1, 2, 3}
    assert path.read_bytes() == before
    assert loaded.frozen.configuration.patch_size == (16, 24, 8)


class Pool(nn.AvgPool3d):
    def __init__(self) -> None:
        super().__init__(2)


def test_a_module_by_name_gives_the_features_but_is_not_run_unasked(tmp_path, tiny_plan):
    plans = (tmp_path / "plans.json", "3d_fullres")
    tiny_plan().save(plans[0])
    model, origin = unfitted_clusters(None, plans, f"{__name__}:Pool", None, 3)
    image = np.random.default_rng(0).normal(size=(1, 16, 24, 8)).astype(np.float32)
    mapper = ModelMapper(model, origin)
    features = mapper.features(prepare(mapper.frozen, image, UNIT, "a"))
    assert features.values.shape == (1, 8, 12, 4)
    fit_clusters(model, [drawn_voxels(features, 50, seed=0)], seed=0)
    path = tmp_path / "clusters.pth"
    save_clusters(path, model, origin)
    with pytest.raises(ValueError, match="whose code would be run: allow it by"):
        load_clusters(path)
    assert load_clusters(path, f"{__name__}:Pool")[0].extractor.strides == ((2, 2, 2),)
    with pytest.raises(ValueError, match="give it as package"):
        unfitted_clusters(None, plans, "torch.nn:Nothing", None, 3)
    with pytest.raises(ValueError, match="it takes a map of whole strides"):
        unfitted_clusters(None, plans, "torch.nn:Flatten", None, 3)


def test_what_does_not_fit_is_refused(tmp_path, tiny_plan):
    plans = (tmp_path / "plans.json", "3d_fullres")
    tiny_plan().save(plans[0])
    for arguments, message in (
        ((None, None, None, None, 3), "give either --checkpoint FILE, or --plans FILE"),
        ((tmp_path / "c.pth", plans, None, None, 3), "give either --checkpoint FILE, or --plans FILE"),
        ((None, plans, None, None, 256), "--num_clusters 256 must lie between 2 and 255"),
        ((None, plans, None, 1, 3), "--level 1 is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            unfitted_clusters(*arguments)
    with pytest.raises(FileNotFoundError, match="make clusters by nnssl_cluster fit"):
        load_clusters(tmp_path / "no.pth")
    torch.save({"network_weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no clusters"):
        load_clusters(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match="is no file of nnssl_cluster"):
        load_clusters(tmp_path / "text.pth")


@pytest.mark.parametrize("trainer", [PatchClusteringTrainer, PixelClusteringTrainer])
@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_a_task_maps_images_by_what_it_has_learned(request, tmp_path, trainer, kind):
    """Of an image as large as the patch: each cell's probabilities are those of the task. Catches a head that the
    checkpoint lost or that is drawn anew, and a softmax over places."""
    plan = request.getfixturevalue(kind)()
    torch.manual_seed(5)
    recipe = trainer()
    task = recipe.build_task(plan.configuration("3d_fullres"), 4).eval()
    save_checkpoint(tmp_path / "final.pth", build_checkpoint(task, recipe, plan, content_hashes=[]))
    mapper = load_mapper(tmp_path / "final.pth")
    image = np.random.default_rng(0).normal(size=(1, 16, 24, 8)).astype(np.float32)
    volume = prepare(mapper.frozen, image, UNIT, "a")
    features = mapper.features(volume)
    with torch.no_grad():
        scores = task.scores(volume.data[None], torch.ones(1, 1, 16, 24, 8, dtype=torch.bool))[0]
    found = torch.from_numpy(features.values.astype(np.float32))
    torch.testing.assert_close(found, scores.softmax(0), atol=1e-3, rtol=0)
    assert len(found) == mapper.num_clusters
    likeliest = found.argmax(0)
    assert len(likeliest.unique()) > 1
    labels = cluster_map(mapper, features, background=True)
    if likeliest.shape == labels.shape:  # else borders lie between the middles of cells
        assert np.array_equal(labels, likeliest.numpy() + 1)


def test_features_are_upsampled_along_edges_where_asked(tmp_path, tiny_plan):
    """Catches a setting that is lost on the way to the file or to whole images."""
    plans = (tmp_path / "plans.json", "3d_fullres")
    tiny_plan().save(plans[0])
    model, origin = unfitted_clusters(None, plans, f"{__name__}:Pool", None, 3, "bilateral")
    save_clusters(tmp_path / "clusters.pth", model, origin)
    mapper = load_mapper(tmp_path / "clusters.pth", f"{__name__}:Pool")
    image = np.where(np.arange(8) < 5, -1, 1) + np.zeros((1, 16, 24, 8))
    volume = prepare(mapper.frozen, image.astype(np.float32), UNIT, "a")
    found = mapper.features(volume).values
    assert found.shape == (1, 16, 24, 8)
    assert np.array_equal(found[0] > 0, volume.data[0].numpy() > 0)


@pytest.mark.parametrize("size", [(16, 24, 8), (24, 16)], ids=["3d", "2d"])
def test_flat_air_is_background_and_dark_tissue_is_not(tmp_path, tiny_plan, size):
    """Flat air, dark tissue, and bright tissue that is flat in a part. Catches a rule that takes the darker tissue for
    background, as that of the fingerprint does, or what is flat, as texture alone does, and axes mixed up."""
    plan = tiny_plan(size)
    plan = Plan({**plan.raw, "transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]})
    plan.save(tmp_path / "plans.json")
    model, origin = unfitted_clusters(None, (tmp_path / "plans.json", plan.configuration_names[0]), None, None, 3)
    mapper = ModelMapper(model, origin)
    image = np.random.default_rng(0).normal(scale=20, size=(1, 30, 34, 28)).astype(np.float32)
    image[:, :, 20:] += 300
    image[:, 10:22, 24:, :16] = 320
    image[:, :, :, 20:] = -50
    foreground = mapper.prepare(image, UNIT, "a").place.foreground
    assert foreground.shape == (30, 34, 28)
    assert foreground[:, :, :20].all()
    assert not foreground[:, :, 22:].any()
