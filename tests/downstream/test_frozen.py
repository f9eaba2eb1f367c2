"""The encoder of a checkpoint is the one that was trained, and its cases are prepared with its plans."""

import numpy as np
import pytest
import torch

from nnssl_ext.core.random import seed_of
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.downstream.frozen import load_frozen, random_frozen
from nnssl_ext.downstream.labelled import read_labelled
from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.trainers.mae import MAETrainer
from tests.finetuning.conftest import write_raw


@pytest.mark.parametrize("kind", ["tiny_plan", "tiny_vit_plan"])
def test_a_checkpoint_gives_the_trained_encoder(request, kind, tmp_path):
    """A checkpoint whose keys were not matched would give the fresh encoder."""
    plan = request.getfixturevalue(kind)()
    configuration = plan.configuration("3d_fullres")
    trainer = MAETrainer.configured(["block_size=4"], configuration.backbone)
    torch.manual_seed(3)
    task = trainer.build_task(configuration, 4).eval()
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint(path, build_checkpoint(task, trainer, plan, content_hashes=[]))
    frozen = load_frozen(path)
    x = torch.randn(1, 1, *configuration.patch_size)
    assert frozen.configuration == configuration
    assert all(map(torch.equal, frozen.encoder.feature_maps(x), task.encoder.feature_maps(x)))
    assert not any(parameter.requires_grad for parameter in frozen.encoder.parameters())
    assert not frozen.encoder.training


def test_random_features_are_those_a_run_of_the_seed_starts_with(tiny_plan):
    plan = tiny_plan()
    configuration = plan.configuration("3d_fullres")
    torch.manual_seed(seed_of(5, "torch", "initialisation"))
    task = MAETrainer.configured(["block_size=4"]).build_task(configuration, 4)
    state = torch.random.get_rng_state()
    encoder = random_frozen(plan, configuration, 5).encoder
    assert all(map(torch.equal, encoder.parameters(), task.encoder.parameters()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_checkpoint_without_plans_is_refused(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth has no nnssl_plans"):
        load_frozen(tmp_path / "foreign.pth")


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_labels_follow_their_image(tiny_plan, tmp_path, axes):
    """Balls are brighter than anything else: fails where labels are not transposed, cropped or resampled alike."""
    manifest = Manifest.load(write_raw(tmp_path))
    plan = tiny_plan()
    plan.raw["transpose_forward"] = list(axes)
    plan.raw["transpose_backward"] = list(np.argsort(axes))
    configuration = plan.configuration("3d_fullres")
    (case,) = read_labelled(manifest, ["ball_2"], plan, configuration)
    raw_shape = np.array([14 * 1.5, 20, 18])[list(axes)]
    assert case.labels.shape == case.data.shape[1:] == tuple(np.round(raw_shape).astype(int))
    assert set(case.labels.unique().tolist()) == {0, 1, 2}
    inside, outside = case.data[0][case.labels > 0], case.data[0][case.labels == 0]
    assert inside.mean() - outside.mean() > 1.5
    bright = case.data[0] > (inside.mean() + outside.mean()) / 2
    overlap = 2 * (bright & (case.labels > 0)).sum() / (bright.sum() + (case.labels > 0).sum())
    assert overlap > 0.9


def test_ignored_voxels_are_unknown(tiny_plan, tmp_path):
    folder = write_raw(tmp_path)
    text = (folder / "dataset.json").read_text().replace('"small"', '"ignore"')
    (folder / "dataset.json").write_text(text)
    plan = tiny_plan()
    (case,) = read_labelled(Manifest.load(folder), ["ball_0"], plan, plan.configuration("3d_fullres"))
    assert set(case.labels.unique().tolist()) == {-1, 0, 1}


def test_a_case_without_labels_is_refused(tiny_plan, tmp_path):
    folder = write_raw(tmp_path)
    (folder / "labelsTr" / "ball_1.nii.gz").unlink()
    plan = tiny_plan()
    with pytest.raises(FileNotFoundError, match="ball_1"):
        read_labelled(Manifest.load(folder), ["ball_1"], plan, plan.configuration("3d_fullres"))
