"""Altered voxels (a removed face), from the raw mask to the loss: neither shown nor asked for, by any method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.random import SampleRandom
from nnssl_ext.dataset.collection import CollectionImage, write_collection
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.loading.batch import Batch
from nnssl_ext.loading.loader import PatchLoader
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.case import preprocess_array
from nnssl_ext.preprocessing.run import preprocess_dataset
from nnssl_ext.preprocessing.store import Store, write_case
from nnssl_ext.trainers.mae import MAETrainer
from nnssl_ext.trainers.simmim import SimMIMTrainer
from nnssl_ext.trainers.spark import SparkTrainer

PATCH = (16, 24, 24)
BOX = (slice(4, 9), slice(6, 15), slice(3, 12))
"""Of the raw volume; its first axis loses 2 slices to the crop to non-zero."""
RANDOM = SampleRandom(seed=1, step=0, samples=(0, 1))
METHODS = {
    "mae-cnn": (MAETrainer, "cnn", ["block_size=4"]),
    "mae-vit": (MAETrainer, "vit", []),
    "simmim": (SimMIMTrainer, "vit", []),
    "spark": (SparkTrainer, "cnn", []),
}


def plant_masks(manifest: Manifest, rubbish: float) -> Manifest:
    """Alters a box of every raw image and says so in `pretrain_data.json`."""
    images = []
    for case in manifest.cases:
        (path,) = case.images
        image = sitk.ReadImage(str(path))
        voxels, mask = sitk.GetArrayFromImage(image), np.zeros(image.GetSize()[::-1], np.uint8)
        mask[BOX] = 1
        name = f"mask_{case.case_id}.nii.gz"
        for array, target in ((np.where(mask, np.float32(rubbish), voxels), path), (mask, manifest.folder / name)):
            written = sitk.GetImageFromArray(array)
            written.CopyInformation(image)
            sitk.WriteImage(written, str(target))
        known = {"dataset": "d", "subject": case.case_id, "session": "s", "name": case.case_id}
        images.append(CollectionImage(**known, image_path=f"imagesTr/{path.name}", anonymization_mask=name))
    write_collection(manifest.folder / "pretrain_data.json", "Dataset001_Test", images)
    return Manifest.load(manifest.folder)


def preprocess(manifest: Manifest, plan: Plan, folder: Path) -> Store:
    with make_executor(0) as executor:
        return preprocess_dataset(manifest, plan, plan.configuration("3d_fullres"), folder, executor)


def load(store: Store) -> Batch:
    with PatchLoader(store, sorted(store.entries), PATCH, 2, seed=0) as loader:
        (batch,) = loader.batches(0, 1)
        return batch.to("cpu")


@pytest.fixture
def raw_plan(make_plan: Callable[..., Plan]) -> Plan:
    """Intensities and voxels as they are, so that altered values could be seen nowhere but in their own place."""
    return make_plan((1.0, 1.0, 1.0), schemes=("NoNormalization",), function="no_resampling_hack")


@pytest.fixture
def batches(make_dataset: Callable[..., Manifest], raw_plan: Plan, tmp_path: Path) -> tuple[Batch, Batch]:
    """The same crops of two stores, whose raw images differ under the masks."""
    manifest = make_dataset(num_cases=2)
    stores = [preprocess(plant_masks(manifest, value), raw_plan, tmp_path / str(value)) for value in (90.0, 150.0)]
    for store in stores:
        for entry in store.entries.values():
            inside = np.prod([5, 9, 9]) / np.prod(entry.shape)
            assert entry.altered_fraction == pytest.approx(inside)
    return load(stores[0]), load(stores[1])


def test_altered_voxels_are_loaded_as_padding(batches):
    """In their place, and nothing else is. Fault: the mask is kept in raw axes, or not cropped with the image."""
    batch, other = batches
    assert torch.equal(batch.lower, other.lower)
    assert torch.equal(batch.data, other.data)
    assert torch.equal(batch.valid, other.valid)
    for case, data, valid, lower in zip(batch.cases, batch.data, batch.valid, batch.lower, strict=True):
        grown = int(case[-1])
        volume = torch.zeros(PATCH, dtype=torch.bool)
        corner = [-int(low) for low in lower]
        size = (14 + grown - 2, 22 + grown - 3, 20 + grown)
        volume[tuple(slice(low, low + edge) for low, edge in zip(corner, size, strict=True))] = True
        raw = zip(corner, BOX, (2, 0, 0), strict=True)
        volume[tuple(slice(low + side.start - cut, low + side.stop - cut) for low, side, cut in raw)] = False
        assert torch.equal(valid[0], volume)
        assert not data[0][~volume].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "validation"])
def test_they_have_no_say_in_the_loss_and_are_not_asked_for(batches, tiny_plan, tiny_vit_plan, method, train):
    """Values under the mask change neither the loss nor its gradient, and where they are a prediction is free."""
    trainer, backbone, settings = METHODS[method]
    plan = {"cnn": tiny_plan, "vit": tiny_vit_plan}[backbone](PATCH)
    torch.manual_seed(0)
    task = trainer.configured(settings, backbone).build_task(plan.configuration("3d_fullres"), 4).eval()
    losses = []
    for batch in batches:
        rubbish = torch.where(batch.valid, batch.data, 1e4 * torch.randn_like(batch.data))
        views = task.views(replace(batch, data=rubbish), RANDOM, train)
        target = views["target"].clone().requires_grad_()
        losses.append(task({**views, "target": target}).loss)
        losses[-1].backward()
        assert torch.equal(target.grad != 0, views["hidden"] & views["valid"])
        if not train:
            assert torch.equal(views["valid"], batch.valid)
    assert torch.equal(*losses)


def test_the_mask_goes_where_the_image_goes(make_plan, make_image):
    """Transposed, cropped and resampled to the nearest voxel; no foreground is left under it; the intensities stay
    nnU-Net's. The plan halves the voxels of two axes, so each of the mask's becomes two."""
    plan = make_plan((1.0, 1.0, 1.0), transpose=(1, 0, 2))
    image, altered = make_image(0, (18, 20, 16))[None], np.zeros((18, 20, 16), dtype=bool)
    altered[BOX] = True
    configuration = plan.configuration("3d_fullres")
    result = preprocess_array(image, (2.0, 1.0, 2.0), plan, configuration, altered=altered)
    plain = preprocess_array(image, (2.0, 1.0, 2.0), plan, configuration)
    wanted = np.zeros((17, 16, 16), dtype=bool)
    wanted[6:15, 2:7, 3:12] = True
    assert result.altered is not None
    np.testing.assert_array_equal(result.altered, wanted.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_array_equal(result.data, plain.data)
    np.testing.assert_array_equal(result.foreground, plain.foreground & ~result.altered)
    assert (plain.foreground & result.altered).any()
    assert plain.altered is None


def test_a_box_of_the_mask_comes_back_and_costs_little(tmp_path: Path):
    data = np.random.default_rng(0).normal(size=(1, 70, 96, 80)).astype(np.float32)
    altered = np.zeros(data.shape[1:], dtype=bool)
    altered[10:40, :50, 20:70] = True
    entries = {}
    for name, mask in (("with", altered), ("empty", np.zeros_like(altered)), ("none", None)):
        entries[name] = write_case(tmp_path, name, data, {}, data[0] > 0, spacing=(1, 1, 1), altered=mask)
    store = Store(tmp_path, entries)
    found = store.altered("with", (5, 45, 60), (66, 52, 80))
    np.testing.assert_array_equal(found, altered[5:66, 45:52, 60:80])
    assert entries["with"].altered_fraction == pytest.approx(altered.mean())
    assert entries["with"].num_bytes - entries["none"].num_bytes < 4096
    assert (entries["empty"].altered_fraction, entries["none"].altered_fraction) == (0, 0)
    assert entries["empty"].checksum == entries["none"].checksum


def test_a_mask_of_another_shape_is_refused(make_plan, make_image):
    plan = make_plan()
    with pytest.raises(ValueError, match=r"anonymisation mask has shape \(18, 20, 15\), the image \(18, 20, 16\)"):
        altered = np.zeros((18, 20, 15), dtype=bool)
        preprocess_array(
            make_image(0, (18, 20, 16))[None], (1, 1, 1), plan, plan.configuration("3d_fullres"), altered=altered
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("Origin", (3.0, 0.0, 0.0)), ("Spacing", (1.0, 1.0, 2.0)), ("Direction", (-1, 0, 0, 0, -1, 0, 0, 0, 1))],
)
def test_a_mask_that_lies_elsewhere_is_refused(make_dataset, raw_plan, tmp_path: Path, setting, value):
    """Fault: only the shape is compared, and a face is left uncovered where the mask's header is wrong."""
    manifest = plant_masks(make_dataset(num_cases=1), 90.0)
    (case,) = manifest.cases
    mask = sitk.ReadImage(str(case.anonymization_mask))
    getattr(mask, f"Set{setting}")(value)
    sitk.WriteImage(mask, str(case.anonymization_mask))
    with pytest.raises(
        ValueError, match=r"mask_.* do not lie in the same place: .*Geometry\(.*the image's .*Geometry\("
    ):
        preprocess(manifest, raw_plan, tmp_path / "store")


def test_a_mask_that_was_replaced_is_noticed(make_dataset, raw_plan, tmp_path: Path):
    """Fault: the case counts as finished, and yesterday's face is shown on."""
    manifest = plant_masks(make_dataset(num_cases=1), 90.0)
    (before,) = preprocess(manifest, raw_plan, tmp_path / "store").entries.values()
    (case,) = manifest.cases
    assert case.anonymization_mask is not None
    mask = sitk.ReadImage(str(case.anonymization_mask))
    empty = sitk.Image(mask.GetSize(), sitk.sitkUInt8)
    empty.CopyInformation(mask)
    sitk.WriteImage(empty, str(case.anonymization_mask))
    (after,) = preprocess(manifest, raw_plan, tmp_path / "store").entries.values()
    assert before.altered_fraction > 0
    assert after.altered_fraction == 0
