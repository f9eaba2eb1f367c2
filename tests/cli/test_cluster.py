"""The command `nnssl_cluster`, from files to files."""

import numpy as np
import pytest

from nnssl_ext.cli.cluster import main
from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.imageio import read_segmentation, write_image
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.pixel_clustering import PixelClusteringTrainer
from tests.downstream.test_grids import OBLIQUE


def run(*arguments) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as status:
        return int(status.code or 0)
    return 0


@pytest.fixture
def scans(tmp_path, tiny_plan):
    """Two oblique images of air, a large organ and a bright one in it; and a plan."""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (12, 40, 20)), ("b", (14, 42, 24))):
        image = rng.normal(0, 2, shape).astype(np.float32)
        image[2:10, 5:35, 3:18] += 100
        image[3:9, 10:25, 6:14] += 200
        write_image(image, OBLIQUE, tmp_path / f"{name}.nii.gz")
    tiny_plan().save(tmp_path / "plans.json")
    return tmp_path


def checkpoint(folder, plan, trainer):
    task = trainer.build_task(plan.configuration("3d_fullres"), 4).eval()
    save_checkpoint(folder / "final.pth", build_checkpoint(task, trainer, plan, content_hashes=[]))
    return folder / "final.pth"


def test_planted_organs_come_out_in_the_images_geometry(scans, capsys):
    """By Gaussian scales. Catches maps on the grid of the plan, shifted, or of clusters that differ between images."""
    a, b, out = scans / "a.nii.gz", scans / "b.nii.gz", scans / "clusters.pth"
    assert run("fit", a, b, "--plans", scans / "plans.json", "--num_clusters", 3, "-o", out) == 0
    assert "3 clusters of 400 voxels of 2 images" in capsys.readouterr().out
    assert run("predict", out, a, b, "-o", scans / "maps") == 0
    names = set()
    for name in "ab":
        labels, geometry = read_segmentation(scans / "maps" / f"{name}_clusters.nii.gz")
        assert geometry.same_place(OBLIQUE)
        inner = labels[4:8, 12:23, 8:12]
        (label, count) = max(zip(*np.unique(inner, return_counts=True), strict=True), key=lambda pair: pair[1])
        assert count > 0.7 * inner.size
        assert (labels[4:8, 27:33, 5:16] == label).mean() < 0.1
        assert (labels == label).sum() < 2.5 * 6 * 15 * 8
        names.add(int(label))
        assert (scans / "maps" / f"{name}_clusters.png").read_bytes().startswith(b"\x89PNG")
    assert len(names) == 1


def test_a_checkpoint_gives_the_features_and_is_not_asked_for_again(scans, tiny_plan, capsys):
    path = checkpoint(scans, tiny_plan(), MAETrainer.configured(["block_size=4"]))
    a, out = scans / "a.nii.gz", scans / "clusters.pth"
    assert run("fit", a, "--checkpoint", path, "--num_clusters", 4, "-o", out) == 0
    path.unlink()
    assert run("predict", out, a, "-o", scans / "maps") == 0
    labels, _ = read_segmentation(scans / "maps" / "a_clusters.nii.gz")
    assert labels.shape == (12, 40, 20)
    assert set(np.unique(labels).tolist()) == {0, 1, 2, 3, 4}
    capsys.readouterr()
    for arguments, message in (
        (("fit", a, "-o", out), "give either --checkpoint FILE, or --plans FILE"),
        (("fit", a, "--plans", scans / "plans.json", "--per_case", 0, "-o", out), "--per_case 0 must be 1 or more"),
        (("predict", out, a, a), "several images are called a"),
        (("predict", scans / "none.pth", a), "make clusters by nnssl_cluster fit"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_maps_images_by_the_clusters_it_has_learned_if_any(scans, tiny_plan, capsys):
    path = checkpoint(scans, tiny_plan(), PixelClusteringTrainer())
    assert run("predict", path, scans / "a.nii.gz", "-o", scans) == 0
    labels, geometry = read_segmentation(scans / "a_clusters.nii.gz")
    assert geometry.same_place(OBLIQUE)
    assert labels.shape == (12, 40, 20)
    assert f"{len(np.unique(labels)) - 1} of 10 clusters" in capsys.readouterr().out
    path = checkpoint(scans, tiny_plan(), MAETrainer.configured(["block_size=4"]))
    assert run("predict", path, scans / "a.nii.gz") == 2
    assert "is a checkpoint of MAETrainer that predicts no clusters" in capsys.readouterr().err
