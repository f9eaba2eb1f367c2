import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.core.executor import InlineExecutor, make_executor
from nnssl_ext.dataset.integrity import read_checked
from nnssl_ext.dataset.manifest import Manifest, write_dataset_json
from nnssl_ext.fingerprint.extract import JOURNAL_FILE, extract_fingerprint
from nnssl_ext.fingerprint.record import FINGERPRINT_FILE, Fingerprint


class CountingExecutor(InlineExecutor):
    """Remembers which cases it was given."""

    def __init__(self):
        self.keys: list[str] = []

    def run(self, function, tasks):
        self.keys += tasks
        return super().run(function, tasks)


def volume(seed, shape=(12, 16, 14)):
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, dtype=np.float32)
    image[2:-2, 3:-3, 3:-3] = rng.normal(100, 10, image[2:-2, 3:-3, 3:-3].shape)
    return image


def write(path: Path, array, spacing=(1.0, 1.5, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "Dataset001_Boxes"
    for number in range(4):
        write(folder / "imagesTr" / f"case{number}_0000.mha", volume(number))
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".mha", num_cases=4)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "preprocessed"


def extract(raw, out, executor=None):
    return extract_fingerprint(Manifest.load(raw), out, executor or InlineExecutor())


def test_cases_are_measured(raw, out):
    fingerprint = extract(raw, out)
    assert list(fingerprint.cases) == ["case0", "case1", "case2", "case3"]
    case = fingerprint.cases["case2"]
    assert case.shape == (12, 16, 14)
    assert case.shape_after_crop == (8, 10, 8)
    assert case.spacing == (3.0, 1.5, 1.0)
    assert case.foreground_fraction == pytest.approx(640 / 2688, abs=0.01)
    statistics = case.intensities[0]
    assert statistics is not None
    assert statistics.mean == pytest.approx(100, abs=2)
    assert fingerprint.foreground_intensity_properties_per_channel["0"].mean == pytest.approx(100, abs=1)
    assert fingerprint.median_relative_size_after_cropping == pytest.approx(640 / 2688)
    assert not fingerprint.problems
    assert "Otsu" in fingerprint.foreground_rule


def test_file_round_trip_and_nnunets_schema(raw, out):
    fingerprint = extract(raw, out)
    assert Fingerprint.load(out / FINGERPRINT_FILE) == fingerprint
    stored = json.loads((out / FINGERPRINT_FILE).read_text())["foreground_intensity_properties_per_channel"]
    names = {"mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"}
    assert {channel: set(values) for channel, values in stored.items()} == {"0": names}
    with pytest.raises(FileNotFoundError, match="nnssl_extract_fingerprint"):
        Fingerprint.load(out / "elsewhere.json")


def test_workers_find_the_same(raw, out, tmp_path):
    with make_executor(2) as executor:
        assert extract(raw, out, executor) == extract(raw, tmp_path / "inline")


def test_second_run_reads_nothing(raw, out):
    first, executor = extract(raw, out), CountingExecutor()
    assert extract(raw, out, executor) == first
    assert executor.keys == []


def test_only_new_and_changed_cases_are_read(raw, out):
    extract(raw, out)
    write(raw / "imagesTr" / "case1_0000.mha", volume(11, (12, 16, 20)))
    write(raw / "imagesTr" / "case9_0000.mha", volume(9))
    (raw / "imagesTr" / "case3_0000.mha").unlink()
    executor = CountingExecutor()
    fingerprint = extract(raw, out, executor)
    assert executor.keys == ["case1", "case9"]
    assert list(fingerprint.cases) == ["case0", "case1", "case2", "case9"]
    assert fingerprint.cases["case1"].shape == (12, 16, 20)


def test_a_line_cut_off_by_a_crash_is_read_again(raw, out):
    first = extract(raw, out)
    journal = out / JOURNAL_FILE
    journal.write_text(journal.read_text()[:-40])
    executor = CountingExecutor()
    assert extract(raw, out, executor) == first
    assert executor.keys == ["case3"]
    executor = CountingExecutor()
    extract(raw, out, executor)
    assert executor.keys == []


def test_an_interrupted_run_goes_on(raw, out):
    class Interrupted(InlineExecutor):
        def run(self, function, tasks):
            for number, result in enumerate(super().run(function, tasks)):
                if number == 2:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        extract(raw, out, Interrupted())
    assert not (out / FINGERPRINT_FILE).exists()
    executor = CountingExecutor()
    extract(raw, out, executor)
    assert executor.keys == ["case2", "case3"]


def test_another_description_of_the_labels_checks_again(raw, out):
    extract(raw, out)
    write_dataset_json(raw, channel_names=["MRI"], file_ending=".mha", num_cases=4, labels={"background": 0, "a": 1})
    executor = CountingExecutor()
    extract(raw, out, executor)
    assert len(executor.keys) == 4


def test_faulty_cases_are_listed_and_left_out(raw, out):
    images = raw / "imagesTr"
    with_nan = volume(20)
    with_nan[5, 5, 5] = np.nan
    write(images / "nan_0000.mha", with_nan)
    write(images / "constant_0000.mha", np.full((8, 8, 8), 3, dtype=np.float32))
    write(images / "absurd_0000.mha", volume(21), spacing=(900.0, 900.0, 900.0))
    write(images / "flat_0000.mha", volume(22, (5, 16, 14))[2:3])
    (images / "broken_0000.mha").write_bytes(b"this is no image")
    write(images / "copy_0000.mha", volume(0))
    fingerprint = extract(raw, out)
    kinds = {problem.case_id: problem.kind for problem in fingerprint.problems}
    assert kinds == {
        "absurd": "spacing",
        "broken": "unreadable",
        "constant": "constant",
        "copy": "duplicate",
        "flat": "2d_among_3d",
        "nan": "non_finite",
    }
    assert set(fingerprint.cases) == {"case0", "case1", "case2", "case3", "copy"}
    assert all(problem.file.name.startswith(problem.case_id) for problem in fingerprint.problems)
    assert Fingerprint.load(out / FINGERPRINT_FILE) == fingerprint


def test_label_problems_leave_the_images_usable(raw, out):
    labels = {"background": 0, "organ": 1}
    write_dataset_json(raw, channel_names=["MRI"], file_ending=".mha", num_cases=4, labels=labels)
    write(raw / "labelsTr" / "case1.mha", np.full((12, 16, 14), 7, dtype=np.uint8))
    fingerprint = extract(raw, out)
    assert [(problem.case_id, problem.kind) for problem in fingerprint.problems] == [("case1", "label_values")]
    assert len(fingerprint.cases) == 4


def test_no_usable_case_says_why(raw, out):
    for file in (raw / "imagesTr").iterdir():
        file.write_bytes(b"this is no image")
    with pytest.raises(ValueError, match=r"no case that can be used\. case0: .*cannot be read"):
        extract(raw, out)


def test_channels_have_their_own_statistics(tmp_path, out):
    folder = tmp_path / "Dataset002_Two"
    for number in range(2):
        write(folder / "imagesTr" / f"case{number}_0000.mha", volume(number))
        write(folder / "imagesTr" / f"case{number}_0001.mha", volume(number + 5) * 10)
    write_dataset_json(folder, channel_names=["T1", "T2"], file_ending=".mha", num_cases=2)
    found = extract(folder, out).foreground_intensity_properties_per_channel
    assert found["1"].mean == pytest.approx(10 * found["0"].mean, rel=0.05)


def test_a_channel_without_any_foreground_is_refused(tmp_path, out, monkeypatch):
    folder = tmp_path / "Dataset003_Blank"
    write(folder / "imagesTr" / "case0_0000.mha", volume(0))
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".mha", num_cases=1)
    monkeypatch.setattr("nnssl_ext.fingerprint.extract.foreground_mask", lambda image: np.zeros(image.shape, bool))
    with pytest.raises(ValueError, match="no case has foreground in some channel"):
        extract(folder, out)


def test_a_worker_that_raises_is_a_problem_of_its_case_and_tried_again(raw, out, monkeypatch):
    def fail(case, *rest):
        if case.case_id == "case1":
            raise OSError("the disk is gone")
        return read_checked(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("nnssl_ext.fingerprint.extract.read_checked", fail)
        fingerprint = extract(raw, out)
    assert [(problem.case_id, problem.reason) for problem in fingerprint.problems] == [
        ("case1", "OSError: the disk is gone")
    ]
    executor = CountingExecutor()
    assert not extract(raw, out, executor).problems
    assert executor.keys == ["case1"]


@pytest.mark.real_data
def test_hippocampus(real_data, tmp_path, out):
    folder = tmp_path / "Dataset004_Hippocampus"
    (folder / "imagesTr").mkdir(parents=True)
    for file in sorted((real_data / "Task04_Hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))[:10]:
        (folder / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz")).symlink_to(file)
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nii.gz", num_cases=10)
    fingerprint = extract(folder, out)
    assert len(fingerprint.cases) == 10
    assert not fingerprint.problems
    assert {case.spacing for case in fingerprint.cases.values()} == {(1.0, 1.0, 1.0)}
