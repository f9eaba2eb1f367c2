from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnssl_ext.dataset.collection import CollectionImage, read_collection, write_collection
from nnssl_ext.dataset.manifest import Manifest, overlooked, write_dataset_json


def listed(folder: Path, *names: str, labels: tuple[str, ...] = (), channels: tuple[str, ...] = ("MRI",)) -> Path:
    for kind, files in (("imagesTr", names), ("labelsTr", labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / kind / name).touch()
    write_dataset_json(
        folder, channel_names=channels, file_ending=".nii.gz", num_cases=1, labels={"background": 0, "organ": 1}
    )
    return folder


def collection(**sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Upstream's schema with one patient `pat1`, whose sessions are given."""
    found = {key: {"session_id": key, "session_info": None, "images": images} for key, images in sessions.items()}
    subject = {"subject_id": "pat1", "subject_info": {"age": 3}, "sessions": found}
    dataset = {"dataset_index": 7, "name": "Hospital", "dataset_info": None, "subjects": {"pat1": subject}}
    return {"collection_index": 1, "collection_name": "Dataset001_X", "datasets": {"7": dataset}}


def test_cases_are_listed_by_file_name_with_their_channels_and_labels(tmp_path: Path) -> None:
    folder = listed(
        tmp_path / "Dataset001_X",
        *("b_0000.nii.gz", "b_0001.nii.gz", "a_b_0001.nii.gz", "a_b_0000.nii.gz", "._b_0000.nii.gz"),
        labels=("b.nii.gz",),
        channels=("T1", "T2"),
    )
    manifest = Manifest.load(folder)
    assert manifest.dataset_name == "Dataset001_X"
    assert manifest.channel_names == ("T1", "T2")
    assert manifest.labels == {"background": 0, "organ": 1}
    assert [case.case_id for case in manifest.cases] == ["a_b", "b"]
    first, second = manifest.cases
    assert [path.name for path in first.images] == ["a_b_0000.nii.gz", "a_b_0001.nii.gz"]
    assert first.label is None
    assert second.label == folder / "labelsTr" / "b.nii.gz"
    assert manifest.subjects() == {"a_b": "a_b", "b": "b"}
    assert manifest.case("b") == second
    with pytest.raises(ValueError, match=r"no case 'c'; it has 2, such as a_b, b"):
        manifest.case("c")


def test_a_channel_that_is_missing_keeps_its_place(tmp_path: Path) -> None:
    manifest = Manifest.load(listed(tmp_path / "D", "a_0001.nii.gz", channels=("T1", "T2")))
    assert [path.name for path in manifest.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_a_file_without_channel_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.nii\.gz does not end in a channel number"):
        Manifest.load(listed(tmp_path / "D", "a.nii.gz"))


def test_dataset_key_references_files_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANS", "/archive")
    folder = tmp_path / "Dataset001_X"
    entries = {
        "a": {"images": ["$SCANS/a.nii.gz", "../b.nii.gz"], "label": "labelsTr/a.nii.gz"},
        "b": {"images": ["${SCANS}/x y.nrrd"]},
    }
    write_dataset_json(folder, channel_names=["CT"], file_ending=".nii.gz", num_cases=2, dataset=entries)
    first, second = Manifest.load(folder).cases
    assert first.images == (Path("/archive/a.nii.gz"), tmp_path / "b.nii.gz")
    assert first.label == folder / "labelsTr" / "a.nii.gz"
    assert second.images == (Path("/archive/x y.nrrd"),)
    assert second.label is None
    monkeypatch.delenv("SCANS")
    with pytest.raises(ValueError, match="variable SCANS, which is not set"):
        Manifest.load(folder)


def test_nnunet_reads_the_same_files(tmp_path: Path) -> None:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = tmp_path / "Dataset001_X"
    entries = {"a": {"images": ["images/a.nii.gz"], "label": "labels/a.nii.gz"}}
    write_dataset_json(folder, channel_names=["CT"], file_ending=".nii.gz", num_cases=1, dataset=entries)
    theirs = get_filenames_of_train_images_and_targets(str(folder))
    case = Manifest.load(folder).cases[0]
    assert theirs == {"a": {"images": [str(case.images[0])], "label": str(case.label)}}


def test_regions(tmp_path: Path) -> None:
    folder = listed(tmp_path / "D", "a_0000.nii.gz")
    write_dataset_json(
        folder,
        channel_names=["T1"],
        file_ending=".nii.gz",
        num_cases=1,
        labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3)},
    )
    manifest = Manifest.load(folder)
    assert manifest.labels == {"background": 0, "whole": (1, 2, 3), "core": (2, 3)}
    assert manifest.label_values == {0, 1, 2, 3}


def test_relative_folder_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(tmp_path / "D", "a_0000.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert Manifest.load(Path("D")).cases[0].images == (tmp_path / "D" / "imagesTr" / "a_0000.nii.gz",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modality": {"0": "MRI"}}, r"lacks channel_names and file_ending.*nnssl_convert msd"),
        ({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}, "holds no cases: images are looked for as"),
        ({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "dataset": {}}, "'dataset' key .* is empty"),
        ({"channel_names": ["CT"], "file_ending": ".nii.gz"}, "'channel_names' must look like .* not .*CT"),
        ({"channel_names": {"0": "CT"}, "file_ending": 5}, "'file_ending' must look like"),
        (
            {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "labels": {"0": "background"}},
            '\'labels\' must look like {"background": 0}, not {"0": "background"}',
        ),
        (
            {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "dataset": {"a": {"image": "b"}}},
            "'dataset' must look like .*images",
        ),
    ],
)
def test_malformed_description(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


def test_what_is_overlooked_is_told(tmp_path: Path) -> None:
    """One image of another ending, one of another case of letters, and a number of cases that is not true."""
    folder = listed(
        tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nrrd", "d_0000.NII.GZ", ".e_0000.nrrd", "notes.txt"
    )
    number, unused = overlooked(Manifest.load(folder))
    assert "numTraining" in number
    assert "is 1, but 2 cases" in number
    assert "2 files" in unused
    assert "c_0000.nrrd" in unused
    assert overlooked(Manifest.load(listed(tmp_path / "whole", "a_0000.nii.gz"))) == []


def test_no_description(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither dataset.json nor pretrain_data.json.*nnssl_convert"):
        Manifest.load(tmp_path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json is not valid JSON"):
        Manifest.load(tmp_path)


def test_collection_alone_defines_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnssl_raw", "/archive")
    images = [
        {
            "name": "t1.nii.gz",
            "image_path": "$nnssl_raw/pat1/t1.nii.gz",
            "modality": "T1w",
            "associated_masks": {"anonymization_mask": "$nnssl_raw/pat1/face.nii.gz", "anatomy_mask": None},
        },
        {"name": "flair.v2.nii.gz", "image_path": "$nnssl_raw/pat1/f.nii.gz", "modality": "FLAIR"},
    ]
    content = collection(s1=images, s2=[{"name": "t1.nii.gz", "image_path": "t1.nii.gz", "modality": "T1w"}])
    (tmp_path / "pretrain_data.json").write_text(json.dumps(content))
    manifest = Manifest.load(tmp_path)
    ids = ["Hospital__pat1__s1__flair.v2", "Hospital__pat1__s1__t1", "Hospital__pat1__s2__t1"]
    assert [case.case_id for case in manifest.cases] == ids
    assert set(manifest.subjects().values()) == {"Hospital/pat1"}
    case = manifest.case(ids[1])
    assert case.images == (Path("/archive/pat1/t1.nii.gz"),)
    assert case.anonymization_mask == Path("/archive/pat1/face.nii.gz")
    assert (case.dataset, case.session, case.modalities) == ("Hospital", "s1", ("T1w",))
    assert manifest.case(ids[2]).images == (tmp_path / "t1.nii.gz",)
    assert manifest.channel_names == ("image",)  # two modalities in one channel
    assert manifest.labels is None
    assert manifest.file_ending == ".nii.gz"


def test_one_modality_names_the_channel(tmp_path: Path) -> None:
    content = collection(s1=[{"name": "a.nii.gz", "image_path": "a.nii.gz", "modality": "CT"}])
    (tmp_path / "pretrain_data.json").write_text(json.dumps(content))
    assert Manifest.load(tmp_path).channel_names == ("CT",)


def test_collection_adds_patients_to_the_files_of_dataset_json(tmp_path: Path) -> None:
    folder = listed(tmp_path / "D", "a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz")
    images = [
        {"name": "x", "image_path": str(folder / "imagesTr" / "a_0000.nii.gz"), "modality": "T1w"},
        {"name": "y", "image_path": "imagesTr/b_0000.nii.gz", "modality": "T2w"},
    ]
    (folder / "pretrain_data.json").write_text(json.dumps(collection(s1=images)))
    manifest = Manifest.load(folder)
    assert manifest.subjects() == {"a": "Hospital/pat1", "b": "Hospital/pat1", "c": "c"}
    assert [case.modalities for case in manifest.cases] == [("T1w",), ("T2w",), ("MRI",)]
    assert manifest.channel_names == ("MRI",)


def test_collection_of_other_files_is_refused(tmp_path: Path) -> None:
    folder = listed(tmp_path / "D", "a_0000.nii.gz")
    content = collection(s1=[{"name": "x", "image_path": "elsewhere.nii.gz", "modality": "T1w"}])
    (folder / "pretrain_data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="describes none of the images"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"datasets": {}}, "lists no image"),
        ({"datasets": {"1": {"subjects": {"a": {"sessions": {"b": {"images": [{"name": "c"}]}}}}}}}, "image_path"),
        ([1], "does not follow upstream's schema"),
        (collection(s=[{"name": "a", "image_path": "a"}, {"name": "a", "image_path": "b"}]), "lists 2 images as"),
    ],
)
def test_malformed_collection(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "pretrain_data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_collection(tmp_path / "pretrain_data.json")


def test_collection_round_trip(tmp_path: Path) -> None:
    images = [
        CollectionImage(dataset="A", subject="1", session="x", name="a.nii.gz", image_path="$R/a", modality="T1w"),
        CollectionImage(dataset="A", subject="1", session="y", name="a.nii.gz", image_path="b"),
        CollectionImage(dataset="B", subject="1", session="", name="c", image_path="c", anonymization_mask="m"),
    ]
    write_collection(tmp_path / "p.json", "Dataset001_X", images)
    assert read_collection(tmp_path / "p.json") == images
