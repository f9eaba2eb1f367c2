import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image

from nnssl_ext.cli import extract_fingerprint, plan_and_preprocess, plan_experiment
from nnssl_ext.core.history import recorded_commands
from nnssl_ext.dataset.manifest import write_dataset_json
from nnssl_ext.preprocessing.store import Store


def volume(seed, shape=(20, 24, 18)):
    image = np.zeros(shape, dtype=np.float32)
    inside = image[3:-3, 4:-4, 3:-3]
    inside[...] = np.random.default_rng(seed).normal(100, 10, inside.shape)
    return image


@pytest.fixture
def volumes(roots):
    folder = roots / "raw" / "Dataset001_Boxes"
    (folder / "imagesTr").mkdir(parents=True)
    for number in range(3):
        sitk.WriteImage(sitk.GetImageFromArray(volume(number)), str(folder / "imagesTr" / f"c{number}_0000.nii.gz"))
    write_dataset_json(folder, channel_names=["MRI"], file_ending=".nii.gz", num_cases=3)
    return folder


@pytest.fixture
def preprocessed(roots):
    return roots / "preprocessed" / "Dataset001_Boxes"


def test_one_command_makes_a_store_that_the_plans_describe(volumes, preprocessed, capsys):
    plan_and_preprocess.main(["-d", "1", "-np", "0", "-pl", "nnsslPlannerResEncXS"])
    printed = capsys.readouterr().out
    assert "3 of 3 cases described" in printed
    assert "patch 16 x 16 x 16, batch 2" in printed
    manager = PlansManager(str(preprocessed / "nnsslPlans.json"))
    assert manager.get_configuration("3d_fullres").patch_size == [16, 16, 16]
    assert sorted(Store.open(preprocessed / "nnsslPlans_3d_fullres").entries) == ["c0", "c1", "c2"]
    assert (preprocessed / "dataset.json").is_file()
    assert recorded_commands(preprocessed) == ("nnssl_plan_and_preprocess -d 1 -np 0 -pl nnsslPlannerResEncXS",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-pl", "nnsslPlannerFoo"], "nnsslPlannerFoo"),
        (["-spacing", "fine"], "spacing rule 'fine' is not known"),
        (["-spacing", "1", "1", "0"], "spacing [1.0, 1.0, 0.0] is not possible"),
        (["-gpu_memory_target", "0"], "a memory target of 0 GB is not possible"),
        (["-tr", "FooTrainer"], "FooTrainer"),
        (["-normalization", "loud"], "normalization 'loud' is not known"),
    ],
)
def test_a_mistake_in_planning_is_told_before_the_fingerprint(volumes, preprocessed, capsys, words, message):
    """Planted faults: told hours later; and 0 GB taken for no target."""
    with pytest.raises(SystemExit) as stopped:
        plan_and_preprocess.main(["-d", "1", "-np", "0", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not preprocessed.exists()


def test_steps_one_by_one(volumes, preprocessed):
    extract_fingerprint.main(["-d", "Dataset001_Boxes", "-np", "0"])
    arguments = ["-d", "1", "-pl", "nnsslPlannerResEncXS", "-spacing", "2", "1", "1", "--plans_name", "coarse"]
    plan_experiment.main([*arguments, "-gpu_memory_target", "6", "-normalization", "percentile"])
    plans = json.loads((preprocessed / "coarse.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.0, 1.0, 1.0]
    assert configuration["normalization_schemes"] == ["PercentileNormalization"]
    assert configuration["data_identifier"] == "coarse_3d_fullres"
    assert plans["nnssl_planning"]["memory_target_gb"] == 6.0
    assert plans["nnssl_planning"]["bytes_per_value"] == 2


@pytest.mark.parametrize(("memory", "expected", "bytes_per_value"), [(None, 4.0, 4), (11.5, 11.5, 2)])
def test_memory_of_the_device_found(volumes, preprocessed, monkeypatch, memory, expected, bytes_per_value):
    monkeypatch.setattr("nnssl_ext.cli.plan_experiment.device_memory", lambda: memory)
    extract_fingerprint.main(["-d", "1", "-np", "0"])
    plan_experiment.main(["-d", "1", "-pl", "nnsslPlannerResEncXS"])
    planning = json.loads((preprocessed / "nnsslPlans.json").read_text())["nnssl_planning"]
    assert planning["memory_target_gb"] == expected
    assert planning["bytes_per_value"] == bytes_per_value


def test_a_trainers_step_is_planned_for(volumes, preprocessed, capsys):
    extract_fingerprint.main(["-d", "1", "-np", "0"])
    plan_experiment.main(["-d", "1", "-tr", "MAETrainer"])
    planning = json.loads((preprocessed / "nnsslPlans.json").read_text())["nnssl_planning"]
    assert planning["step_cost"] == {"views": 1.0, "copies": 1, "decoder": True, "tokens": 0.25}
    with pytest.raises(SystemExit) as stopped:
        plan_experiment.main(["-d", "1", "-tr", "MAETrianer"])
    assert stopped.value.code == 2
    assert "MAETrainer" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_pictures_get_a_2d_configuration(roots, ending):
    folder = roots / "raw" / "Dataset002_Pictures"
    (folder / "imagesTr").mkdir(parents=True)
    for number in range(3):
        picture = np.random.default_rng(number).integers(1, 255, (40, 56), dtype=np.uint8)
        picture[10:30, 10:40] = 250
        Image.fromarray(picture).save(folder / "imagesTr" / f"p{number}_0000{ending}")
    write_dataset_json(folder, channel_names=["gray"], file_ending=ending, num_cases=3)
    plan_and_preprocess.main(["-d", "2", "-np", "0", "-pl", "nnsslPlannerResEncXS"])
    manager = PlansManager(str(roots / "preprocessed" / "Dataset002_Pictures" / "nnsslPlans.json"))
    assert manager.available_configurations == ["2d"]
    configuration = manager.get_configuration("2d")
    assert configuration.patch_size == [40, 56]
    assert configuration.spacing == [1.0, 1.0]
    assert manager.image_reader_writer_class.__name__ == "NaturalImage2DIO"
    store = Store.open(roots / "preprocessed" / "Dataset002_Pictures" / "nnsslPlans_2d")
    assert {entry.shape for entry in store.entries.values()} == {(1, 1, 40, 56)}


def test_faulty_files_are_listed_and_end_with_status_2(volumes, preprocessed, capsys):
    broken = volumes / "imagesTr" / "c9_0000.nii.gz"
    broken.write_bytes(b"this is no image")
    with pytest.raises(SystemExit) as stopped:
        plan_and_preprocess.main(["-d", "1", "-np", "0"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert str(broken) in printed.out
    assert "--skip_failed" in printed.err
    assert not (preprocessed / "nnsslPlans.json").exists()
    plan_and_preprocess.main(["-d", "1", "-np", "0", "--skip_failed", "-pl", "nnsslPlannerResEncXS"])
    assert sorted(Store.open(preprocessed / "nnsslPlans_3d_fullres").entries) == ["c0", "c1", "c2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "7"], "no dataset '7'"),
        (["-d", "1"], "nnssl_extract_fingerprint -d"),
        (["-d", "1", "-spacing", "1", "one", "1"], "-spacing 1.5 1.5 1.5"),
    ],
)
def test_mistakes_are_one_clear_line(volumes, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        plan_experiment.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
