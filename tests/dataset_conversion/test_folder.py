from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from dataset_conversion import folder as layout
from nnssl_ext.dataset.manifest import Manifest
from nnssl_ext.imageio import Geometry, read_image, write_image

GEOMETRY = Geometry(
    spacing=(2.0, 1.0, 0.5), origin=(3.0, 4.0, 5.0), direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
)


def scan(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(len(str(path))).normal(size=(4, 6, 5)).astype(np.float32)
    if path.suffix == ".mhd":
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
        return path
    lower = path.with_name(path.name.lower())
    write_image(voxels, GEOMETRY, lower)
    return lower.rename(path)


def convert(tmp_path: Path, **options: Any) -> Manifest:
    settings = {"dataset_id": 1, "name": "X", **options}
    (folder,) = layout.convert(tmp_path / "source", tmp_path / "raw", **settings)
    return Manifest.load(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    names = [
        "a.nii.gz",
        "b.nii",
        "deep/er/c.nrrd",
        "deep/d.mha",
        "e f/g,h.NRRD",
        "i.mhd",
        "._a.nii.gz",
        ".git/x.nii.gz",
    ]
    for name in names:
        scan(tmp_path / "source" / name)
    (tmp_path / "source" / "notes.txt").write_text("no image")
    return tmp_path / "source"


IDS = ["a", "b", "deep__d", "deep__er__c", "e_f__g_h", "i"]


def test_tree_is_referenced_in_place(tmp_path: Path, source: Path) -> None:
    manifest = convert(tmp_path)
    assert [case.case_id for case in manifest.cases] == IDS
    assert manifest.case("deep__er__c").images == (source / "deep" / "er" / "c.nrrd",)
    assert manifest.channel_names == ("image",)
    assert [path.name for path in manifest.folder.iterdir()] == ["dataset.json"]
    assert all(case.label is None for case in manifest.cases)
    assert manifest.subjects() == {case_id: case_id for case_id in IDS}


def test_copies_are_the_same_images_in_files_of_their_own(tmp_path: Path, source: Path) -> None:
    in_place, copied = convert(tmp_path), convert(tmp_path, dataset_id=2, copy=True)
    assert [case.case_id for case in copied.cases] == IDS
    for case in copied.cases:
        assert case.images[0].parent == copied.folder / "imagesTr"
        assert case.images[0].name.startswith(f"{case.case_id}_0000.")
        data, geometry = read_image(case.images)
        expected, there = read_image(in_place.case(case.case_id).images)
        np.testing.assert_array_equal(data, expected)
        assert geometry == there
    assert copied.case("i").images[0].suffix == ".mha"  # one file, not a header and its data


def test_copies_of_one_format_are_found_by_their_names(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b/c.nii.gz"):
        scan(tmp_path / "source" / name)
    manifest = convert(tmp_path, copy=True)
    assert "dataset" not in json.loads((manifest.folder / "dataset.json").read_text())
    assert sorted(path.name for path in (manifest.folder / "imagesTr").iterdir()) == [
        "a_0000.nii.gz",
        "b__c_0000.nii.gz",
    ]
    assert convert(tmp_path, copy=True) == manifest


def test_conversion_repeats_and_takes_in_what_is_new(tmp_path: Path, source: Path) -> None:
    convert(tmp_path)
    first = (tmp_path / "raw" / "Dataset001_X" / "dataset.json").read_bytes()
    convert(tmp_path)
    assert (tmp_path / "raw" / "Dataset001_X" / "dataset.json").read_bytes() == first
    scan(source / "new.nii.gz")
    assert len(convert(tmp_path).cases) == len(IDS) + 1


def test_names_that_would_be_alike_get_a_hash(tmp_path: Path) -> None:
    for name in ("a/b.nii.gz", "a/b.nrrd", "a__b.nii.gz", "c.nii.gz"):
        scan(tmp_path / "source" / name)
    manifest = convert(tmp_path)
    ids = [case.case_id for case in manifest.cases]
    assert len(set(ids)) == 4
    assert "c" in ids
    assert all(case_id.startswith("a__b_") for case_id in ids[:3])
    scan(tmp_path / "source" / "d.nii.gz")
    assert set(ids) < {case.case_id for case in convert(tmp_path).cases}


def test_bids_names_patients_and_sessions(tmp_path: Path) -> None:
    for name in ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/x.nii.gz", "sub-02/y.nii.gz"):
        scan(tmp_path / "source" / name)
    for copy, dataset_id in ((False, 1), (True, 2)):
        manifest = convert(tmp_path, modality="T1w", copy=copy, dataset_id=dataset_id)
        assert [case.subject for case in manifest.cases] == ["X/01", "X/01", "X/02"]
        assert [case.session for case in manifest.cases] == ["1", "2", ""]
        assert all(case.modalities == ("T1w",) for case in manifest.cases)


def test_patients_by_regular_expression(tmp_path: Path) -> None:
    for name in ("P7/a.nii.gz", "P7/b.nii.gz", "P8/a.nii.gz"):
        scan(tmp_path / "source" / name)
    assert [case.subject for case in convert(tmp_path, subject="([^/]+)/").cases] == ["X/P7", "X/P7", "X/P8"]
    assert [case.subject for case in convert(tmp_path, subject="P.").cases] == ["X/P7", "X/P7", "X/P8"]
    with pytest.raises(ValueError, match=r"--subject 'Q' is not found in P7/a\.nii\.gz"):
        convert(tmp_path, subject="Q")
    with pytest.raises(ValueError, match="no regular expression"):
        convert(tmp_path, subject="(")


def test_include_and_exclude(tmp_path: Path) -> None:
    for name in ("a_T1w.nii.gz", "b/b_T1w.nii.gz", "b/b_T2w.nii.gz", "c_T1w_seg.nii.gz"):
        scan(tmp_path / "source" / name)
    assert len(convert(tmp_path, include=["*T1w*"], exclude=["*_seg.*"]).cases) == 2
    assert [case.case_id for case in convert(tmp_path, include=["b/*"]).cases] == ["b__b_T1w", "b__b_T2w"]


@pytest.mark.parametrize("name", ["labelsTr/a.nii.gz", "x/Masks/a.nrrd", "a_seg.nii.gz", "sub-01_dseg.nii.gz"])
def test_label_maps_are_not_taken_for_images(tmp_path: Path, name: str) -> None:
    scan(tmp_path / "source" / "a.nii.gz")
    scan(tmp_path / "source" / name)
    with pytest.raises(ValueError, match="1 of 2 files look like label maps"):
        convert(tmp_path)
    assert len(convert(tmp_path, exclude=[name]).cases) == 1
    assert len(convert(tmp_path, include=["*.n*"]).cases) == 2  # asked for by name


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.tif")):
        Image.fromarray(np.full((6, 5), i, np.uint8)).save(tmp_path / "source" / name)
    manifest = convert(tmp_path)
    assert manifest.file_ending == ".png"
    assert read_image(manifest.case("c").images)[0].shape == (1, 1, 6, 5)


def test_links_are_followed(tmp_path: Path) -> None:
    scan(tmp_path / "archive" / "a.nii.gz")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "archive")
    assert [case.case_id for case in convert(tmp_path).cases] == ["linked__a"]


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert(tmp_path)
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image is left below .*looked for \.nii\.gz"):
        convert(tmp_path)
    assert not (tmp_path / "raw").exists()
