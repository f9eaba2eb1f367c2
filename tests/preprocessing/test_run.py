"""Whole datasets: equal to nnU-Net on disk, resumable after anything, and honest about what failed."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave

from nnssl_ext.core.executor import make_executor
from nnssl_ext.core.lock import sole_writer
from nnssl_ext.dataset.integrity import Problem
from nnssl_ext.dataset.manifest import Manifest, write_dataset_json
from nnssl_ext.fingerprint.extract import extract_fingerprint
from nnssl_ext.fingerprint.record import Fingerprint
from nnssl_ext.planners.plan import Plan
from nnssl_ext.preprocessing.index import JOURNAL_FILE, read_index
from nnssl_ext.preprocessing.run import preprocess_configurations, preprocess_dataset
from nnssl_ext.preprocessing.store import Store

MakeDataset = Callable[..., Manifest]
MakePlan = Callable[..., Plan]


def run(manifest: Manifest, plan: Plan, folder: Path, num_processes: int = 0, **options: Any) -> Store:
    configuration = plan.configuration("3d_fullres")
    with make_executor(num_processes) as executor:
        return preprocess_dataset(manifest, plan, configuration, folder, executor, **options)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}


def rewrite(image: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    old = sitk.ReadImage(str(image))
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(old)))
    new.CopyInformation(old)
    sitk.WriteImage(new, str(image))


def put_nan(array: np.ndarray) -> np.ndarray:
    array[3, 3, 3] = np.nan
    return array


def test_the_store_equals_nnunet_on_oblique_anisotropic_files(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest = make_dataset(3, num_channels=2)
    plan = make_plan((1.3, 1.0, 1.2), schemes=("ZScoreNormalization", "CTNormalization"), use_mask=(True, False))
    store = run(manifest, plan, tmp_path / "store", num_processes=2)
    manager = PlansManager(plan.raw)
    description = {"labels": {"background": 0}, "channel_names": {"0": "a", "1": "b"}}
    for case in manifest.cases:
        theirs, _, properties = DefaultPreprocessor(verbose=False).run_case(
            [str(image) for image in case.images], None, manager, manager.get_configuration("3d_fullres"), description
        )
        entry = store.entries[case.case_id]
        ours = store.read_crop(case.case_id, (0, 0, 0), entry.shape[1:])
        assert ours.dtype == np.float16
        assert entry.shape == theirs.shape
        assert (np.abs(ours - theirs) <= np.maximum(1e-2, 1e-3 * np.abs(theirs))).all()
        stored = store.properties(case.case_id)
        assert stored.pop("num_clamped_voxels") == 0
        assert stored == json.loads(json.dumps(properties))
        assert entry.modalities == ("c0", "c1")
        assert len(set(entry.content_hashes)) == 2


def test_opened_again_the_store_is_the_same_and_nothing_is_done_twice(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(), make_plan(), tmp_path / "store"
    first = run(manifest, plan, folder)
    before = times(folder)
    assert Store.open(folder).entries == first.entries == run(manifest, plan, folder).entries
    assert times(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == [*(f"case_{i}.b2nd" for i in range(4)), "nnssl_index.json"]


def test_speed_is_shown_while_the_work_goes_on(
    make_dataset: MakeDataset,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Planted fault: counting what is done without showing it, and only logging it at the end."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    manifest = make_dataset()
    run(manifest, make_plan(), tmp_path / "store")
    assert re.search(r"\d cases/s, \d+\.\d\d Mvoxels/s", capsys.readouterr().err)
    with make_executor(0) as executor:
        extract_fingerprint(manifest, tmp_path, executor)
    assert re.search(r"\d cases/s", capsys.readouterr().err)


def test_only_what_is_missing_altered_or_new_is_made(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(), make_plan(), tmp_path / "store"
    some = replace(manifest, cases=manifest.cases[:3])
    old = run(some, plan, folder)
    before = times(folder)
    (folder / "case_0.b2nd").unlink()
    rewrite(manifest.case("case_1").images[0], lambda array: array * 2 + 1)
    store = run(manifest, plan, folder)
    assert sorted(store.entries) == ["case_0", "case_1", "case_2", "case_3"]
    assert store.entries["case_0"] == old.entries["case_0"]
    assert store.entries["case_1"].content_hashes != old.entries["case_1"].content_hashes
    unchanged = {name for name, changed in times(folder).items() if before.get(name) == changed}
    assert unchanged == {"case_2.b2nd"}
    assert sorted(run(some, plan, folder).entries) == ["case_0", "case_1", "case_2"]


def test_other_settings_are_refused_until_overwrite_is_given(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, folder = make_dataset(2), tmp_path / "store"
    run(manifest, make_plan(), folder)
    other = make_plan((2.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"spacing \(there \[1.0, 1.0, 1.0\], now \[2.0, 1.0, 1.0\]\).*--overwrite"):
        run(manifest, other, folder)
    store = run(manifest, other, folder, overwrite=True)
    assert {entry.spacing for entry in store.entries.values()} == {(2.0, 1.0, 1.0)}


def test_failed_cases_are_named_and_the_others_kept(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(ending=".mha"), make_plan(), tmp_path / "store"
    rewrite(manifest.case("case_1").images[0], put_nan)
    manifest.case("case_3").images[0].write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 4 cases could not be preprocessed") as caught:
        run(manifest, plan, folder)
    text = str(caught.value)
    assert "case_1_0000.mha: channel 0 has 1 voxels that are NaN or infinite" in text
    assert "case_3_0000.mha" in text
    assert "--skip_failed" in text
    before = times(folder)
    with pytest.raises(FileNotFoundError, match="not preprocessed to its end"):
        Store.open(folder)
    store = run(manifest, plan, folder, skip_failed=True)
    assert sorted(store.entries) == ["case_0", "case_2"]
    assert sorted(read_index(folder).failed) == ["case_1", "case_3"]
    assert times(folder) == before


def test_without_any_usable_case_even_skipping_fails(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest = make_dataset(1)
    rewrite(manifest.cases[0].images[0], np.zeros_like)
    with pytest.raises(ValueError, match=r"no case could be preprocessed\n.*zero everywhere"):
        run(manifest, make_plan(), tmp_path / "store", skip_failed=True)


def test_a_plan_that_cannot_be_carried_out_is_refused_before_reading(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest = make_dataset(1)
    for plan in (make_plan(schemes=("NoSuchScheme",)), make_plan(function="resample_torch_fornnunet")):
        with pytest.raises(ValueError, match=r"NoSuchScheme|resample_torch_fornnunet"):
            run(manifest, plan, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(3), make_plan(function="no_resampling_hack"), tmp_path / "store"
    sizes = [entry.num_bytes for entry in run(manifest, plan, tmp_path / "reference").entries.values()]
    assert sizes == sorted(sizes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[1], limits[1]))
        with pytest.raises(ValueError, match=r"the disk of .* is full.*case_2\.b2nd.*goes on where it stopped"):
            run(manifest, plan, folder, skip_failed=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in folder.iterdir()) == ["case_0.b2nd", "case_1.b2nd", JOURNAL_FILE]
    before = times(folder)
    assert run(manifest, plan, folder).entries == Store.open(tmp_path / "reference").entries
    assert before.items() <= times(folder).items()


KILLED = """
import sys
from pathlib import Path
from nnssl_ext.core.executor import make_executor
from nnssl_ext.dataset.integrity import Problem
from nnssl_ext.dataset.manifest import Manifest, write_dataset_json
from nnssl_ext.planners.plan import Plan
from nnssl_ext.core.lock import sole_writer
from nnssl_ext.preprocessing.run import preprocess_dataset

plan = Plan.load(Path(sys.argv[2]))
with make_executor(0) as executor:
    configuration = plan.configuration("3d_fullres")
    preprocess_dataset(Manifest.load(Path(sys.argv[1])), plan, configuration, Path(sys.argv[3]), executor)
"""


def test_a_run_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(8, shape=(20, 80, 80)), make_plan((0.7, 0.7, 0.7)), tmp_path / "store"
    reference = run(manifest, plan, tmp_path / "reference")
    plan.save(tmp_path / "plan.json")
    arguments = [str(manifest.folder), str(tmp_path / "plan.json"), str(folder)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments])
    while not (folder / "case_1.b2nd").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = times(folder)
    assert 2 <= len(written) < 8
    for name in written:
        assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    (folder / ".tmp-left.b2nd").write_bytes(b"half")
    store = run(manifest, plan, folder)
    assert store.entries == reference.entries
    assert sum(times(folder)[name] == changed for name, changed in written.items()) >= len(written) - 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in reference.folder.iterdir())


def test_a_device_makes_the_same_store_or_is_refused(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan = make_dataset(1), make_plan((0.7, 0.7, 0.7))
    first, second = run(manifest, plan, tmp_path / "a"), run(manifest, plan, tmp_path / "b", device="cpu:0")
    whole = ("case_0", (0, 0, 0), first.entries["case_0"].shape[1:])
    np.testing.assert_allclose(second.read_crop(*whole), first.read_crop(*whole), atol=2e-3)
    with pytest.raises(ValueError, match=r"^device 'warp' cannot be used here"):
        run(manifest, plan, tmp_path / "a", device="warp", overwrite=True)
    np.testing.assert_array_equal(Store.open(tmp_path / "a").read_crop(*whole), first.read_crop(*whole))


def test_a_second_run_is_refused_and_touches_nothing(
    make_dataset: MakeDataset, make_plan: MakePlan, tmp_path: Path
) -> None:
    manifest, plan, folder = make_dataset(1), make_plan(), tmp_path / "store"
    run(manifest, plan, folder)
    with sole_writer(folder):
        (folder / ".tmp-first.b2nd").write_bytes(b"half")
        before = sorted(folder.iterdir())
        with pytest.raises(ValueError, match="another run is writing"):
            run(manifest, plan, folder, overwrite=True)
        assert sorted(folder.iterdir()) == before


def test_colour_pictures(roots: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    folder = roots / "raw" / "Dataset001_Test"
    (folder / "imagesTr").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(1, 255, (30, 41, 3), dtype=np.uint8)
    imsave(folder / "imagesTr" / "case_0000.png", pixels)
    write_dataset_json(folder, channel_names=["R", "G", "B"], file_ending=".png", num_cases=1)
    plan = make_plan((1.0, 1.0), schemes=["RGBTo01Normalization"] * 3)
    store = run(Manifest.load(folder), plan, tmp_path / "store")
    stored = store.read_crop("case", (0, 0, 0), (1, 30, 41))
    np.testing.assert_array_equal(stored[:, 0], (pixels.transpose(2, 0, 1) / np.float32(255)).astype(np.float16))
    assert store.occupancy("case")[1] == (1, 4, 4)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "scheme"), [("ct_small", "CTNormalization"), ("mr_small", "ZScoreNormalization")])
def test_real_volumes_equal_nnunet(
    real_data: Path, roots: Path, make_plan: MakePlan, tmp_path: Path, name: str, scheme: str
) -> None:
    folder = roots / "raw" / "Dataset001_Test"
    folder.mkdir()
    image = real_data / "volumes" / f"{name}.nii.gz"
    listing = {"case": {"images": [str(image)]}}
    write_dataset_json(folder, channel_names=["x"], file_ending=".nii.gz", num_cases=1, dataset=listing)
    plan = make_plan((2.5, 3.4, 2.8), schemes=(scheme,))
    store = run(Manifest.load(folder), plan, tmp_path / "store")
    manager = PlansManager(plan.raw)
    stock = DefaultPreprocessor(verbose=False)
    theirs, _, _ = stock.run_case([str(image)], None, manager, manager.get_configuration("3d_fullres"), {})
    ours = store.read_crop("case", (0, 0, 0), theirs.shape[1:])
    assert (np.abs(ours - theirs) <= np.maximum(1e-2, 1e-3 * np.abs(theirs))).all()


def test_configurations_of_a_planned_dataset(make_dataset: MakeDataset, make_plan: MakePlan, roots: Path) -> None:
    manifest = make_dataset(3)
    target = roots / "preprocessed" / "Dataset001_Test"
    target.mkdir()
    make_plan().save(target / "nnsslPlans.json")
    fingerprint = Fingerprint(
        dataset_name="Dataset001_Test",
        foreground_rule="",
        cases={},
        foreground_intensity_properties_per_channel={},
        median_relative_size_after_cropping=1.0,
        problems=(Problem(case_id="case_2", file=Path("f.nii.gz"), kind="duplicate", reason="same voxels as case_0"),),
    )
    fingerprint.save(target / "nnssl_fingerprint.json")
    with make_executor(0) as executor:
        with pytest.raises(ValueError, match=r"case_2: duplicate: same voxels as case_0 \(f.nii.gz\)"):
            preprocess_configurations(1, "nnsslPlans", None, executor)
        (store,) = preprocess_configurations(1, "nnsslPlans", None, executor, skip_failed=True)
        with pytest.raises(FileNotFoundError, match="nnssl_plan_experiment"):
            preprocess_configurations(1, "OtherPlans", None, executor)
        with pytest.raises(ValueError, match="no configuration '2d'"):
            preprocess_configurations(1, "nnsslPlans", ["2d"], executor)
    assert store.folder == target / "nnsslPlans_3d_fullres"
    assert sorted(store.entries) == [case.case_id for case in manifest.cases[:2]]
