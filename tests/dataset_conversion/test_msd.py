from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from dataset_conversion import Dataset004_Hippocampus, msd
from nnssl_ext.dataset import raw_writer
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.imageio import Geometry, read_image, write_image

GEOMETRY = Geometry(
    spacing=(2.0, 1.0, 0.5), origin=(3.0, 4.0, 5.0), direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
)
SHAPE = (4, 6, 5)


def make_source(folder: Path, num_cases: int = 6, channels: tuple[str, ...] = ("MRI",), num_test: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    names = [f"brain_{i:03d}.nii.gz" for i in range(num_cases + num_test)]
    for i, name in enumerate(names):
        kind = "imagesTr" if i < num_cases else "imagesTs"
        if len(channels) == 1:
            write_image(rng.normal(size=SHAPE).astype(np.float32), GEOMETRY, folder / kind / name)
        else:
            volumes = rng.integers(0, 999, (len(channels), *SHAPE)).astype(np.int16)
            image = sitk.GetImageFromArray(volumes, isVector=False)
            image.SetSpacing((0.5, 1.0, 2.0, 1.0))
            sitk.WriteImage(image, str(folder / kind / name))
        if i < num_cases:
            write_image(rng.integers(0, 3, SHAPE).astype(np.uint8), GEOMETRY, folder / "labelsTr" / name)
    describe(
        folder,
        name="Brain tumours",
        modality={str(i): name for i, name in enumerate(channels)},
        labels={"1": "edema", "0": "background", "2": "core"},
        training=[{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names[:num_cases]],
        test=[f"./imagesTs/{n}" for n in names[num_cases:]],
        licence="CC-BY-SA 4.0",
    )
    return folder


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_images_and_labels_become_a_raw_dataset(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_BrainTumour", num_test=2)
    (folder,) = msd.convert(source, tmp_path / "raw", dataset_id=4)
    assert folder == tmp_path / "raw" / "Dataset004_BrainTumour"
    manifest = Manifest.load(folder)
    assert manifest.channel_names == ("MRI",)
    assert manifest.labels == {"background": 0, "edema": 1, "core": 2}
    assert len(manifest.cases) == 6
    case = manifest.case("brain_003")
    assert case.label is not None
    assert case.label.read_bytes() == (source / "labelsTr" / "brain_003.nii.gz").read_bytes()
    assert case.images[0].read_bytes() == (source / "imagesTr" / "brain_003.nii.gz").read_bytes()
    names = sorted(path.name for path in (folder / "imagesTs").iterdir())
    assert names == ["brain_006_0000.nii.gz", "brain_007_0000.nii.gz"]
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 6
    assert description["licence"] == "CC-BY-SA 4.0"


def test_nnunet_accepts_the_dataset(tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    source = make_source(tmp_path / "Task01_BrainTumour", num_cases=3)
    (folder,) = msd.convert(source, tmp_path / "raw", dataset_id=4)
    verify_dataset_integrity(str(folder), num_processes=1)


def test_volumes_of_a_4d_image_become_channels_where_they_were(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_X", num_cases=2, channels=("FLAIR", "T1w", "CT"))
    (folder,) = msd.convert(source, tmp_path / "raw", dataset_id=4)
    manifest = Manifest.load(folder)
    assert manifest.channel_names == ("FLAIR", "T1w", "CT")
    case = manifest.case("brain_001")
    data, geometry = read_image(case.images)
    expected, _ = read_image([source / "imagesTr" / "brain_001.nii.gz"])
    np.testing.assert_array_equal(data, expected)
    assert geometry.spacing == (2.0, 1.0, 0.5)
    assert sitk.ReadImage(str(case.images[2])).GetPixelID() == sitk.sitkInt16


def test_unlabelled_cases_go_to_the_second_dataset_and_nowhere_else(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=10, num_test=1)
    folders = msd.convert(source, tmp_path / "raw", dataset_id=4, unlabelled=6, unlabelled_dataset=1)
    labelled, unlabelled = map(Manifest.load, folders)
    assert unlabelled.dataset_name == "Dataset001_BrainUnlabelled"
    assert len(labelled.cases) == 4
    assert len(unlabelled.cases) == 6
    assert not set(labelled.subjects()) & set(unlabelled.subjects())
    assert all(case.label is None for case in unlabelled.cases)
    assert unlabelled.labels == {"background": 0}
    assert not (folders[1] / "labelsTr").exists()
    assert len(list((folders[0] / "labelsTr").iterdir())) == 4
    assert json.loads((folders[1] / "dataset.json").read_text())["nnssl_draw"] == {"unlabelled": 6, "seed": 0}


def test_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=12)
    images = {path.name: path for path in (source / "imagesTr").iterdir()}
    drawn = [msd.draw_unlabelled(dict(order), 6, seed) for seed in range(4) for order in (images.items(),)]
    assert len(set(drawn)) == 4
    assert msd.draw_unlabelled(dict(reversed(images.items())), 6, 2) == drawn[2]
    assert set(msd.draw_unlabelled(images, 3, 2)) < set(drawn[2])


def test_copies_of_one_file_are_never_on_both_sides(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=8)
    for copy, original in ((1, 0), (5, 4), (7, 4)):
        files = [source / "imagesTr" / f"brain_{i:03d}.nii.gz" for i in (original, copy)]
        files[1].write_bytes(files[0].read_bytes())
    images = {path.name[6:9]: path for path in (source / "imagesTr").iterdir()}
    for seed in range(20):
        drawn = set(msd.draw_unlabelled(images, 4, seed))
        assert ("000" in drawn) == ("001" in drawn)
        assert ("004" in drawn) == ("005" in drawn) == ("007" in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabelled": 3}, "belong together"),
        ({"unlabelled_dataset": 3}, "belong together"),
        ({"unlabelled": 6, "unlabelled_dataset": 1}, "6 unlabelled cases are not possible: there are 6"),
        ({"unlabelled": 2, "unlabelled_dataset": 4}, "both datasets would have id 4"),
        ({"name": "a b"}, "not allowed"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = make_source(tmp_path / "Task01_Brain")
    with pytest.raises(ValueError, match=message):
        msd.convert(source, tmp_path / "raw", dataset_id=4, **options)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "lists no training case"),
        ({"training": [{"image": "imagesTr/a.nrrd", "label": "labelsTr/a.nii.gz"}]}, "one file ending"),
        ({"training": [{"image": "x/a.nii.gz", "label": "a.nii.gz"}] * 2}, "2 training cases with 1 different names"),
        ({"modality": {"0": "A", "1": "B"}}, r"holds 1 volume\(s\), dataset.json names 2 channels"),
    ],
)
def test_malformed_source(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = make_source(tmp_path / "Task01_Brain")
    describe(source, **changes)
    with pytest.raises(ValueError, match=message):
        msd.convert(source, tmp_path / "raw", dataset_id=4)
    assert not list((tmp_path / "raw").rglob("dataset.json"))


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nnssl_convert folder"):
        msd.convert(tmp_path, tmp_path / "raw", dataset_id=4)
    (tmp_path / "dataset.json").write_text('{"channel_names": {}}')
    with pytest.raises(ValueError, match="lacks modality, labels, training"):
        msd.convert(tmp_path, tmp_path / "raw", dataset_id=4)


def test_missing_files_are_named_before_any_is_copied(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain")
    (source / "labelsTr" / "brain_002.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 12 files do not exist: .*labelsTr/brain_002"):
        msd.convert(source, tmp_path / "raw", dataset_id=4)
    assert not (tmp_path / "raw").exists()


def test_interrupted_conversion_is_completed_by_repeating_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=5, channels=("A", "B"))
    options: dict[str, Any] = {"dataset_id": 4, "unlabelled": 2, "unlabelled_dataset": 1}
    msd.convert(source, tmp_path / "undisturbed", **options)
    written = 0
    write = raw_writer.write_image

    def interrupted(voxels: np.ndarray, geometry: Geometry, path: Path) -> None:
        nonlocal written
        written += 1
        if written == 6:
            (path.parent / f".tmp-{path.name}").write_bytes(b"half a file")  # what kill -9 leaves
            raise KeyboardInterrupt
        write(voxels, geometry, path)

    monkeypatch.setattr(raw_writer, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        msd.convert(source, tmp_path / "raw", **options)
    assert not list((tmp_path / "raw").rglob("dataset.json"))
    msd.convert(source, tmp_path / "raw", **options)
    assert tree(tmp_path / "raw") == tree(tmp_path / "undisturbed")
    before = written
    msd.convert(source, tmp_path / "raw", **options)
    assert written == before  # everything is there: nothing is written again
    assert tree(tmp_path / "raw") == tree(tmp_path / "undisturbed")


def test_half_a_split_image_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=2, channels=("A", "B"))
    (folder,) = msd.convert(source, tmp_path / "raw", dataset_id=4)
    complete = tree(folder)
    (folder / "imagesTr" / "brain_001_0001.nii.gz").unlink()
    msd.convert(source, tmp_path / "raw", dataset_id=4)
    assert tree(folder) == complete


def test_changed_source_is_copied_again(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=2)
    (folder,) = msd.convert(source, tmp_path / "raw", dataset_id=4)
    image = source / "imagesTr" / "brain_000.nii.gz"
    write_image(np.ones(SHAPE, np.float32), GEOMETRY, image)
    msd.convert(source, tmp_path / "raw", dataset_id=4)
    assert (folder / "imagesTr" / "brain_000_0000.nii.gz").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(("number", "seed"), [(2, 0), (5, 0), (3, 1)])
def test_other_settings_do_not_mix_with_what_is_there(tmp_path: Path, number: int, seed: int) -> None:
    source = make_source(tmp_path / "Task01_Brain", num_cases=9)
    raw = tmp_path / "raw"
    msd.convert(source, raw, dataset_id=4, unlabelled=3, unlabelled_dataset=1)
    before = tree(raw)
    with pytest.raises(ValueError, match=r"would not write: imagesTr/brain_.*remove the folder"):
        msd.convert(source, raw, dataset_id=4, unlabelled=number, unlabelled_dataset=1, seed=seed)
    assert tree(raw) == before


def test_somebody_elses_dataset_is_left_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "Task01_Brain")
    theirs = tmp_path / "raw" / "Dataset004_Brain"
    theirs.mkdir(parents=True)
    (theirs / "dataset.json").write_text('{"channel_names": {"0": "MRI"}}')
    with pytest.raises(ValueError, match="exists and was not made by nnssl_convert"):
        msd.convert(source, tmp_path / "raw", dataset_id=4)
    with pytest.raises(ValueError, match=r"id 4 is taken by .*Dataset004_Brain.*name it 'Brain' with --name"):
        msd.convert(source, tmp_path / "raw", dataset_id=4, name="Other")


@pytest.mark.real_data
def test_hippocampus_by_its_own_module(real_data: Path, tmp_path: Path) -> None:
    (folder,) = Dataset004_Hippocampus.convert(real_data / "Task04_Hippocampus", tmp_path)
    manifest = Manifest.load(folder)
    assert manifest.dataset_name == "Dataset004_Hippocampus"
    assert len(manifest.cases) == 130
    assert manifest.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert all(case.label is not None for case in manifest.cases)
